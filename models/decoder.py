"""A Llama-like decoder: the same code trains, scores, prefills and decodes.

`Decoder` is an `nnx.Module` used as an immutable typed pytree: built once, never assigned after,
passed through `jax.*` transformations only. Layers are stacked on a leading dimension L; training,
scoring and prefill scan over it, decode unrolls it.
Letters: B rows or slots, P prompts, T tokens, S cached keys, L layers, D width, K kv heads, G query
heads per kv head, H head size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import layers as block
from models.activations import constrain_rows, gather_width, shares_work
from models.attention import (
    DecodeAttention,
    attention_in_prompts,
    attention_in_rows,
    attention_in_shared_rows,
    cached_attention,
    saves_attention,
)
from models.cache import KEY_BLOCK, KVCache, read_of, replace_start, write_token
from models.config import ModelConfig
from models.fused import FusedDecoder, FusedLayer, fused_layer, split_layers
from models.lora import AdaptedDecoder, AdaptedLayers, saves_products
from models.parameters import Parameter, outer_table, stacked_layer_table
from models.prefixes import Prefixes, prefixed_attention
from models.rows import RowAttention, SharedPrompts


class Layers(nnx.Module):
    """Parameters of all layers, each array with a leading L; one slice of it is one layer."""

    attention_norm: jax.Array = nnx.data()  # [L, D]
    q: jax.Array = nnx.data()  # [L, D, K, G, H]
    k: jax.Array = nnx.data()  # [L, D, K, H]
    v: jax.Array = nnx.data()  # [L, D, K, H]
    attention_out: jax.Array = nnx.data()  # [L, K, G, H, D]
    mlp_norm: jax.Array = nnx.data()  # [L, D]
    gate: jax.Array | None = nnx.data()  # [L, D, F]
    up: jax.Array = nnx.data()  # [L, D, F]
    down: jax.Array = nnx.data()  # [L, F, D]
    q_bias: jax.Array | None = nnx.data()  # [L, K, G, H]
    k_bias: jax.Array | None = nnx.data()  # [L, K, H]
    v_bias: jax.Array | None = nnx.data()  # [L, K, H]
    q_norm: jax.Array | None = nnx.data()  # [L, H]
    k_norm: jax.Array | None = nnx.data()  # [L, H]

    def __init__(self, config: ModelConfig, key: jax.Array, dtype: Any) -> None:
        """Fresh parameters of all layers in `dtype`."""
        optional = ("gate", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm")
        _fill(self, stacked_layer_table(config), key, dtype, optional)


class Decoder(nnx.Module):
    """The policy: parameters as typed attributes beside the configuration that gives them
    meaning."""

    config: ModelConfig
    embedding: jax.Array = nnx.data()  # [V, D]
    layers: Layers = nnx.data()
    final_norm: jax.Array = nnx.data()  # [D]
    head: jax.Array | None = nnx.data()  # [V, D]; None: the embedding serves as head

    def __init__(self, config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> None:
        """Fresh parameters in `dtype`, as `models.parameters` declares them."""
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


Policy = Decoder | AdaptedDecoder | FusedDecoder
"""Weights, frozen weights under an adapter, or weights as a sampler on a CPU holds them: what every function
below computes with."""


def abstract_decoder(config: ModelConfig, dtype: Any = jnp.float32) -> Decoder:
    """A Decoder of `jax.ShapeDtypeStruct`s: shapes and dtypes without memory."""
    return jax.eval_shape(partial(Decoder, config, dtype=dtype), jax.random.key(0))


def num_parameters(policy: Policy) -> int:
    """Elements of all arrays of a (possibly abstract) policy."""
    return sum(leaf.size for leaf in jax.tree.leaves(policy))


def hidden_states(
    policy: Policy,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    *,
    dtype: Any,
    remat: bool = False,
    prefix_ids: jax.Array | None = None,
    shared: SharedPrompts | None = None,
    attention: RowAttention = "blocks",
) -> jax.Array:
    """Final, normalised hidden states [B, T, D] of packed rows, in `dtype`.

    tokens, positions (from 0 within each sequence) and segment_ids (0 padding) are [B, T] int32. With
    `shared` the rows are divided as it says, and prefix_ids [B, T] int32 names the segment of the
    prompt that a token's sequence begins with (0: none).
    `attention` names the program; rows that share prompts want xla or blocks: no kernel knows their masks.
    Backward recomputes a layer from what forward kept of it: the attended heads and the results of the
    weight products, or with `remat` the heads and the layer's input. Keeping also elementwise results
    doubles the memory and is slower on CPU.
    """
    config = policy.config
    tables = _rope_tables(config, positions, tokens.shape[1])
    if shared is None or prefix_ids is None:
        attended = attention_in_rows(segment_ids, attention)
    else:
        attended = attention_in_shared_rows(segment_ids, prefix_ids, shared, attention)

    def attend(
        x: jax.Array, xs: tuple[Layers | AdaptedLayers | FusedLayer, jax.Array | None]
    ) -> tuple[jax.Array, None]:
        layer, rope_on = fused_layer(xs[0], together=shares_work()), xs[1]
        q, k, v = _project(layer, config, x, _switched(tables, rope_on))
        return _after_attention(layer, config, x, attended(q, k, v)), None

    saved = saves_attention
    if not remat:
        saved = jax.checkpoint_policies.save_from_both_policies(saved, saves_products(config))
    attend = jax.checkpoint(attend, prevent_cse=False, policy=saved)
    x = _embed(policy, tokens, dtype)
    x, _ = jax.lax.scan(attend, x, (policy.layers, _rope_switch(config)))
    return block.rms_norm(x, policy.final_norm, config.norm_eps)


def prefill(
    policy: Policy, tokens: jax.Array, *, dtype: Any, attention: RowAttention = "blocks"
) -> tuple[jax.Array, jax.Array]:
    """Keys and values [L, P, K, T, H] of right-padded prompts tokens [P, T].

    Attention is causal, so what stands right of a prompt cannot reach it.
    """
    config = policy.config
    tables = _rope_tables(config, jnp.arange(tokens.shape[1])[None], tokens.shape[1])
    attended = attention_in_prompts(tokens.shape[1], attention)

    def attend(x: jax.Array, xs: tuple[Layers | AdaptedLayers | FusedLayer, jax.Array | None]):
        layer, rope_on = fused_layer(xs[0], together=shares_work()), xs[1]
        q, k, v = _project(layer, config, x, _switched(tables, rope_on))
        x = _after_attention(layer, config, x, attended(q, k, v))
        return x, (k.swapaxes(1, 2), v.swapaxes(1, 2))

    x = _embed(policy, tokens, dtype)
    _, (keys, values) = jax.lax.scan(attend, x, (policy.layers, _rope_switch(config)))
    return keys, values


def recompute(
    policy: Policy, cache: KVCache, tokens: jax.Array, *, dtype: Any,
    attention: RowAttention = "blocks",
) -> KVCache:  # fmt: skip
    """The cache with the keys and values of every slot's first T tokens [B, T] made anew by
    `policy`.

    T is a multiple of `models.cache.KEY_BLOCK`, or S. What stands past T stays as it is.
    """
    length = tokens.shape[1]
    if length % KEY_BLOCK and length != cache.max_tokens:
        raise ValueError(f"recompute of {length} tokens: use a multiple of {KEY_BLOCK}")
    return replace_start(cache, *prefill(policy, tokens, dtype=dtype, attention=attention))


def decode_step(
    policy: Policy,
    cache: KVCache,
    tokens: jax.Array,
    positions: jax.Array,
    *,
    dtype: Any,
    layers: tuple[FusedLayer, ...] | None = None,
    attention: DecodeAttention = "blocks",
    prefixes: Prefixes | None = None,
) -> tuple[jax.Array, KVCache]:
    """Hidden states [B, D] after one more token per slot, and the cache that holds its key and
    value.

    tokens [B] stand at positions [B]; slot b sees keys 0..positions[b]. All of the cache is read: give
    the first segments only (`models.cache.split_cache`) while every sequence is short enough.
    `attention` is the program that the cache was laid out for. With `prefixes` the cache holds what follows a
    slot's row of them, and slot b sees that row too.
    Layers are unrolled: a scan would copy each layer's weights and cache in every step. So would
    slicing the weights inside a loop: pass layers=split_layers(policy), made before the loop.
    """
    config = policy.config
    reach = cache.max_tokens + (0 if prefixes is None else prefixes.cache.max_tokens)
    own = positions if prefixes is None else positions - prefixes.starts
    tables = _rope_tables(config, positions, reach)
    x = _embed(policy, tokens, dtype)
    all_keys, all_values = list(cache.keys), list(cache.values)
    for i, layer in enumerate(split_layers(policy) if layers is None else layers):
        rotation = None if i in config.no_rope_layers else tables
        q, k, v = _project(layer, config, x, rotation)
        all_keys[i], all_values[i] = write_token(all_keys[i], all_values[i], k, v, own)
        keys, values = (read_of(held[i], cache.prefix) for held in (all_keys, all_values))
        if prefixes is None:
            heads = cached_attention(q, keys, values, own, attention)
        else:
            heads = prefixed_attention(q, prefixes, i, keys, values, own)
        x = _after_attention(layer, config, x, heads)
    hidden = block.rms_norm(x, policy.final_norm, config.norm_eps)
    return hidden, replace(cache, keys=tuple(all_keys), values=tuple(all_values))


def _embed(policy: Policy, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Hidden states [..., D] of tokens [...] before the first layer."""
    return constrain_rows(block.embed(gather_width(policy.embedding, dtype), tokens))


def _rope_tables(
    config: ModelConfig, positions: jax.Array, length: int
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [..., H/2] of positions [...] below `length`, as the architecture rotates."""
    return block.rope_tables(
        positions, length, config.head_size, config.rope_theta, config.rope_scaling
    )


def _rope_switch(config: ModelConfig) -> jax.Array | None:
    """[L] bool, which layers rotate; None when all do."""
    if not config.no_rope_layers:
        return None
    return jnp.array([i not in config.no_rope_layers for i in range(config.num_layers)])


def _switched(
    tables: tuple[jax.Array, jax.Array], rope_on: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The rotary tables where the scalar rope_on is True, the identity rotation elsewhere."""
    if rope_on is None:
        return tables
    cos, sin = tables
    return jnp.where(rope_on, cos, 1.0), jnp.where(rope_on, sin, 0.0)


def _project(
    layer: FusedLayer,
    config: ModelConfig,
    x: jax.Array,
    tables: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [..., K, G, H], k and v [..., K, H] of x [..., D]; tables [..., H/2], None: no rotation."""
    with jax.named_scope("qkv"):
        normed = block.rms_norm(x, layer.attention_norm, config.norm_eps)
        parts = [block.product(normed, weight) for weight in layer.qkv]
        if layer.qkv_bias is not None:
            biases = [bias.astype(x.dtype) for bias in layer.qkv_bias]
            parts = [
                part + bias.reshape((1,) * (x.ndim - 1) + bias.shape)
                for part, bias in zip(parts, biases, strict=True)
            ]
        if len(parts) == 1:
            parts = jnp.split(parts[0], [parts[0].shape[-2] - 2, parts[0].shape[-2] - 1], axis=-2)
        q, k, v = parts[0], parts[1][..., 0, :], parts[2][..., 0, :]
    if layer.q_norm is not None and layer.k_norm is not None:
        q = block.rms_norm(q, layer.q_norm, config.norm_eps)
        k = block.rms_norm(k, layer.k_norm, config.norm_eps)
    if tables is None:
        return q, k, v
    cos, sin = (table[..., None, :] for table in tables)
    return block.rotate(q, cos[..., None, :], sin[..., None, :]), block.rotate(k, cos, sin), v


def _after_attention(
    layer: FusedLayer, config: ModelConfig, x: jax.Array, heads: jax.Array
) -> jax.Array:
    """The rest of a layer: x [..., D] plus the attended heads [..., K, G, H], then the MLP."""
    with jax.named_scope("attention_out"):
        x = x + block.product(heads, layer.attention_out, contracted=3)
    normed = block.rms_norm(x, layer.mlp_norm, config.norm_eps)
    mlp = block.turned_mlp if layer.turned else block.mlp
    return constrain_rows(x + mlp(normed, layer.gate_up, layer.down))
