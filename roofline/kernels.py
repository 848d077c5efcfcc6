"""Kernels that programs are made of: products, passes over memory, collectives. Standard library
only.

A `Work` is a sum of kernels on one device. Flops are those of matrix products; bytes count each
operand of each kernel once. Formulas: scaling book (jax-ml.github.io/scaling-book), roofline,
sharding and gpus chapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from models.config import ModelConfig
from models.rows import RowAttention
from roofline.hardware import DTYPE_BYTES
from roofline.phases import Phase, PhaseCost

FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How one program is spread over its devices, and in which types."""

    data: int = 1
    """Replicas of the parameters; rows are split over them."""
    fsdp: int = 1
    """Devices the parameters are sharded over and gathered from at use; rows are split over
    them too."""
    tensor: int = 1
    """Tensor parallel devices: heads, ffw and vocabulary are split over them."""
    expert: int = 1
    """Of the devices that rows are split over, how many each layer's experts are dealt to; tokens
    then go to their experts and back by all-to-all."""
    compute_dtype: str = "float32"
    """Type of the matrix products and of their operands."""
    param_dtype: str = "float32"
    """Type the parameters are stored in: float32 on the learner, the compute type in a rollout
    snapshot."""
    kv_dtype: str = "float32"
    """Type of cached keys and values."""
    attention: RowAttention = "blocks"
    """Program of attention in packed rows and prompts."""
    kv_scale_bytes: int = 0
    """Bytes of the scale that stands beside the cached key, and the value, of each head and token."""
    copies_weights: bool = True
    """Decode reads a copy of the snapshot's matrices; False: it reads the snapshot itself."""

    def __post_init__(self) -> None:
        """Refuse sizes and types that mean nothing."""
        for name in ("data", "fsdp", "tensor", "expert"):
            if getattr(self, name) < 1:
                raise ValueError(f"layout {name}={getattr(self, name)} must be at least 1 device")
        if self.row_shards % self.expert or max(self.fsdp, self.expert) % min(
            self.fsdp, self.expert
        ):
            raise ValueError(
                f"layout expert={self.expert} must divide data * fsdp = {self.row_shards}, and "
                f"divide fsdp={self.fsdp} or be a multiple of it"
            )
        for name in ("compute_dtype", "param_dtype", "kv_dtype"):
            if getattr(self, name) not in DTYPE_BYTES:
                raise ValueError(
                    f"layout {name}={getattr(self, name)!r}; use one of {', '.join(DTYPE_BYTES)}"
                )

    @property
    def devices(self) -> int:
        """Devices of the program."""
        return self.data * self.fsdp * self.tensor

    @property
    def row_shards(self) -> int:
        """Parts that the rows of a batch are split into."""
        return self.data * self.fsdp

    @property
    def compute_bytes(self) -> int:
        """Bytes of a value in a matrix product."""
        return DTYPE_BYTES[self.compute_dtype]

    @property
    def param_bytes(self) -> int:
        """Bytes of a stored parameter."""
        return DTYPE_BYTES[self.param_dtype]

    @property
    def written_out(self) -> bool:
        """Whether most steps are kernels of their own, as in float32, which a CPU computes in; in 16 bits a
        GPU does, whose compiler fuses them."""
        return self.compute_bytes == FLOAT32_BYTES

    @property
    def kv_bytes(self) -> int:
        """Bytes of a cached key or value."""
        return DTYPE_BYTES[self.kv_dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Sum of kernels, before it belongs to a phase."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    streamed_bytes: float = 0.0
    link_bytes: float = 0.0
    launches: int = 0
    collectives: int = 0

    def __add__(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(
            flops=self.flops + other.flops,
            hbm_bytes=self.hbm_bytes + other.hbm_bytes,
            streamed_bytes=self.streamed_bytes + other.streamed_bytes,
            link_bytes=self.link_bytes + other.link_bytes,
            launches=self.launches + other.launches,
            collectives=self.collectives + other.collectives,
        )

    def times(self, count: int) -> Work:
        """The same work `count` times."""
        return Work(
            flops=self.flops * count,
            hbm_bytes=self.hbm_bytes * count,
            streamed_bytes=self.streamed_bytes * count,
            link_bytes=self.link_bytes * count,
            launches=self.launches * count,
            collectives=self.collectives * count,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One device's part of a layer: letters of the architecture, divided over the tensor axis."""

    width: int
    """D, not divided: products see the gathered width."""
    heads: int
    """N'."""
    query: int
    """N' H."""
    kv: int
    """K' H."""
    ffw: int
    """F'."""
    vocab: int
    """V', or V where the tensor axis does not divide it."""
    vocab_shards: int
    """Parts the vocabulary is split into: the tensor axis, or 1."""


def shard(model: ModelConfig, layout: Layout) -> Shard:
    """Part of the model that one device computes with.

    Raises:
        ValueError: the tensor axis does not divide kv heads and ffw size, fsdp not the width, or
            expert not the experts.
    """
    for axis, parts, name, size in (
        ("tensor", layout.tensor, "num_kv_heads", model.num_kv_heads),
        ("tensor", layout.tensor, "ffw_size", model.ffw_size),
        ("fsdp", layout.fsdp, "width", model.width),
        ("expert", layout.expert, "num_experts", max(1, model.num_experts)),
    ):
        if size % parts:
            allowed = [n for n in range(1, size + 1) if size % n == 0]
            raise ValueError(f"{axis}={parts} does not divide {name}={size}; use one of {allowed}")
    vocab_shards = layout.tensor if model.vocab_size % layout.tensor == 0 else 1
    return Shard(
        width=model.width,
        heads=model.num_heads // layout.tensor,
        query=model.num_heads // layout.tensor * model.head_size,
        kv=model.num_kv_heads // layout.tensor * model.head_size,
        ffw=model.ffw_size // layout.tensor,
        vocab=model.vocab_size // vocab_shards,
        vocab_shards=vocab_shards,
    )


def stored_in(cache_dtype: str) -> dict[str, Any]:
    """Fields of a Layout whose cache is of `rollout.cache_dtype`: 8 bits stand beside a float32 scale."""
    name = "float8" if cache_dtype == "float8_e4m3" else cache_dtype
    return {"kv_dtype": name, "kv_scale_bytes": FLOAT32_BYTES if DTYPE_BYTES[name] == 1 else 0}


def cached_bytes(part: Shard, layout: Layout) -> float:
    """Bytes of one token's keys, or values, in one layer: K' (H values and a scale)."""
    kv_heads = part.kv * part.heads / part.query
    return part.kv * layout.kv_bytes + kv_heads * layout.kv_scale_bytes


def as_cost(phase: Phase, work: Work, layout: Layout, dispatches: int) -> PhaseCost:
    """The work as that of a phase, started so often from Python."""
    return PhaseCost(
        phase=phase, flops=work.flops, hbm_bytes=work.hbm_bytes, streamed_bytes=work.streamed_bytes,
        link_bytes=work.link_bytes, launches=work.launches, collectives=work.collectives,
        dispatches=dispatches, dtype=layout.compute_dtype,
    )  # fmt: skip


def ceil_div(amount: int, parts: int) -> int:
    """What the fullest of `parts` holds when `amount` things are dealt out."""
    return -(-amount // parts)


def round_up(amount: int, block: int) -> int:
    """The smallest multiple of `block` that holds `amount`."""
    return ceil_div(amount, block) * block


def product(rows: int, inner: int, columns: int, value_bytes: int, batch: int = 1) -> Work:
    """[rows, inner] x [inner, columns], `batch` times: 2 m k n flops, (m k + k n + m n) values."""
    return Work(
        flops=2.0 * batch * rows * inner * columns,
        hbm_bytes=float(batch * value_bytes * (rows * inner + inner * columns + rows * columns)),
        launches=1,
    )


def passes(values: float, value_bytes: int, kernels: int = 1) -> Work:
    """Elementwise kernels that read and write `values` values in all."""
    return Work(
        hbm_bytes=values * value_bytes, streamed_bytes=values * value_bytes, launches=kernels
    )


def streaming(work: Work) -> Work:
    """The same kernels, memory-bound whatever the batch: all their bytes count as streamed."""
    return Work(
        flops=work.flops,
        hbm_bytes=work.hbm_bytes,
        streamed_bytes=work.hbm_bytes,
        link_bytes=work.link_bytes,
        launches=work.launches,
        collectives=work.collectives,
    )


def all_gather(array_bytes: float, devices: int, arrays: int = 1) -> Work:
    """Egress of one device when `arrays` arrays of `array_bytes` in all are gathered: A (n-1)/n."""
    if devices == 1:
        return Work()
    return Work(link_bytes=array_bytes * (devices - 1) / devices, collectives=arrays)


def all_reduce(array_bytes: float, devices: int, arrays: int = 1) -> Work:
    """A reduce-scatter, then an all-gather, as one collective: 2 A (n-1)/n."""
    if devices == 1:
        return Work()
    return Work(link_bytes=2 * array_bytes * (devices - 1) / devices, collectives=arrays)
