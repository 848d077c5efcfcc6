"""Operators of a step on one GPU: the fitted operator models, under the short type names of
trainers and servers, with the attention kernels that those models do not cover. Standard library
only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from roofline.datasheets import datasheet
from roofline.hardware import DTYPE_BYTES, Hardware
from roofline.operators.collectives import Collective
from roofline.operators.model import OperatorModel, operator_model

DTYPES: Mapping[str, str] = {
    "bf16": "bfloat16", "fp16": "float16", "fp8": "float8", "int8": "int8", "fp32": "float32",
}  # fmt: skip
"""Short name of a type: the name its peak has on a datasheet."""

AttentionKernel = Literal["flash", "flash1", "unfused"]
"""flash: the newest FlashAttention of the device. flash1: the first FlashAttention and its Triton
port. unfused: scores, softmax and dropout each pass through memory."""

FLASH1_SHARE: Mapping[str, float] = {"a100": 0.31, "default": 0.175}
"""Share of the dense peak of the first FlashAttention, forward and backward together: half of what
FlashAttention-2 reaches, which doubled it (50-73 % on A100, arXiv:2307.08691; 35 % on H100,
arXiv:2407.08608)."""
UNFUSED_SHARE = 0.8
"""Share of the peak of batched products of one head each: assumed, that of plain products."""
UNFUSED_SCORE_BYTES = 15
"""Passes over 16-bit scores: product 4 (its buffer is read), softmax 4, dropout 5, product 2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU's operators."""

    operators: OperatorModel

    @property
    def sheet(self) -> Hardware:
        """Its datasheet."""
        return self.operators.hardware

    def peak(self, dtype: str) -> float:
        """Dense peak [FLOP/s] for a short type name.

        Raises:
            ValueError: unknown type, or the GPU has no unit for it.
        """
        return self.sheet.peak(long_name(dtype))

    def product_s(
        self, m: int, n: int, k: int, dtype: str, weight_dtype: str | None = None
    ) -> float:
        """[m, k] x [k, n], the right operand stored as `weight_dtype` [s]."""
        stored = None if weight_dtype is None else long_name(weight_dtype)
        return self.operators.gemm(m=m, n=n, k=k, dtype=long_name(dtype), weight_dtype=stored)

    def pass_s(self, moved_bytes: float) -> float:
        """An elementwise kernel that moves so many bytes, its fixed time left out [s]."""
        return self.operators.passes(moved_bytes, kernels=0)

    def prefill_attention_s(
        self,
        rows: int,
        tokens: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        kernel: AttentionKernel = "flash",
    ) -> float:
        """Causal attention within rows of `tokens` tokens, forward [s]."""
        causal_s = 2.0 * rows * heads * head_size * tokens * tokens / self.peak("bf16")
        if kernel == "flash1":
            generation = self.sheet.name.partition("-")[0]
            share = FLASH1_SHARE.get(generation, FLASH1_SHARE["default"])
            return self.sheet.kernel_s + causal_s / share
        if kernel == "unfused":
            scores = float(rows * heads * tokens * tokens)
            passes_s = self.operators.passes(UNFUSED_SCORE_BYTES * scores, kernels=5)
            return passes_s + 2 * causal_s / UNFUSED_SHARE
        return self.operators.prefill(
            batch=rows,
            tokens=tokens,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
        )

    def decode_attention_s(
        self,
        rows: int,
        cached: float,
        heads: int,
        kv_heads: int,
        head_size: int,
        kv_dtype: str = "bf16",
    ) -> float:
        """One query per row to `cached` keys and values each, out of a cold cache [s]."""
        return self.operators.decode(
            batch=rows,
            kv_len=cached,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            kv_dtype=long_name(kv_dtype),
        )

    def collective_s(self, kind: Collective, size_bytes: float, devices: int) -> float:
        """Inside one node [s]."""
        if devices <= 1:
            return 0.0
        return self.operators.collective(kind, size_bytes, devices)


def long_name(dtype: str) -> str:
    """`bf16` -> `bfloat16`; long names pass.

    Raises:
        ValueError: neither.
    """
    if dtype in DTYPE_BYTES:
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def dtype_bytes(dtype: str) -> int:
    """Bytes of one value."""
    return DTYPE_BYTES[long_name(dtype)]


def gpu(name: str) -> Gpu:
    """The GPU of that name, as datasheets and tables write it (`h100-80gb-sxm`, `h200`).

    Raises:
        ValueError: no datasheet, or no operator models stand for it.
    """
    return Gpu(operators=operator_model(datasheet(name)))
