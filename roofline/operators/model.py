"""The fitted operator models of one device, behind one object. Standard library only.

    model = operator_model(datasheet("h100-sxm"))
    seconds = model.gemm(m=256, n=4096, k=4096)
    low, high = model.interval("gemm", seconds)

Coefficients come from `fitted.json`, which `python -m roofline.operators.fit` writes. GPUs whose
tables were never measured carry those of the nearest kernel generation and say so (`carried`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from roofline.datasheets import datasheet
from roofline.hardware import Hardware
from roofline.operators.attention import (
    DecodeCoefficients,
    PrefillCoefficients,
    decode_s,
    prefill_s,
)
from roofline.operators.collectives import (
    Collective,
    Curve,
    Curves,
    ProtocolCurve,
    SendCurve,
    collective_s,
)
from roofline.operators.gemm import GemmCoefficients, gemm_s

Operator = Literal["gemm", "attention_prefill", "attention_decode", "collective"]

CARRIED_FROM: Mapping[str, str] = {
    "a100-sxm-40gb": "a100-sxm-80gb",
    "h100-pcie": "h100-sxm", "h200": "h100-sxm", "b200": "h100-sxm",
    "l40s": "a100-sxm-80gb", "l4": "a100-sxm-80gb",
    "rtx-4090": "a100-sxm-80gb", "rtx-3090": "a100-sxm-80gb",
}  # fmt: skip
"""Whose coefficients an unmeasured GPU carries: warpgroup kernels as on Hopper, or the kernels of
Ampere that Ada also runs."""
CARRIED_WIDTH = 1.25
"""Factor by which the interval of a carried model widens on each side: an assumption."""
_GEMM_LIKE = {"float32": "bfloat16", "float16": "bfloat16", "int8": "float8"}
"""Types whose products run the kernels of another type, at their own peak."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorModel:
    """Expected seconds of operators on one device, for launches inside a running program."""

    hardware: Hardware
    measured_on: str
    """GPU whose measurements the coefficients were fitted to."""
    gemm_by_dtype: Mapping[str, GemmCoefficients]
    prefill_coefficients: PrefillCoefficients
    decode_coefficients: DecodeCoefficients
    curves: Mapping[str, Curves]
    """Collective curves by library version."""
    library: str
    """The version that predictions use unless told otherwise."""
    intervals: Mapping[str, tuple[float, float]]
    """measured / predicted under cross-validation, 5th and 95th percentile, by operator."""
    latency_scale: float = 1.0
    """Fixed time of this device's collectives over that of `measured_on`."""

    @property
    def carried(self) -> bool:
        """True when the coefficients were measured on another GPU."""
        return self.measured_on != self.hardware.name

    def gemm(
        self, *, m: int, n: int, k: int, dtype: str = "bfloat16", weight_dtype: str | None = None
    ) -> float:
        """Seconds of [m, k] x [k, n]; see `roofline.operators.gemm.gemm_s`."""
        like = _GEMM_LIKE.get(dtype, dtype)
        coefficients = self.gemm_by_dtype.get(like, self.gemm_by_dtype["bfloat16"])
        return gemm_s(
            coefficients, self.hardware, m=m, n=n, k=k, dtype=dtype, weight_dtype=weight_dtype
        )

    def prefill(
        self,
        *,
        batch: int,
        tokens: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        dtype: str = "bfloat16",
    ) -> float:
        """Seconds of causal attention over prompts, one layer."""
        return prefill_s(
            self.prefill_coefficients,
            self.hardware,
            batch=batch,
            tokens=tokens,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            dtype=dtype,
        )

    def decode(
        self,
        *,
        batch: int,
        kv_len: float,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        kv_dtype: str = "bfloat16",
        warm_l2: bool = False,
    ) -> float:
        """Seconds of one token's attention, one layer; by default with a cold L2, as inside a
        model."""
        return decode_s(
            self.decode_coefficients,
            self.hardware,
            batch=batch,
            kv_len=kv_len,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            kv_dtype=kv_dtype,
            warm_l2=warm_l2,
        )

    def collective(
        self, kind: Collective, buffer_bytes: float, devices: int, *, library: str | None = None
    ) -> float:
        """Seconds of one collective; buffer bytes as in nccl-tests, per device.

        Raises:
            ValueError: a library without curves, or what `collective_s` refuses.
        """
        curves = self.curves.get(library or self.library)
        if curves is None:
            raise ValueError(
                f"no collective curves for library {library!r}; use one of {', '.join(self.curves)}"
            )
        return collective_s(
            curves, self.hardware, kind, buffer_bytes, devices, latency_scale=self.latency_scale
        )

    def passes(self, moved_bytes: float, kernels: int = 1) -> float:
        """Seconds of elementwise kernels that move these bytes."""
        rate = self.hardware.efficiency.memory * self.hardware.hbm_bytes_per_s
        return kernels * self.hardware.kernel_s + moved_bytes / rate

    def interval(self, operator: Operator, seconds: float) -> tuple[float, float]:
        """Where nine of ten measurements of this operator should lie [s]."""
        low, high = self.intervals[operator]
        width = CARRIED_WIDTH if self.carried else 1.0
        return seconds * low / width, seconds * high * width


def operator_model(hardware: Hardware) -> OperatorModel:
    """The operator models of a GPU, read once from the package.

    Raises:
        ValueError: a device that no fitted GPU stands for, such as a CPU.
    """
    fitted = load_fitted()["gpus"]
    donor = CARRIED_FROM.get(hardware.name, hardware.name)
    if donor not in fitted:
        known = ", ".join([*fitted, *CARRIED_FROM])
        raise ValueError(
            f"no operator models for hardware {hardware.name!r}; known: {known}. "
            "Predict whole phases with a calibration of this machine instead"
        )
    values = fitted[donor]
    return OperatorModel(
        hardware=hardware,
        measured_on=donor,
        gemm_by_dtype={k: GemmCoefficients(**v) for k, v in values["gemm"].items()},
        prefill_coefficients=PrefillCoefficients(**values["attention_prefill"]),
        decode_coefficients=DecodeCoefficients(**values["attention_decode"]),
        curves={library: read_curves(v) for library, v in values["collective"].items()},
        library=values["library"],
        intervals={k: (v[0], v[1]) for k, v in values["intervals"].items()},
        latency_scale=datasheet(hardware.name).link_latency_s / datasheet(donor).link_latency_s,
    )


def read_curves(values: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Curves:
    """Curves from JSON, whose keys are strings."""

    def read(kind: str, curve: Mapping[str, float]) -> Curve:
        return SendCurve(**curve) if kind == "all_to_all" else ProtocolCurve(**curve)

    return {
        kind: {int(devices): read(kind, curve) for devices, curve in by_devices.items()}
        for kind, by_devices in values.items()
    }


@functools.cache
def load_fitted() -> Mapping[str, Any]:
    """The package's fitted.json: coefficients by GPU, fitted rows by kind, errors."""
    text = resources.files("roofline.operators").joinpath("fitted.json").read_text("utf-8")
    return json.loads(text)
