"""Seconds of attention on one GPU: causal prefill and one decode step. Standard library only.

Both run as tiles dealt to the multiprocessors; both measured stacks also write the new keys and
values into a paged cache, which costs time per token and per byte.

Prefill of `batch` prompts of T tokens, query tiles of 128 rows, C and W the peaks:

    tile row  = time of 128 queries against one key = 4 * 128 H / (ec C / SMs)
    compute   = tile row * max(keys / SMs + q longest, longest)
                keys    = sum over prompts, heads and query tiles of the causal keys + fill
                longest = T rounded up to 128, + fill: the last query tile of a prompt
    memory    = 2 * 2 B T H (N + K) / (em W)         queries, keys, values, outputs
    seconds   = t0 + (compute^p + memory^p)^(1/p) + token_s B T + kv_copies * 4 B T K H / W

Decode over S cached keys, work = B K pairs of sequence and kv head, cut into `split` parts of S:

    memory    = bytes / W * (miss / em + (1 - miss) / l2)
                miss  = 1 / (1 + (cached share * L2 / bytes)^4): a warm L2 holds a small cache
    chain     = max(1, work * split / (2 SMs)) * (S rounded up to 128) / split * key_s
    seconds   = t0 + sequence_s B + [split > 1] (split_s + part_s split)
              + (memory^p + (pair_s work)^p + chain^p)^(1/p)

The kernel picks the split; the model takes the fastest. `warm_l2=False` asks for the time inside a
model, where other layers push the cache out of L2 between two calls.
"""

from __future__ import annotations

from dataclasses import dataclass

from roofline.hardware import DTYPE_BYTES, Hardware
from roofline.operators.gemm import joined, multiprocessors

TILE = 128
"""Queries, and keys, of one tile of a flash attention kernel (arXiv:2407.08608, section 3)."""
MISS_SHARPNESS = 4
"""How sharply a working set falls out of L2 as it outgrows it."""
MAX_SPLITS = 128
"""Most parts that flash-decoding cuts the keys into (Dao-AILab/flash-attention num_splits)."""
BLOCKS_PER_SM = 2
"""Blocks of a decode kernel that share one multiprocessor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillCoefficients:
    """What a stack's causal prefill kernel reaches on one GPU; see the module's formula."""

    fixed_s: float
    """t0 [s]."""
    compute: float
    """ec at head size 128, share of the dense peak, in (0, 1]."""
    narrow: float
    """Share of ec that is left at head size 64, in (0, 1]."""
    memory: float
    """em, in (0, 1]."""
    imbalance: float
    """q: part of the longest tile row that other multiprocessors wait for, in [0, 1]."""
    overlap: float
    """p, at least 1."""
    fill_keys: float
    """Keys that starting a query tile costs."""
    token_s: float
    """Per token: writing the paged cache [s]."""
    kv_copies: float
    """Times that the new keys and values move through memory besides the kernel's own read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeCoefficients:
    """What a stack's decode attention reaches on one GPU; see the module's formula."""

    fixed_s: float
    """t0 [s]."""
    memory: float
    """em, in (0, 1]."""
    pair_s: float
    """Time of one (sequence, kv head) pair, over all multiprocessors [s]."""
    sequence_s: float
    """Time per sequence: its metadata and its new key and value [s]."""
    overlap: float
    """p, at least 1."""
    l2_speed: float
    """Rate of a working set that stays in L2, in memory bandwidths, at least 1."""
    l2_share: float
    """Part of L2 that one working set can use."""
    key_s: float
    """Time per key of one block at head size 128 [s]."""
    split_s: float
    """Fixed time of the second kernel that joins the parts [s]."""
    part_s: float
    """Time per part [s]."""
    splits_mha: bool
    """Whether the keys are split when there are as many kv heads as query heads."""


def prefill_s(
    coefficients: PrefillCoefficients,
    hardware: Hardware,
    *,
    batch: int,
    tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    dtype: str = "bfloat16",
) -> float:
    """Seconds of causal attention of `batch` prompts of `tokens` tokens, one layer, one device."""
    c, sms = coefficients, multiprocessors(hardware)
    value_bytes = DTYPE_BYTES[dtype]
    tiles = -(-tokens // TILE)
    keys = batch * num_heads * (TILE * tiles * (tiles + 1) / 2 + tiles * c.fill_keys)
    longest = TILE * tiles + c.fill_keys
    share = c.compute * (c.narrow if head_size <= 64 else 1.0)
    row_s = 4.0 * TILE * head_size * sms / (share * hardware.peak(dtype))
    compute_s = row_s * max(keys / sms + c.imbalance * longest, longest)
    moved = 2.0 * value_bytes * batch * tokens * head_size * (num_heads + num_kv_heads)
    memory_s = moved / (c.memory * hardware.hbm_bytes_per_s)
    copied = 2.0 * value_bytes * batch * tokens * head_size * num_kv_heads
    return (
        c.fixed_s
        + joined(compute_s, memory_s, exponent=c.overlap)
        + c.token_s * batch * tokens
        + c.kv_copies * copied / hardware.hbm_bytes_per_s
    )


def prefill_bound_s(
    hardware: Hardware,
    *,
    batch: int,
    tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    dtype: str = "bfloat16",
) -> float:
    """The book's lower bound: causal flops 2 B N H T^2 at C, or queries, keys, values and outputs
    at W (transformers chapter)."""
    moved = 2.0 * DTYPE_BYTES[dtype] * batch * tokens * head_size * (num_heads + num_kv_heads)
    return max(
        prefill_flops(batch, tokens, num_heads, head_size) / hardware.peak(dtype),
        moved / hardware.hbm_bytes_per_s,
    )


def prefill_flops(batch: int, tokens: int, num_heads: int, head_size: int) -> float:
    """Causal flops of one layer: half of 4 B N H T^2."""
    return 2.0 * batch * num_heads * head_size * tokens**2


def decode_s(
    coefficients: DecodeCoefficients,
    hardware: Hardware,
    *,
    batch: int,
    kv_len: float,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    kv_dtype: str = "bfloat16",
    warm_l2: bool = True,
) -> float:
    """Seconds of one token of attention for `batch` sequences over `kv_len` cached keys each, one
    layer, one device."""
    c, sms = coefficients, multiprocessors(hardware)
    moved = decode_bytes(batch, kv_len, num_heads, num_kv_heads, head_size, kv_dtype)
    cached = c.l2_share * hardware.l2_bytes if warm_l2 else 0.0
    miss = 1 / (1 + (cached / moved) ** MISS_SHARPNESS)
    memory_s = moved / hardware.hbm_bytes_per_s * (miss / c.memory + (1 - miss) / c.l2_speed)
    work = batch * num_kv_heads
    blocks = max(1, -(-int(kv_len) // TILE))
    splittable = c.splits_mha or num_heads > num_kv_heads
    parts = {1 << i for i in range(8)} if splittable else {1}
    parts = [part for part in parts if part <= min(blocks, MAX_SPLITS)]
    key_s = c.key_s * head_size / 128

    def with_parts(part: int) -> float:
        waves = max(1.0, work * part / (BLOCKS_PER_SM * sms))
        chain_s = waves * -(-blocks // part) * TILE * key_s
        extra_s = c.split_s + c.part_s * part if part > 1 else 0.0
        return extra_s + joined(memory_s, c.pair_s * work, chain_s, exponent=c.overlap)

    return c.fixed_s + c.sequence_s * batch + min(map(with_parts, parts))


def decode_bytes(
    batch: int,
    kv_len: float,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    kv_dtype: str = "bfloat16",
) -> float:
    """Cached keys and values read, queries read and outputs written in 16 bits: 2 B S K H + 2 B N H
    values."""
    cache = 2.0 * DTYPE_BYTES[kv_dtype] * batch * kv_len * num_kv_heads * head_size
    return cache + 4.0 * batch * num_heads * head_size


def decode_bound_s(
    hardware: Hardware,
    *,
    batch: int,
    kv_len: float,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    kv_dtype: str = "bfloat16",
) -> float:
    """The book's lower bound: max(4 B S N H / C, bytes / W) (inference chapter)."""
    moved = decode_bytes(batch, kv_len, num_heads, num_kv_heads, head_size, kv_dtype)
    flops = 4.0 * batch * kv_len * num_heads * head_size
    return max(flops / hardware.peak("bfloat16"), moved / hardware.hbm_bytes_per_s)
