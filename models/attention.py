"""Who attends to what, by which program: packed rows, prompts, and cached keys.

    xla      products that the compiler schedules, with all scores that memory allows; any dtype, any device
    blocks   the same products in parts that a CPU reads fastest: a core's cache of scores, keys in blocks
    cudnn    cuDNN's fused attention, bfloat16 and float16 on a CUDA device; packed rows need Hopper
    pallas   the Triton kernels that come with jax (jax.experimental.pallas.ops.gpu)
Which one is fastest depends on the device and the shape: `jaxrl.attention` chooses from measurements, and where
there are none, `rows_by_structure` and `decode_by_structure`.
Letters: B rows or slots, T tokens, S cached keys, K kv heads, G query heads per kv head, H head size.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from models import attention_kernels as kernels
from models.layers import (
    MASKED_SCORE,
    packed_attention,
    packed_mask,
    shared_attention,
    shared_masks,
)
from models.rows import RowAttention, SharedPrompts, rows_on_cuda, scores_at_once
from models.stored import Scaled, Stored, num_tokens

DecodeAttention = Literal["blocks", "xla", "cudnn", "pallas"]
"""Programs for one query per slot over its cache; `models.cache` lays the cache out for each."""
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""q [B, T, K, G, H], k and v [B, T, K, H] -> [B, T, K, G, H]."""
HEADS = "heads"
_KERNELS = ("pallas_call", "dot_product_attention_fwd_wrapper")
_CUDA = ("gpu", "cuda")


def rows_by_structure(device: Any, dtype: Any, head_size: int) -> RowAttention:
    """The program for packed rows on a device without measurements."""
    if device.platform not in _CUDA:
        return "blocks"
    return rows_on_cuda(kernels.capability(device), jnp.dtype(dtype).itemsize, head_size)


def decode_by_structure(device: Any) -> DecodeAttention:
    """The program for decoding on a device without measurements."""
    return "xla" if device.platform in _CUDA else "blocks"


def attention_in_rows(
    segment_ids: jax.Array, program: RowAttention, *, interpret: bool = False
) -> Attend:
    """Attention of packed rows with segment_ids [B, T] int32: a token sees its own segment up to itself.

    The tokens of a segment stand together; padding (0) sees padding. `interpret` runs Pallas kernels
    without a GPU. With cudnn a row of more than `models.rows.MAX_SEGMENTS` segments comes out as NaN.
    """
    if program == "cudnn":
        return functools.partial(kernels.cudnn_rows, spans=kernels.segment_spans(segment_ids))
    if program == "pallas":
        return functools.partial(kernels.pallas_rows, segment_ids=segment_ids, interpret=interpret)
    mask, most = packed_mask(segment_ids), scores_at_once(program)
    return lambda q, k, v: checkpoint_name(packed_attention(q, k, v, mask, most), HEADS)


def attention_in_shared_rows(
    segment_ids: jax.Array, prefix_ids: jax.Array, shared: SharedPrompts, program: RowAttention
) -> Attend:
    """Attention of rows whose parts share the prompts in front (`models.layers.shared_masks`).

    Raises: ValueError for a kernel: none knows such rows.
    """
    masks, most = shared_masks(segment_ids, prefix_ids, shared), scores_at_once(program)
    if not most:
        raise ValueError(
            f"attention {program} knows no rows with shared prompts; use xla or blocks"
        )
    return lambda q, k, v: checkpoint_name(
        shared_attention(q, k, v, masks=masks, shared=shared, scores_at_once=most), HEADS
    )


def attention_in_prompts(tokens: int, program: RowAttention, *, interpret: bool = False) -> Attend:
    """Causal attention of right-padded prompts of `tokens` tokens."""
    if program == "cudnn":
        return kernels.cudnn_prompts
    if program == "pallas":
        return functools.partial(kernels.pallas_rows, segment_ids=None, interpret=interpret)
    places = jnp.arange(tokens)
    mask = (places[:, None] >= places[None, :])[None]
    return functools.partial(packed_attention, mask=mask, scores_at_once=scores_at_once(program))


def saves_attention(primitive: Any, *_: Any, **params: Any) -> bool:
    """Checkpoint policy: what attention leaves for backward is kept, whichever program it is.

    The named heads of xla, whose scores backward makes again; output and log-sum-exp of a kernel.
    """
    by_name = jax.checkpoint_policies.save_only_these_names(HEADS)
    return primitive.name in _KERNELS or bool(by_name(primitive, *_, **params))


def cached_attention(
    q: jax.Array,
    keys: tuple[Stored, ...],
    values: tuple[Stored, ...],
    positions: jax.Array,
    program: DecodeAttention,
    *,
    interpret: bool = False,
) -> jax.Array:
    """One query per slot over its own cache: q [B, K, G, H] sees keys 0..positions[b] -> [B, K, G, H].

    keys and values are one layer's segments, laid out as `models.cache.init_cache` does for `program`.
    Raises: ValueError if a kernel is given a cache in segments, of scaled numbers or of another type than q.
    """
    with jax.named_scope("cached_attention"):
        if program in ("blocks", "xla"):
            return _cached_products(q, keys, values, positions)
        key, value = keys[0], values[0]
        if len(keys) > 1 or isinstance(key, Scaled) or isinstance(value, Scaled):
            raise ValueError(
                f"decode attention {program} reads one segment of plain numbers, not "
                f"{len(keys)} of {type(key).__name__}; use xla for this cache"
            )
        if not q.dtype == key.dtype == value.dtype:
            raise ValueError(
                f"decode attention {program} multiplies numbers of one type, not {q.dtype} queries with "
                f"{key.dtype} keys and {value.dtype} values; make the cache in {q.dtype}, or use xla"
            )
        if program == "cudnn":
            return kernels.cudnn_cached(q, key, value, positions)
        return kernels.pallas_cached(q, key, value, positions, interpret=interpret)


def _cached_products(
    q: jax.Array, keys: tuple[Stored, ...], values: tuple[Stored, ...], positions: jax.Array
) -> jax.Array:
    seen = jnp.arange(sum(map(num_tokens, values)))[None, :] <= positions[:, None]
    weights = jax.nn.softmax(_masked_scores(q, keys, seen), axis=-1)
    return _mixed(weights, values, q.dtype, q.dtype)


class Partial(NamedTuple):
    """Attention over some of the keys, to be joined with that over the others; all float32."""

    sums: jax.Array  # [B, K, G, H], values weighted with exp(score - peak)
    totals: jax.Array  # [B, K, G], sums of these weights
    peaks: jax.Array  # [B, K, G], largest scores


def partial_attention(
    q: jax.Array, keys: tuple[Stored, ...], values: tuple[Stored, ...], seen: jax.Array
) -> Partial:
    """q [B, K, G, H] over the keys that `seen` [B, S] marks, of one layer's segments."""
    scores = _masked_scores(q, keys, seen)
    peaks = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - peaks[..., None])
    return Partial(_mixed(weights, values, q.dtype, jnp.float32), weights.sum(-1), peaks)


def joined(one: Partial, other: Partial) -> jax.Array:
    """Attention [B, K, G, H] float32 over the keys of both; where one saw none, it has no part."""
    peaks = jnp.maximum(one.peaks, other.peaks)
    mine, theirs = jnp.exp(one.peaks - peaks), jnp.exp(other.peaks - peaks)
    sums = one.sums * mine[..., None] + other.sums * theirs[..., None]
    return sums / (one.totals * mine + other.totals * theirs)[..., None]


def _masked_scores(q: jax.Array, keys: tuple[Stored, ...], seen: jax.Array) -> jax.Array:
    """float32 scores [B, K, G, S] of keys [B, K, n, H, s/n] in n blocks or [B, K, s, H] per segment."""
    scores = jnp.concatenate([_scores_of(q, segment) for segment in keys], axis=-1)
    return jnp.where(seen[:, None, None, :], scores * q.shape[-1] ** -0.5, MASKED_SCORE)


def _mixed(weights: jax.Array, values: tuple[Stored, ...], dtype: Any, result: Any) -> jax.Array:
    """float32 weights [B, K, G, S] times values [B, K, s, H] per segment, multiplied in `dtype`.

    The scales of int8 and float8 numbers multiply scores and weights: keys and values are never
    written out in full precision.
    """
    ends = list(itertools.accumulate(num_tokens(segment) for segment in values))
    parts = jnp.split(weights, ends[:-1], axis=-1)
    sums = [_mix(part, held, dtype, result) for part, held in zip(parts, values, strict=True)]
    return functools.reduce(jnp.add, sums)


def _mix(weights: jax.Array, values: Stored, dtype: Any, result: Any) -> jax.Array:
    numbers: jax.Array = values.numbers if isinstance(values, Scaled) else values
    if isinstance(values, Scaled):
        weights = weights * values.scale[:, :, None, :]
    return jnp.einsum(
        "bkgs,bksh->bkgh", weights.astype(dtype), numbers.astype(dtype),
        preferred_element_type=result,
    )  # fmt: skip


def _scores_of(q: jax.Array, keys: Stored) -> jax.Array:
    """float32 products [B, K, G, s] of q [B, K, G, H] with one segment of keys, multiplied in q's type."""
    if isinstance(keys, Scaled):
        return _scores_of(q, keys.numbers) * keys.scale[:, :, None, :]
    keys = keys.astype(q.dtype)
    if keys.ndim == 4:
        return jnp.einsum("bkgh,bksh->bkgs", q, keys, preferred_element_type=jnp.float32)
    b, k, g, h = q.shape
    blocks, size = keys.shape[2], keys.shape[4]
    q = jnp.broadcast_to(q[:, :, None], (b, k, blocks, g, h))
    scores = jnp.einsum("bkngh,bknhs->bkngs", q, keys, preferred_element_type=jnp.float32)
    return scores.transpose(0, 1, 3, 2, 4).reshape(b, k, g, blocks * size)
