"""Keys and values of the slots that are being decoded.

Layout, per layer and segment of s tokens, for decode attention by
    blocks         keys [B, K, s/KEY_BLOCK, H, KEY_BLOCK], so that the key index is last within a block, and
                   values [B, K, s, H]. Both products of decode attention are then batched [G, .] x [., at
                   most 64] matrix products that read the cache front to back once; a wider right side or the
                   other order costs three to four times as much on CPU
    xla            keys and values [B, K, S, H] in one segment, of which products read a prefix: a GPU's
                   kernels slice their operand as they read, and one array needs one kernel per use
    cudnn, pallas  the same: these kernels stop at a slot's own position
Layers and segments are separate arrays: on a CPU a slice of a larger array would be copied in every decode
step, so decode is given the first segments alone, as many as the longest live sequence needs. A slot's entries
past its own position hold leftovers; they are overwritten before they can be seen. Numbers of 8 bits stand
beside a scale per head and token (`models.stored`): quantised when written, used in attention as they are.
Letters: B slots, S cached tokens, L layers, J segments, K kv heads, H head size, P prompts, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from models.attention import DecodeAttention
from models.config import ModelConfig
from models.stored import Scaled, Stored, dtype_of, is_scaled, num_tokens, scaled

KEY_BLOCK = 32
"""Tokens per block of keys [tokens]; the capacity of a cache is a multiple of it."""
SEGMENTS = 4
"""Prefixes of a cache of which attention reads one: it has at most as many segments, or one array."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class KVCache:
    """Keys and values of B slots of S tokens each; a device pytree, donated from step to step."""

    keys: Any  # L x J x Stored [B, K, s/KEY_BLOCK, H, KEY_BLOCK] or [B, K, s, H]
    values: Any  # L x J x Stored [B, K, s, H]
    prefix: int | None = field(default=None, metadata={"static": True})
    """Tokens of the only segment that products read; None: all segments, or a kernel that stops by itself."""

    @property
    def segments(self) -> tuple[int, ...]:
        """Tokens of each segment."""
        return tuple(num_tokens(values) for values in self.values[0])

    @property
    def max_tokens(self) -> int:
        """S, the tokens that a slot has room for, or that are read of it."""
        return sum(self.segments) if self.prefix is None else self.prefix


def _round_up(tokens: int, multiple: int) -> int:
    return -(-tokens // multiple) * multiple


def segment_sizes(max_tokens: int, segments: int = SEGMENTS) -> tuple[int, ...]:
    """Tokens of each segment of a cache for max_tokens: at most `segments` equal ones, the last one
    shorter, each a multiple of KEY_BLOCK."""
    capacity = _round_up(max_tokens, KEY_BLOCK)
    size = _round_up(-(-capacity // segments), KEY_BLOCK)
    return tuple(min(size, capacity - start) for start in range(0, capacity, size))


def init_cache(
    config: ModelConfig, slots: int, max_tokens: int, dtype: Any,
    attention: DecodeAttention = "blocks",
) -> KVCache:  # fmt: skip
    """An empty cache for `slots` slots of at least `max_tokens` tokens (rounded up to KEY_BLOCK), laid out
    for decode attention by `attention`; dtype int8 or float8_e4m3fn: with scales."""
    lead, h = (slots, config.num_kv_heads), config.head_size
    sizes = segment_sizes(max_tokens, SEGMENTS if attention == "blocks" else 1)

    def zeros(size: int, shape: tuple[int, ...]) -> Stored:
        numbers = jnp.zeros((*lead, *shape), dtype)
        scale = jnp.zeros((*lead, size), jnp.float32)
        return Scaled(numbers, scale) if is_scaled(dtype) else numbers

    def key_shape(size: int) -> tuple[int, ...]:
        return (size // KEY_BLOCK, h, KEY_BLOCK) if attention == "blocks" else (size, h)

    layers = range(config.num_layers)
    return KVCache(
        keys=tuple(tuple(zeros(size, key_shape(size)) for size in sizes) for _ in layers),
        values=tuple(tuple(zeros(size, (size, h)) for size in sizes) for _ in layers),
        prefix=sizes[0] if attention == "xla" else None,
    )


def _in_blocks(x: jax.Array) -> jax.Array:
    """Keys [B, K, T, H] as [B, K, T'/KEY_BLOCK, H, KEY_BLOCK], zeros past T."""
    b, k, t, h = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, _round_up(t, KEY_BLOCK) - t), (0, 0)))
    return x.reshape(b, k, -1, KEY_BLOCK, h).swapaxes(3, 4)


def _stored_as(x: jax.Array, like: Stored) -> Stored:
    """Keys or values [B, K, T, H] in the type and layout of a segment."""
    numbers, scale = x, None
    if isinstance(like, Scaled):
        numbers, scale = scaled(x, dtype_of(like))
    held = like.numbers if isinstance(like, Scaled) else like
    numbers = (_in_blocks(numbers) if held.ndim == 5 else numbers).astype(held.dtype)
    return numbers if scale is None else Scaled(numbers, scale)


def write_token(
    keys: tuple[Stored, ...],
    values: tuple[Stored, ...],
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
) -> tuple[tuple[Stored, ...], tuple[Stored, ...]]:
    """One layer's segments with k and v [B, K, H] of slot b at positions[b]; positions past S are
    dropped."""
    start = 0
    written_keys, written_values = [], []
    for key, value in zip(keys, values, strict=True):
        size = num_tokens(value)
        # before this segment would count from its end: name the end instead, which is dropped
        at = jnp.where(positions >= start, positions - start, size)
        written_keys.append(_with_token(key, k, at))
        written_values.append(_with_token(value, v, at))
        start += size
    return tuple(written_keys), tuple(written_values)


def _with_token(segment: Stored, x: jax.Array, at: jax.Array) -> Stored:
    """The segment with x [B, K, H] of slot b at its token at[b].

    Slot by slot under vmap: a list of slots as index would send every write to every device.
    """
    if isinstance(segment, Scaled):
        numbers, scale = scaled(x, dtype_of(segment))
        return Scaled(_with_token(segment.numbers, numbers, at), _set(segment.scale, scale, at))
    return _set(segment, x.astype(segment.dtype), at)


def _set(held: jax.Array, x: jax.Array, at: jax.Array) -> jax.Array:
    """Numbers or scales with x [B, K, ...] of slot b at its token at[b]; past the end: dropped."""
    if held.ndim == 5:
        return jax.vmap(lambda h, new, t: h.at[:, t // KEY_BLOCK, :, t % KEY_BLOCK].set(new))(
            held, x, at
        )
    return jax.vmap(lambda h, new, t: h.at[:, t].set(new))(held, x, at)


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
    held = jax.tree.leaves(cache.values)[0].shape[0]
    slots = jnp.where(slots < 0, held, slots)  # negative would count from the end

    def enter(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[slots, :, : new.shape[2]].set(new[rows], mode="drop")

    return _replace_start(cache, keys, values, enter)


def replace_start(cache: KVCache, keys: jax.Array, values: jax.Array) -> KVCache:
    """The cache with the first tokens of every slot replaced by a prefill's keys and values.

    keys and values [L, B, K, T, H]; what stands past them stays.
    """

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[:, :, : new.shape[2]].set(new)

    return _replace_start(cache, keys, values, write)


def _replace_start(
    cache: KVCache, keys: jax.Array, values: jax.Array,
    write: Callable[[jax.Array, jax.Array], jax.Array],
) -> KVCache:  # fmt: skip
    """write(array of a segment, its part of `keys` or `values`) for every segment that they reach."""

    def layer(old: tuple[Stored, ...], new: jax.Array) -> tuple[Stored, ...]:
        written, rest = [], _stored_as(new, old[0])
        for segment in old:
            part = jax.tree.map(lambda held, x: x[:, :, : held.shape[2]], segment, rest)
            rest = jax.tree.map(lambda held, x: x[:, :, held.shape[2] :], segment, rest)
            reached = num_tokens_of(part) > 0
            written.append(jax.tree.map(write, segment, part) if reached else segment)
        return tuple(written)

    return replace(
        cache, keys=tuple(map(layer, cache.keys, keys)), values=tuple(map(layer, cache.values, values))
    )  # fmt: skip


def num_tokens_of(part: Stored) -> int:
    """Tokens or blocks of a part of keys or values."""
    return jax.tree.leaves(part)[0].shape[2]


def split_cache(cache: KVCache, tokens: int) -> tuple[KVCache, KVCache]:
    """The first segments, enough for `tokens` tokens (at most all), and the others; of a cache in one array
    all of it, to be read so far, and nothing. Copies nothing.

    Decode reads all of the cache it is given: a caller whose longest sequence stays below `tokens`
    gives it the first part, and joins both after.
    """
    sizes = cache.segments if cache.prefix is None else segment_sizes(cache.segments[0])
    count, held = 0, 0
    while held < tokens and count < len(sizes):
        held += sizes[count]
        count += 1
    if cache.prefix is not None:
        nothing = tuple(() for _ in cache.keys)
        return replace(cache, prefix=held), KVCache(keys=nothing, values=nothing)
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
    if first.prefix is not None:
        return replace(first, prefix=first.segments[0])
    return KVCache(
        keys=tuple(map(tuple.__add__, first.keys, rest.keys)),
        values=tuple(map(tuple.__add__, first.values, rest.values)),
    )


def read_of(layer: tuple[Stored, ...], prefix: int | None) -> tuple[Stored, ...]:
    """One layer's segments of keys or values, of the only one the first `prefix` tokens (None: all)."""
    if prefix is None:
        return layer
    return tuple(jax.tree.map(lambda x: x[:, :, :prefix], held) for held in layer)
