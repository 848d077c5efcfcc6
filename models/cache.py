"""Keys and values of the slots that are being decoded.

Layout, per layer: keys [B, K, S/KEY_BLOCK, H, KEY_BLOCK], so that the key index is last within a
block, and values [B, K, S, H]. Both products of decode attention are then batched [G, .] x [., at
most 64] matrix products that read the cache front to back once; a wider right side or the other
order costs three to four times as much on CPU. Layers are separate arrays, because a slice of a
stacked array would be copied in every decode step. A slot's entries past its own position hold
leftovers; they are overwritten before they can be seen.
Letters: B slots, S cached tokens, L layers, K kv heads, H head size, P prompts, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from models.config import ModelConfig

KEY_BLOCK = 32
"""Tokens per block of keys [tokens]; the capacity of a cache is a multiple of it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class KVCache:
    """Keys and values of B slots of S tokens each; a device pytree, donated from step to step."""

    keys: Any  # L x [B, K, S/KEY_BLOCK, H, KEY_BLOCK] compute dtype
    values: Any  # L x [B, K, S, H] compute dtype

    @property
    def max_tokens(self) -> int:
        """S, the tokens a slot has room for."""
        return self.values[0].shape[2]


def _round_up(tokens: int) -> int:
    return -(-tokens // KEY_BLOCK) * KEY_BLOCK


def init_cache(config: ModelConfig, slots: int, max_tokens: int, dtype: Any) -> KVCache:
    """An empty cache for `slots` slots of at least `max_tokens` tokens (rounded up to
    KEY_BLOCK)."""
    tokens, lead = _round_up(max_tokens), (slots, config.num_kv_heads)
    keys = (*lead, tokens // KEY_BLOCK, config.head_size, KEY_BLOCK)
    values = (*lead, tokens, config.head_size)
    return KVCache(
        keys=tuple(jnp.zeros(keys, dtype) for _ in range(config.num_layers)),
        values=tuple(jnp.zeros(values, dtype) for _ in range(config.num_layers)),
    )


def block_keys(keys: jax.Array) -> jax.Array:
    """Keys [B, T, K, H] in the cache's layout [B, K, T'/KEY_BLOCK, H, KEY_BLOCK], zeros past T."""
    b, t, k, h = keys.shape
    keys = jnp.pad(keys, ((0, 0), (0, _round_up(t) - t), (0, 0), (0, 0)))
    return keys.reshape(b, -1, KEY_BLOCK, k, h).transpose(0, 3, 1, 4, 2)


def write_token(
    keys: jax.Array, values: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One layer's cache with k and v [B, K, H] of slot b at positions[b]; positions past S are
    dropped."""
    slots = jnp.arange(positions.shape[0])
    block, offset = positions // KEY_BLOCK, positions % KEY_BLOCK
    return (
        keys.at[slots, :, block, :, offset].set(k.astype(keys.dtype)),
        values.at[slots, :, positions].set(v.astype(values.dtype)),
    )


def insert_prompts(
    cache: KVCache, keys: jax.Array, values: jax.Array, rows: jax.Array, slots: jax.Array
) -> KVCache:
    """Copy prompt row rows[i] of a prefill into slot slots[i], for i < Nb; a slot outside 0..B-1 is
    dropped.

    keys and values as `models.decoder.prefill` returns them, stacked over L.
    Raises: ValueError if the prompts are longer than the cache.
    """
    blocks, tokens = keys.shape[3], values.shape[3]
    if tokens > cache.max_tokens:
        raise ValueError(
            f"prompts of {tokens} tokens do not fit a cache of {cache.max_tokens}; "
            f"make the cache at least {tokens} tokens long, or the prompts shorter"
        )
    slots = jnp.where(
        slots < 0, cache.values[0].shape[0], slots
    )  # negative would count from the end
    return KVCache(
        keys=tuple(
            old.at[slots, :, :blocks].set(new[rows].astype(old.dtype), mode="drop")
            for old, new in zip(cache.keys, keys, strict=True)
        ),
        values=tuple(
            old.at[slots, :, :tokens].set(new[rows].astype(old.dtype), mode="drop")
            for old, new in zip(cache.values, values, strict=True)
        ),
    )


def prefix(keys: jax.Array, values: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array]:
    """The first `tokens` tokens of one layer's keys and values, rounded up to KEY_BLOCK, at most
    all."""
    tokens = min(_round_up(tokens), values.shape[2])
    return keys[:, :, : tokens // KEY_BLOCK], values[:, :, :tokens]


def narrow(cache: KVCache, tokens: int) -> KVCache:
    """The first `tokens` (static, rounded up to KEY_BLOCK) tokens of every slot, as a cache of its
    own.

    Decode reads all of the cache it is given. A loop of many steps whose longest live slot stays
    below `tokens` narrows once before and widens once after, which costs one copy instead of
    reading the rest in every step. Positions past the narrow cache are not written.
    """
    pairs = [prefix(k, v, tokens) for k, v in zip(cache.keys, cache.values, strict=True)]
    return KVCache(keys=tuple(k for k, _ in pairs), values=tuple(v for _, v in pairs))


def widen(narrowed: KVCache, cache: KVCache) -> KVCache:
    """`cache` with its first tokens replaced by `narrowed`; the inverse of `narrow`."""
    if narrowed.max_tokens == cache.max_tokens:
        return narrowed
    blocks, tokens = narrowed.max_tokens // KEY_BLOCK, narrowed.max_tokens
    pairs = zip(cache.keys, narrowed.keys, strict=True)
    value_pairs = zip(cache.values, narrowed.values, strict=True)
    return KVCache(
        keys=tuple(old.at[:, :, :blocks].set(new) for old, new in pairs),
        values=tuple(old.at[:, :, :tokens].set(new) for old, new in value_pairs),
    )
