"""Prompts whose keys and values are held once for all slots that sample them.

A row holds one prompt but its last token, which is the first that a slot decodes; a slot's own cache begins
there. Up to C slots read a row, each in a lane of it: their queries meet the row's keys in one product, which
reads these once. Slots need not stand together, since the lanes are a table. What a query sees in its row and
in its own cache is joined exactly by the sums of the exponentials (arXiv:2205.14135 section 3.1).
Letters: B slots, R rows, C lanes of a row, S cached tokens of a slot, P of a row, L layers, K kv heads, G query
heads per kv head, H head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from models.attention import DecodeAttention, Partial, joined, partial_attention
from models.attention_kernels import on_each_device
from models.cache import KVCache, init_cache, insert_prompts, read_of, replace_start
from models.config import ModelConfig
from models.rows import PrefixRows
from models.stored import Stored, num_tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class Prefixes:
    """The rows and who reads them; a device pytree. Where slots are split over devices, rows are too, and a
    slot reads a row of its own device."""

    cache: KVCache  # R rows of P tokens
    lengths: Any  # [R] int32, tokens of a row that may be seen
    members: Any  # [R, C] int32, the slot in each lane; B: none
    lanes: Any  # [B] int32, row * C + lane of each slot
    starts: Any  # [B] int32, tokens of a slot's sequence that stand in its row


def init_prefixes(
    config: ModelConfig, table: PrefixRows, slots: int, dtype: Any, attention: DecodeAttention
) -> Prefixes:
    """Empty rows, laid out as `models.cache.init_cache` does."""
    return Prefixes(
        cache=init_cache(config, table.rows, table.tokens, dtype, attention),
        lengths=jnp.zeros(table.rows, jnp.int32),
        members=jnp.full((table.rows, table.lanes), slots, jnp.int32),
        lanes=jnp.zeros(slots, jnp.int32),
        starts=jnp.zeros(slots, jnp.int32),
    )


def fill_rows(
    prefixes: Prefixes, prefilled: tuple[jax.Array, jax.Array], lengths: jax.Array,
    sources: jax.Array, rows: jax.Array,
) -> Prefixes:  # fmt: skip
    """Row rows[i] with prompt sources[i] of a prefill, lengths [prompts]; a row outside 0..R-1 is dropped."""
    return replace(
        prefixes,
        cache=insert_prompts(prefixes.cache, *prefilled, rows=sources, slots=rows),
        lengths=prefixes.lengths.at[rows].set(lengths[sources] - 1, mode="drop"),
    )


def prefixed_attention(
    q: jax.Array, prefixes: Prefixes, layer: int, keys: tuple[Stored, ...],
    values: tuple[Stored, ...], own: jax.Array,
) -> jax.Array:  # fmt: skip
    """One query per slot, q [B, K, G, H], over its row and the slot's own keys 0..own[b] -> [B, K, G, H].

    keys and values are one layer's segments of the slots' own cache.
    """
    with jax.named_scope("cached_attention"):
        seen = jnp.arange(sum(map(num_tokens, values)))[None, :] <= own[:, None]
        alone = partial_attention(q, keys, values, seen)
        rows = prefixes.cache
        of_rows = tuple(read_of(held[layer], rows.prefix) for held in (rows.keys, rows.values))
        tables = (prefixes.members, prefixes.lanes, prefixes.lengths)
        shared: Any = on_each_device(_over_rows, (q, *of_rows), tables, head_dim=1)
        return joined(alone, shared).astype(q.dtype)


def _over_rows(
    q: jax.Array, keys: tuple[Stored, ...], values: tuple[Stored, ...], members: jax.Array,
    lanes: jax.Array, lengths: jax.Array,
) -> Partial:  # fmt: skip
    """What each slot's query [B, K, G, H] makes of its row, on one device's slots and rows."""
    slots, k, g, h = q.shape
    rows, columns = members.shape
    asked = jnp.take(q, members.reshape(-1) % slots, axis=0, mode="clip")  # no slot: asks anything
    asked = asked.reshape(rows, columns, k, g, h).swapaxes(1, 2).reshape(rows, k, columns * g, h)
    seen = jnp.arange(sum(map(num_tokens, values)))[None, :] < lengths[:, None]
    found = partial_attention(asked, keys, values, seen)

    def to_slots(x: jax.Array) -> jax.Array:  # [R, K, C G, ...] -> [B, K, G, ...]
        x = x.reshape(rows, k, columns, g, *x.shape[3:]).swapaxes(1, 2)
        x = x.reshape(rows * columns, *x.shape[2:])
        return jnp.take(x, lanes % (rows * columns), axis=0, mode="clip")

    return Partial(*map(to_slots, found))


def replace_sequences(
    prefixes: Prefixes, cache: KVCache, keys: jax.Array, values: jax.Array
) -> tuple[Prefixes, KVCache]:
    """Rows and own caches made anew from whole sequences: keys and values [L, B, K, T, H] of every slot.

    A row is that of any of its slots; rows without a slot are left undefined.
    """
    slots, tokens = keys.shape[1], keys.shape[3]
    places = prefixes.starts[:, None] + jnp.arange(cache.max_tokens)[None]
    places = jnp.minimum(places, tokens - 1)[None, :, None, :, None]
    own = (jnp.take_along_axis(x, places, axis=3) for x in (keys, values))
    reader = jnp.minimum(jnp.min(prefixes.members, axis=1), slots - 1)
    length = prefixes.cache.max_tokens
    rows = (jnp.take(x, reader, axis=1)[:, :, :, :length] for x in (keys, values))
    made = replace(prefixes, cache=replace_start(prefixes.cache, *rows))
    return made, replace_start(cache, *own)
