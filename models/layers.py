"""The sub-blocks of a decoder layer as pure functions of arrays.

Norms, rotary angles and softmax run in float32 whatever the compute dtype.
Letters: B rows, T tokens, S cached keys, D width, K kv heads, G query heads per kv head (N / K), H
head size, F ffw.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from models.activations import shares_work
from models.config import RopeScaling
from models.lora import LowRankSum, Weight
from models.rows import SCORES_IN_CACHE, SharedPrompts

MASKED_SCORE = -1e30
"""Score of a key that must not be seen: finite, so that a row without any key stays free of NaN."""


def embed(embedding: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows [..., D] of embedding [V, D] at tokens [...]; NaN for a token outside the vocabulary."""
    with jax.named_scope("embed"):
        return jnp.take(embedding, tokens, axis=0)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last dimension, in float32, returned in x's dtype.

    On one device everything before it is flattened, as in `product`: sums over three dimensions and more, in
    backward, take XLA five to ten times as long on CPU as the same sums over two.
    Source: arXiv:1910.07467 eq. 4.
    """
    with jax.named_scope("rms_norm"):
        x32 = (x if shares_work() else x.reshape(-1, x.shape[-1])).astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
        scale = scale.astype(jnp.float32).reshape((1,) * (x32.ndim - 1) + (-1,))
        return (x32 * inverse * scale).astype(x.dtype).reshape(x.shape)


def rope_tables(
    positions: jax.Array,
    length: int,
    head_size: int,
    theta: float,
    scaling: RopeScaling | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [..., H/2] float32 of positions [...], all below `length`; frequency i is
    theta^(-2i/H), stretched by `scaling`.

    Looked up in a table of `length` rows: computed in place, the compiler repeats the cosines in
    every use.
    Source: arXiv:2104.09864 eq. 15, in the "rotate half" order of Hugging Face (pairs i and i +
    H/2).
    """
    half = head_size // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scale = 1.0
    if scaling is not None:
        frequencies = _stretched(frequencies, theta, scaling)
        scale = scaling.attention_factor
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies[None, :]
    cos, sin = (scale * table for table in (jnp.cos(angles), jnp.sin(angles)))
    return jnp.take(cos, positions, axis=0), jnp.take(sin, positions, axis=0)


def _stretched(frequencies: jax.Array, theta: float, scaling: RopeScaling) -> jax.Array:
    """Rotary frequencies [H/2] for a longer context; the formulas are those of `RopeScaling`."""
    slow = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slow
    if scaling.kind == "llama3":
        turns = scaling.original_max_positions * frequencies / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    else:
        half = frequencies.shape[0]
        low, high = (
            half
            * math.log(scaling.original_max_positions / (turns * 2 * math.pi))
            / math.log(theta)
            for turns in (scaling.beta_fast, scaling.beta_slow)
        )
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        width = high - low or 0.001
        keep = 1.0 - jnp.clip((jnp.arange(half, dtype=jnp.float32) - low) / width, 0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * slow


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [..., H] turned by tables that broadcast against [..., H/2]; float32 inside, x's dtype
    outside."""
    with jax.named_scope("rope"):
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def product(x: jax.Array, weight: Weight, *, contracted: int = 1) -> jax.Array:
    """x [..., I...] times weight [I..., O...] -> [..., O...], the last `contracted` dims of x summed.

    Both sides are flattened to matrices first: the gradient of a weight then contracts one dimension
    instead of two (rows and tokens), and products of matrices are the fastest; together a third on CPU.
    On several devices O... stay as they are: flattened, a split of the last one would be lost.
    """
    if isinstance(weight, LowRankSum):
        low = product(x, weight.a, contracted=contracted)
        whole = product(x, weight.weight, contracted=contracted)
        return whole + weight.scale * product(low, weight.b)
    split = x.ndim - contracted
    outer, out = x.shape[:split], weight.shape[contracted:]
    columns = out if shares_work() else (math.prod(out),)
    matrix = weight.reshape(math.prod(weight.shape[:contracted]), *columns).astype(x.dtype)
    rows = x.reshape(math.prod(outer), matrix.shape[0])
    return jax.lax.dot_general(rows, matrix, (((1,), (0,)), ((), ()))).reshape(*outer, *out)


def mlp(x: jax.Array, gate_up: tuple[Weight, ...], down: Weight) -> jax.Array:
    """The feed-forward block on x [..., D] with gate and up [D, 2, F] or each [D, 1, F], and down [F, D].

    down(silu(gate x) * up x), arXiv:2002.05202 eq. 6; without a gate, only up, down(silu(up x)).
    """
    with jax.named_scope("mlp"):
        inner = [product(x, weight) for weight in gate_up]
        units = [part[..., i, :] for part in inner for i in range(part.shape[-2])]
        active = jax.nn.silu(units[0])
        return product(active if len(units) == 1 else active * units[1], down)


def turned_mlp(x: jax.Array, gate_up: tuple[Any, ...], down: Any) -> jax.Array:
    """`mlp` with plain weights, outputs in front: gate_up one [2, F, D] or [1, F, D], down [D, F].

    The hidden units are [F, rows], so that both products read their weight along its rows; turning the result
    back is kept apart from the second, or the compiler would turn the weight instead.
    """
    with jax.named_scope("mlp"):
        (weight,) = gate_up
        kinds, units, width = weight.shape
        rows = x.reshape(-1, width)
        matrix = weight.astype(x.dtype).reshape(kinds * units, width)
        inner = jax.lax.dot_general(matrix, rows, (((1,), (1,)), ((), ())))
        inner = inner.reshape(kinds, units, rows.shape[0])
        active = jax.nn.silu(inner[0])
        active = active if kinds == 1 else active * inner[1]
        out = jax.lax.dot_general(down.astype(x.dtype), active, (((1,), (0,)), ((), ())))
        return jax.lax.optimization_barrier(out).T.reshape(x.shape)


def packed_mask(segment_ids: jax.Array) -> jax.Array:
    """[B, T, T] bool: query t may see key s of its own segment with s <= t; segment 0 is padding.

    Padding sees padding, never a sequence, and no sequence sees padding.
    """
    tokens = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same & jnp.tril(jnp.ones((1, tokens, tokens), bool))


def shared_masks(
    segment_ids: jax.Array, prefix_ids: jax.Array, shared: SharedPrompts
) -> tuple[jax.Array, jax.Array]:
    """Who sees whom in rows [B, n + P t] of P parts: ([B, n, n] among the prompts, [B P, t, n + t] of a part).

    A token of a part sees its own segment up to itself, and all of the prompt whose segment is its
    prefix id (0: none).
    """
    n = shared.prompt_tokens
    of_parts, of_prefix = (
        ids[:, n:].reshape(ids.shape[0] * shared.parts, -1) for ids in (segment_ids, prefix_ids)
    )
    prompts = jnp.repeat(segment_ids[:, :n], shared.parts, axis=0)
    sees_prompt = (of_prefix[:, :, None] == prompts[:, None, :]) & (of_prefix > 0)[:, :, None]
    masks = jnp.concatenate([sees_prompt, packed_mask(of_parts)], axis=-1)
    return packed_mask(segment_ids[:, :n]), masks


def shared_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    masks: tuple[jax.Array, jax.Array],
    shared: SharedPrompts,
    scores_at_once: int = SCORES_IN_CACHE,
) -> jax.Array:
    """`packed_attention` of rows whose parts share the prompts in front; masks of `shared_masks`."""
    n, rows = shared.prompt_tokens, q.shape[0]

    def parts(x: jax.Array) -> jax.Array:  # [B, n + P t, ...] -> [B P, t, ...]
        return x[:, n:].reshape(rows * shared.parts, -1, *x.shape[2:])

    def seen(x: jax.Array) -> jax.Array:  # [B, n + P t, ...] -> [B P, n + t, ...]
        return jnp.concatenate([jnp.repeat(x[:, :n], shared.parts, axis=0), parts(x)], axis=1)

    prompts = packed_attention(q[:, :n], k[:, :n], v[:, :n], masks[0], scores_at_once)
    rest = packed_attention(parts(q), seen(k), seen(v), masks[1], scores_at_once)
    return jnp.concatenate([prompts, rest.reshape(rows, -1, *q.shape[2:])], axis=1)


def packed_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scores_at_once: int = SCORES_IN_CACHE
) -> jax.Array:
    """Attention within rows: q [B, T, K, G, H], k and v [B, S, K, H], mask [B or 1, T, S] -> [B, T, K, G, H].

    Long rows go through in blocks of queries, so that the float32 scores that exist at once stay below
    `scores_at_once`, and memory does not grow with T squared. Backward makes each block's scores again.
    """
    with jax.named_scope("attention"):
        b, t, k_heads, g, h = q.shape
        blocks = _query_blocks(b * k_heads * g * k.shape[1], t, scores_at_once)
        attend = jax.checkpoint(_attend, prevent_cse=False)
        if blocks == 1:
            return attend(q, k, v, mask)
        split = q.reshape(b, blocks, t // blocks, k_heads, g, h).swapaxes(0, 1)
        masks = mask.reshape(mask.shape[0], blocks, t // blocks, -1).swapaxes(0, 1)
        heads = jax.lax.map(lambda block: attend(block[0], k, v, block[1]), (split, masks))
        return heads.swapaxes(0, 1).reshape(q.shape)


def _query_blocks(scores_per_query: int, queries: int, scores_at_once: int) -> int:
    """The least number of equal blocks of queries whose scores fit `scores_at_once`."""
    fitting = (
        n for n in range(1, queries + 1)
        if queries % n == 0 and scores_per_query * (queries // n) <= scores_at_once
    )  # fmt: skip
    return next(fitting, queries)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Queries [B, t, K, G, H] over keys [B, S, K, H] where mask [B or 1, t, S] allows."""
    b, t, k_heads, g, h = q.shape
    keys = k.shape[1]
    q = q.transpose(0, 2, 3, 1, 4).reshape(b, k_heads, g * t, h)
    scores = jnp.einsum("bkqh,bskh->bkqs", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(b, k_heads, g, t, keys) * h**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED_SCORE), axis=-1)
    weights = weights.astype(v.dtype).reshape(b, k_heads, g * t, keys)
    out = jnp.einsum("bkqs,bskh->bkqh", weights, v)
    return out.reshape(b, k_heads, g, t, h).transpose(0, 3, 1, 2, 4)
