"""Keys and values of the slots that are being decoded.

Layout: keys [L, B, K, H, S] (the key index last) and values [L, B, K, S, H]. Both products of decode
attention then reduce over the second-to-last dimension and vectorise over the last. A slot's entries past
its own position hold leftovers; they are overwritten before they can be seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class KVCache:
    """Keys and values of B slots of S tokens each; a device pytree, donated from step to step."""

    keys: Any  # [L, B, K, H, S] compute dtype
    values: Any  # [L, B, K, S, H] compute dtype

    @property
    def max_tokens(self) -> int:
        """S."""
        return self.keys.shape[-1]


def init_cache(config: ModelConfig, slots: int, max_tokens: int, dtype: Any) -> KVCache:
    """An empty cache for `slots` slots of `max_tokens` tokens: 2 L B K H S values of `dtype`."""
    lead = (config.num_layers, slots, config.num_kv_heads)
    return KVCache(
        keys=jnp.zeros((*lead, config.head_size, max_tokens), dtype),
        values=jnp.zeros((*lead, max_tokens, config.head_size), dtype),
    )


def insert_prompts(
    cache: KVCache, keys: jax.Array, values: jax.Array, rows: jax.Array, slots: jax.Array
) -> KVCache:
    """Copy prompt row rows[i] of a prefill into slot slots[i], for i < Nb; a slot outside 0..B-1 is dropped.

    keys [L, P, K, H, T], values [L, P, K, T, H] with T <= S, as `models.decoder.prefill` returns them.
    Raises: ValueError if the prompts are longer than the cache.
    """
    tokens = keys.shape[-1]
    if tokens > cache.max_tokens:
        raise ValueError(
            f"prompts of {tokens} tokens do not fit a cache of {cache.max_tokens}; "
            f"make the cache at least {tokens} tokens long, or the prompts shorter"
        )
    slots = jnp.where(slots < 0, cache.keys.shape[1], slots)  # a negative index would count from the end
    keys = jnp.take(keys, rows, axis=1).astype(cache.keys.dtype)
    values = jnp.take(values, rows, axis=1).astype(cache.values.dtype)
    return KVCache(
        keys=cache.keys.at[:, slots, :, :, :tokens].set(keys, mode="drop"),
        values=cache.values.at[:, slots, :, :tokens].set(values, mode="drop"),
    )
