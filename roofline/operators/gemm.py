"""Seconds of one matrix product on one GPU. Standard library only.

[m, k] x [k, n] runs as ceil(m / bm) ceil(n / bn) tiles, each optionally cut into `split` parts
along k, dealt to the multiprocessors in waves. The library picks tile and split; the model takes
the pair that its own terms make fastest:

    waves    = (1 - q) x + q ceil(x)   with x = tiles * split / SMs, at least 1
    compute  = waves * 2 bm bn (k / split + fill) / (ec * tile share * C / SMs)
    reduce   = 8 m n split / (er W)    partial sums in float32 written and read, when split > 1
    throttle = 1 + g log10(flops / 1e11) above 1e11 flops: long products lower the clock
    memory   = (w k n + v (m k + m n)) / (em W)
    seconds  = t0 + ((throttle (compute + reduce))^p + memory^p)^(1/p)

with C, W the peaks. q < 1 because persistent kernels and stream-K fill part of the last wave; p
says how well compute and memory overlap (1: not at all, large: perfectly).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from roofline.hardware import DTYPE_BYTES, Hardware

TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
"""Rows and columns of a tile, as CUTLASS and cuBLAS kernels of Ampere and Hopper have them."""
SPLITS = (1, 2, 3, 4, 6, 8)
"""Parts that the summed dimension is cut into."""
LARGEST_TILE = TILES[0][0] * TILES[0][1]
THROTTLE_FLOPS = 1e11
"""Work above which a product lasts long enough for the power limit to act."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmCoefficients:
    """What a stack's matrix products reach on one GPU; see the module's formula."""

    fixed_s: float
    """t0: launch, prologue and tail of one kernel [s]."""
    compute: float
    """ec: share of the dense peak that a busy multiprocessor reaches, in (0, 1]."""
    memory: float
    """em: share of the memory bandwidth, in (0, 1]."""
    quantisation: float
    """q: how much of an unfilled last wave is lost, in [0, 1]."""
    overlap: float
    """p: exponent that joins compute and memory, at least 1."""
    half_tile: float
    """Share of ec that is left each time a tile has half the area, in (0, 1]."""
    fill_k: float
    """Values of k that filling and draining a tile's pipeline costs."""
    reduction: float
    """er: share of the memory bandwidth that partial sums move at (above 1: they stay in L2)."""
    throttle: float
    """g: slowdown per factor of ten in flops, at least 0."""


def gemm_s(
    coefficients: GemmCoefficients,
    hardware: Hardware,
    *,
    m: int,
    n: int,
    k: int,
    dtype: str = "bfloat16",
    weight_dtype: str | None = None,
) -> float:
    """Seconds of [m, k] x [k, n] in `dtype`, the [k, n] operand stored in `weight_dtype`.

    Results and the left operand are counted in bfloat16 when `dtype` is narrower: kernels read
    quantised activations, and write results, in 16 bits.

    Raises:
        ValueError: a size below 1, an unknown dtype, or hardware without multiprocessors.
    """
    if min(m, n, k) < 1:
        raise ValueError(f"a product needs sizes of at least 1, got m={m}, n={n}, k={k}")
    peak, sms = hardware.peak(dtype), multiprocessors(hardware)
    c = coefficients
    slowdown = 1 + c.throttle * max(0.0, math.log10(2.0 * m * n * k / THROTTLE_FLOPS))
    compute_s = slowdown * min(
        _tiled_s(
            c, tile, split, m, n, k,
            sms=sms, sm_flops_per_s=peak / sms, hbm_bytes_per_s=hardware.hbm_bytes_per_s,
        )
        for tile in TILES
        for split in SPLITS
    )  # fmt: skip
    memory_s = gemm_bytes(m, n, k, dtype, weight_dtype) / (c.memory * hardware.hbm_bytes_per_s)
    return c.fixed_s + joined(compute_s, memory_s, exponent=c.overlap)


def gemm_bytes(m: int, n: int, k: int, dtype: str, weight_dtype: str | None = None) -> float:
    """Bytes of one product: both operands read once, the result written once, in 16 bits."""
    activation_bytes = max(2, DTYPE_BYTES[dtype])
    return float(DTYPE_BYTES[weight_dtype or dtype] * n * k + activation_bytes * (m * k + m * n))


def gemm_bound_s(hardware: Hardware, *, m: int, n: int, k: int, dtype: str = "bfloat16") -> float:
    """The book's lower bound: max(2 m n k / C, bytes / W), every operand in `dtype`."""
    bytes_moved = DTYPE_BYTES[dtype] * (m * k + k * n + m * n)
    return max(2.0 * m * n * k / hardware.peak(dtype), bytes_moved / hardware.hbm_bytes_per_s)


def multiprocessors(hardware: Hardware) -> int:
    """Multiprocessors of a GPU.

    Raises:
        ValueError: the hardware description has none (a CPU, or an old calibration).
    """
    if hardware.num_sms < 1:
        raise ValueError(
            f"hardware {hardware.name!r} has num_sms={hardware.num_sms}: operator models need a "
            "GPU whose multiprocessors are known; use a datasheet, or calibrate on that GPU"
        )
    return hardware.num_sms


def joined(*terms_s: float, exponent: float) -> float:
    """(sum of t^p)^(1/p): the sum for p = 1, the maximum for p without limit."""
    longest = max(terms_s)
    if longest == 0:
        return 0.0
    return longest * sum((term / longest) ** exponent for term in terms_s) ** (1 / exponent)


def _tiled_s(
    c: GemmCoefficients,
    tile: tuple[int, int],
    split: int,
    m: int,
    n: int,
    k: int,
    *,
    sms: int,
    sm_flops_per_s: float,
    hbm_bytes_per_s: float,
) -> float:
    """Compute and reduction time with one tile and one split of k [s]."""
    rows, columns = tile
    filled = -(-m // rows) * -(-n // columns) * split / sms
    waves = max(1.0, (1 - c.quantisation) * filled + c.quantisation * math.ceil(filled))
    share = c.compute * c.half_tile ** math.log2(LARGEST_TILE / (rows * columns))
    tile_flops = 2.0 * rows * columns * (k / split + c.fill_k)
    reduced_bytes = 8.0 * m * n * split if split > 1 else 0.0
    return waves * tile_flops / (share * sm_flops_per_s) + reduced_bytes / (
        c.reduction * hbm_bytes_per_s
    )
