"""Keys and values of the slots that are being decoded.

Layout, per layer and segment of s tokens: keys [B, K, s/KEY_BLOCK, H, KEY_BLOCK], so that the key index
is last within a block, and values [B, K, s, H]. Both products of decode attention are then batched
[G, .] x [., at most 64] matrix products that read the cache front to back once; a wider right side or
the other order costs three to four times as much on CPU. Layers and segments are separate arrays: a
slice of a larger array would be copied in every decode step, so decode is given the first segments
alone, as many as the longest live sequence needs. A slot's entries past its own position hold
leftovers; they are overwritten before they can be seen.
Letters: B slots, S cached tokens, L layers, J segments, K kv heads, H head size, P prompts, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from models.config import ModelConfig

Write = Callable[[jax.Array, jax.Array], jax.Array]

KEY_BLOCK = 32
"""Tokens per block of keys [tokens]; the capacity of a cache is a multiple of it."""


SEGMENTS = 4
"""Most segments of a cache: attention reads one of so many prefixes."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class KVCache:
    """Keys and values of B slots of S tokens each; a device pytree, donated from step to step."""

    keys: Any  # L x J x [B, K, s/KEY_BLOCK, H, KEY_BLOCK] compute dtype
    values: Any  # L x J x [B, K, s, H] compute dtype

    @property
    def segments(self) -> tuple[int, ...]:
        """Tokens of each segment."""
        return tuple(values.shape[2] for values in self.values[0])

    @property
    def max_tokens(self) -> int:
        """S, the tokens a slot has room for."""
        return sum(self.segments)


def _round_up(tokens: int, multiple: int) -> int:
    return -(-tokens // multiple) * multiple


def segment_sizes(max_tokens: int) -> tuple[int, ...]:
    """Tokens of each segment of a cache for max_tokens: at most SEGMENTS equal ones, the last one
    shorter, each a multiple of KEY_BLOCK."""
    capacity = _round_up(max_tokens, KEY_BLOCK)
    size = _round_up(-(-capacity // SEGMENTS), KEY_BLOCK)
    return tuple(min(size, capacity - start) for start in range(0, capacity, size))


def init_cache(config: ModelConfig, slots: int, max_tokens: int, dtype: Any) -> KVCache:
    """An empty cache for `slots` slots of at least `max_tokens` tokens (rounded up to
    KEY_BLOCK)."""
    lead, h = (slots, config.num_kv_heads), config.head_size
    sizes, layers = segment_sizes(max_tokens), range(config.num_layers)
    keys = [(*lead, size // KEY_BLOCK, h, KEY_BLOCK) for size in sizes]
    values = [(*lead, size, h) for size in sizes]
    return KVCache(
        keys=tuple(tuple(jnp.zeros(shape, dtype) for shape in keys) for _ in layers),
        values=tuple(tuple(jnp.zeros(shape, dtype) for shape in values) for _ in layers),
    )


def block_keys(keys: jax.Array) -> jax.Array:
    """Keys [B, T, K, H] in the cache's layout [B, K, T'/KEY_BLOCK, H, KEY_BLOCK], zeros past T."""
    b, t, k, h = keys.shape
    keys = jnp.pad(keys, ((0, 0), (0, _round_up(t, KEY_BLOCK) - t), (0, 0), (0, 0)))
    return keys.reshape(b, -1, KEY_BLOCK, k, h).transpose(0, 3, 1, 4, 2)


def write_token(
    keys: tuple[jax.Array, ...],
    values: tuple[jax.Array, ...],
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """One layer's segments with k and v [B, K, H] of slot b at positions[b]; positions past S are
    dropped."""
    slots, start = jnp.arange(positions.shape[0]), 0
    written_keys, written_values = [], []
    for key, value in zip(keys, values, strict=True):
        size = value.shape[2]
        # before this segment would count from its end: name the end instead, which is dropped
        at = jnp.where(positions >= start, positions - start, size)
        block, offset = at // KEY_BLOCK, at % KEY_BLOCK
        written_keys.append(key.at[slots, :, block, :, offset].set(k.astype(key.dtype)))
        written_values.append(value.at[slots, :, at].set(v.astype(value.dtype)))
        start += size
    return tuple(written_keys), tuple(written_values)


def insert_prompts(
    cache: KVCache, keys: jax.Array, values: jax.Array, rows: jax.Array, slots: jax.Array
) -> KVCache:
    """Copy prompt row rows[i] of a prefill into slot slots[i], for i < Nb; a slot outside 0..B-1 is
    dropped.

    keys and values as `models.decoder.prefill` returns them, stacked over L.
    Raises: ValueError if the prompts are longer than the cache.
    """
    tokens = values.shape[3]
    if tokens > cache.max_tokens:
        raise ValueError(
            f"prompts of {tokens} tokens do not fit a cache of {cache.max_tokens}; "
            f"make the cache at least {tokens} tokens long, or the prompts shorter"
        )
    slots = jnp.where(
        slots < 0, cache.values[0][0].shape[0], slots
    )  # negative would count from the end

    def enter(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[slots, :, : new.shape[2]].set(new[rows].astype(old.dtype), mode="drop")

    return _replace_start(cache, keys, values, enter)


def replace_start(cache: KVCache, keys: jax.Array, values: jax.Array) -> KVCache:
    """The cache with the first tokens of every slot replaced by a prefill's keys and values.

    keys [L, B, K, n, H, KEY_BLOCK] and values [L, B, K, T, H]; what stands past them stays.
    """

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[:, :, : new.shape[2]].set(new.astype(old.dtype))

    return _replace_start(cache, keys, values, write)


def _replace_start(cache: KVCache, keys: jax.Array, values: jax.Array, write: Write) -> KVCache:
    """write(segment, its part of `keys` or `values`) for every segment that they reach."""

    def layer(old: tuple[jax.Array, ...], new: jax.Array) -> tuple[jax.Array, ...]:
        written, start = [], 0
        for segment in old:
            part = new[:, :, start : start + segment.shape[2]]
            written.append(write(segment, part) if part.shape[2] else segment)
            start += segment.shape[2]
        return tuple(written)

    return KVCache(
        keys=tuple(map(layer, cache.keys, keys)), values=tuple(map(layer, cache.values, values))
    )


def split_cache(cache: KVCache, tokens: int) -> tuple[KVCache, KVCache]:
    """The first segments, enough for `tokens` tokens (at most all), and the others. Copies nothing.

    Decode reads all of the cache it is given: a caller whose longest sequence stays below `tokens`
    gives it the first part, and joins both after.
    """
    count, held = 0, 0
    while held < tokens and count < len(cache.segments):
        held += cache.segments[count]
        count += 1
    first = KVCache(
        keys=tuple(layer[:count] for layer in cache.keys),
        values=tuple(layer[:count] for layer in cache.values),
    )
    rest = KVCache(
        keys=tuple(layer[count:] for layer in cache.keys),
        values=tuple(layer[count:] for layer in cache.values),
    )
    return first, rest


def join_cache(first: KVCache, rest: KVCache) -> KVCache:
    """The inverse of `split_cache`."""
    return KVCache(
        keys=tuple(map(tuple.__add__, first.keys, rest.keys)),
        values=tuple(map(tuple.__add__, first.values, rest.values)),
    )
