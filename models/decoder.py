"""A Llama-like decoder: the same code trains, scores, prefills and decodes.

`Decoder` is an `nnx.Module` used as an immutable typed pytree: built once, never assigned after, passed
through `jax.*` transformations only. Layers are stacked on a leading dimension L and scanned.
Letters: B rows or slots, P prompts, T tokens, S cached keys, L layers, D width, K kv heads, G query heads per
kv head, H head size, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import layers as block
from models.activations import constrain_rows
from models.cache import KVCache
from models.config import ModelConfig
from models.embedding import embed
from models.parameters import Parameter, outer_table, stacked_layer_table


class Layers(nnx.Module):
    """Parameters of all layers, each array with a leading L; one slice of it is one layer."""

    attention_norm: jax.Array = nnx.data()  # [L, D]
    qkv: jax.Array = nnx.data()  # [L, D, K, G+2, H]
    attention_out: jax.Array = nnx.data()  # [L, K, G, H, D]
    mlp_norm: jax.Array = nnx.data()  # [L, D]
    up: jax.Array = nnx.data()  # [L, D, 2 or 1, F]
    down: jax.Array = nnx.data()  # [L, F, D]
    qkv_bias: jax.Array | None = nnx.data()  # [L, K, G+2, H]
    q_norm: jax.Array | None = nnx.data()  # [L, H]
    k_norm: jax.Array | None = nnx.data()  # [L, H]

    def __init__(self, config: ModelConfig, key: jax.Array, dtype: Any) -> None:
        _fill(self, stacked_layer_table(config), key, dtype, optional=("qkv_bias", "q_norm", "k_norm"))


class Decoder(nnx.Module):
    """The policy: parameters as typed attributes beside the configuration that gives them meaning."""

    config: ModelConfig
    embedding: jax.Array = nnx.data()  # [V, D]
    layers: Layers = nnx.data()
    final_norm: jax.Array = nnx.data()  # [D]
    head: jax.Array | None = nnx.data()  # [V, D]; None: the embedding serves as head

    def __init__(self, config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> None:
        outer, inner = jax.random.split(key)
        self.config = config
        _fill(self, outer_table(config), outer, dtype, optional=("head",))
        self.layers = Layers(config, inner, dtype)


def _fill(
    module: nnx.Module,
    table: dict[str, Parameter],
    key: jax.Array,
    dtype: Any,
    optional: tuple[str, ...],
) -> None:
    """Set every parameter of the table, and None for the optional ones it does not have."""
    for name in set(optional) - set(table):
        setattr(module, name, None)
    for (name, parameter), k in zip(table.items(), jax.random.split(key, len(table)), strict=True):
        setattr(module, name, parameter.init(k, dtype))


def abstract_decoder(config: ModelConfig, dtype: Any = jnp.float32) -> Decoder:
    """A Decoder of `jax.ShapeDtypeStruct`s: shapes and dtypes without memory."""
    return jax.eval_shape(partial(Decoder, config, dtype=dtype), jax.random.key(0))


def num_parameters(policy: Decoder) -> int:
    """Elements of all arrays of a (possibly abstract) policy."""
    return sum(leaf.size for leaf in jax.tree.leaves(policy))


def hidden_states(
    policy: Decoder,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    *,
    dtype: Any,
    remat: bool = False,
) -> jax.Array:
    """Final, normalised hidden states [B, T, D] of packed rows, in `dtype`.

    tokens, positions (from 0 within each sequence) and segment_ids (0 padding) are [B, T] int32.
    remat: backward recomputes each layer from its input instead of keeping its activations.
    """
    config = policy.config
    mask = block.packed_mask(segment_ids)
    tables = block.rope_tables(positions, config.head_size, config.rope_theta)

    def attend(x: jax.Array, xs: tuple[Layers, jax.Array | None]) -> tuple[jax.Array, None]:
        layer, rope_on = xs
        q, k, v = _project(layer, config, x, tables, rope_on)
        x = x + _attention_out(layer, block.packed_attention(q, k, v, mask))
        return constrain_rows(x + _mlp(layer, config, x)), None

    if remat:
        attend = jax.checkpoint(attend, prevent_cse=False)
    x = constrain_rows(embed(policy.embedding, tokens).astype(dtype))
    x, _ = jax.lax.scan(attend, x, (policy.layers, _rope_switch(config)))
    return block.rms_norm(x, policy.final_norm, config.norm_eps)


def prefill(policy: Decoder, tokens: jax.Array, *, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Keys [L, P, K, H, T] and values [L, P, K, T, H] of right-padded prompts tokens [P, T].

    Attention is causal, so what stands right of a prompt cannot reach it.
    """
    config = policy.config
    tokens_of_row = jnp.arange(tokens.shape[1])
    mask = (tokens_of_row[:, None] >= tokens_of_row[None, :])[None]
    tables = block.rope_tables(tokens_of_row[None], config.head_size, config.rope_theta)

    def attend(x: jax.Array, xs: tuple[Layers, jax.Array | None]):
        layer, rope_on = xs
        q, k, v = _project(layer, config, x, tables, rope_on)
        x = x + _attention_out(layer, block.packed_attention(q, k, v, mask))
        x = constrain_rows(x + _mlp(layer, config, x))
        return x, (k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))

    x = constrain_rows(embed(policy.embedding, tokens).astype(dtype))
    _, (keys, values) = jax.lax.scan(attend, x, (policy.layers, _rope_switch(config)))
    return keys, values


def recompute(policy: Decoder, cache: KVCache, tokens: jax.Array, *, dtype: Any) -> KVCache:
    """The cache with the keys and values of every slot's first T tokens [B, T] made anew by `policy`."""
    keys, values = prefill(policy, tokens, dtype=dtype)
    length = tokens.shape[1]
    return KVCache(
        keys=cache.keys.at[..., :length].set(keys.astype(cache.keys.dtype)),
        values=cache.values.at[..., :length, :].set(values.astype(cache.values.dtype)),
    )


def decode_step(
    policy: Decoder,
    cache: KVCache,
    tokens: jax.Array,
    positions: jax.Array,
    *,
    dtype: Any,
    kv_limit: int | None = None,
) -> tuple[jax.Array, KVCache]:
    """Hidden states [B, D] after one more token per slot, and the cache that holds its key and value.

    tokens [B] stand at positions [B]; slot b sees keys 0..positions[b]. kv_limit (static; None: S) is how many
    keys are read: the caller vouches that every live slot's position is below it.
    """
    config = policy.config
    limit = cache.max_tokens if kv_limit is None else min(kv_limit, cache.max_tokens)
    tables = block.rope_tables(positions[:, None], config.head_size, config.rope_theta)
    slots = jnp.arange(tokens.shape[0])

    def attend(carry: tuple[jax.Array, jax.Array, jax.Array], xs: tuple[Any, ...]):
        x, keys, values = carry
        index, layer, rope_on = xs
        q, k, v = _project(layer, config, x, tables, rope_on)
        keys = keys.at[index, slots, :, :, positions].set(k[:, 0].astype(keys.dtype))
        values = values.at[index, slots, :, positions].set(v[:, 0].astype(values.dtype))
        out = block.cached_attention(
            q[:, 0],
            _layer_prefix(keys, index, 4, limit),
            _layer_prefix(values, index, 3, limit),
            positions,
        )
        x = x + _attention_out(layer, out[:, None])
        return (constrain_rows(x + _mlp(layer, config, x)), keys, values), None

    x = constrain_rows(embed(policy.embedding, tokens[:, None]).astype(dtype))
    xs = (jnp.arange(config.num_layers), policy.layers, _rope_switch(config))
    (x, keys, values), _ = jax.lax.scan(attend, (x, cache.keys, cache.values), xs)
    hidden = block.rms_norm(x[:, 0], policy.final_norm, config.norm_eps)
    return hidden, KVCache(keys=keys, values=values)


def _layer_prefix(stacked: jax.Array, layer: jax.Array, dim: int, limit: int) -> jax.Array:
    """Layer `layer` of a stacked cache, cut to the first `limit` entries of `dim`."""
    sizes = [1, *stacked.shape[1:]]
    sizes[dim] = limit
    zero = jnp.zeros((), layer.dtype)
    return jax.lax.dynamic_slice(stacked, (layer, zero, zero, zero, zero), sizes)[0]


def _rope_switch(config: ModelConfig) -> jax.Array | None:
    """[L] bool, which layers rotate; None when all do."""
    if not config.no_rope_layers:
        return None
    return jnp.array([i not in config.no_rope_layers for i in range(config.num_layers)])


def _project(
    layer: Layers,
    config: ModelConfig,
    x: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    rope_on: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [B, T, K, G, H], k and v [B, T, K, H] of x [B, T, D]; tables [B or 1, T, H/2]."""
    with jax.named_scope("qkv"):
        normed = block.rms_norm(x, layer.attention_norm, config.norm_eps)
        qkv = jnp.einsum("btd,dkgh->btkgh", normed, layer.qkv.astype(x.dtype))
        if layer.qkv_bias is not None:
            qkv = qkv + layer.qkv_bias.astype(x.dtype)[None, None]
    q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
    if layer.q_norm is not None and layer.k_norm is not None:
        q = block.rms_norm(q, layer.q_norm, config.norm_eps)
        k = block.rms_norm(k, layer.k_norm, config.norm_eps)
    cos, sin = tables
    if rope_on is not None:
        cos, sin = jnp.where(rope_on, cos, 1.0), jnp.where(rope_on, sin, 0.0)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return block.rotate(q, cos[..., None, :], sin[..., None, :]), block.rotate(k, cos, sin), v


def _attention_out(layer: Layers, heads: jax.Array) -> jax.Array:
    """heads [B, T, K, G, H] -> [B, T, D]."""
    with jax.named_scope("attention_out"):
        return jnp.einsum("btkgh,kghd->btd", heads, layer.attention_out.astype(heads.dtype))


def _mlp(layer: Layers, config: ModelConfig, x: jax.Array) -> jax.Array:
    normed = block.rms_norm(x, layer.mlp_norm, config.norm_eps)
    return block.mlp(normed, layer.up.astype(x.dtype), layer.down.astype(x.dtype))
