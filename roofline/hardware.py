"""What one device can do: peaks, fixed times, and what share of the peaks programs reach. Standard
library only.

A `Hardware` comes from a datasheet (`datasheet("h200")`) or from `roofline.calibrate`, which
measures the machine it runs on. Peaks bound a phase from below; efficiencies and fixed times turn
the bound into an expectation.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from models.rows import RowAttention, rows_on_cuda
from roofline.phases import Phase

DTYPE_BYTES: Mapping[str, int] = {
    "float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1,
}  # fmt: skip
"""Bytes of one value, by dtype name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """Share of each peak that real programs reach, each in (0, 1]."""

    compute: float = 1.0
    """Matrix products, of the dense peak."""
    memory: float = 1.0
    """Memory traffic, of the memory bandwidth."""
    link: float = 1.0
    """Collectives and copies, of the link bandwidth."""
    kernel_s: float | None = None
    """Fixed time per kernel [s] where a phase differs from `Hardware.kernel_s`; None: it does not.
    """
    call_s: float = 0.0
    """Host time of one call of the phase that no dispatch counts: Python, transfers, waiting [s]."""

    def __post_init__(self) -> None:
        """Refuse shares that are not shares."""
        if self.call_s < 0:
            raise ValueError(f"efficiency call_s={self.call_s} must be >= 0: it is a time")
        for name in ("compute", "memory", "link"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(
                    f"efficiency {name}={value} must lie in (0, 1]: it is a share of a peak"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One device and its links. Rates are per device; times in seconds."""

    name: str
    peak_flops_per_s: Mapping[str, float]
    """Dense matrix peak by dtype name; float32 is what XLA runs by default (TF32 on tensor cores).
    """
    hbm_bytes: float
    """Device memory [bytes]; simulated devices: their share of the host's."""
    hbm_bytes_per_s: float
    """Peak memory bandwidth [bytes/s]."""
    link_bytes_per_s: float
    """Egress of one device to its peers, one direction [bytes/s]."""
    dispatch_s: float
    """Host time to start one compiled program from Python [s]."""
    kernel_s: float
    """Fixed time of one kernel inside a program [s]."""
    link_latency_s: float = 0.0
    """Fixed time of one collective or copy between devices [s]."""
    num_sms: int = 0
    """Streaming multiprocessors: the units that tiles of a kernel are dealt to; 0: not a GPU, or
    not known."""
    l2_bytes: float = 0.0
    """Cache shared by all multiprocessors [bytes]; 0: not known."""
    capability: float = 0.0
    """CUDA compute capability, which decides what kernels a run takes; 9.0 is Hopper. 0: not a GPU."""
    topology: Literal["switch", "bridge", "pcie", "host"] = "host"
    """How the devices of a node reach each other: all at full rate through NVLink switches, pairs
    through an NVLink bridge and the rest over PCIe, PCIe only, or one host's memory."""
    node_devices: int = 8
    """Devices that link_bytes_per_s holds between."""
    network_bytes_per_s: float = 0.0
    """Egress of one device to other nodes, one direction [bytes/s]; 0: not known."""
    efficiency: Efficiency = field(default_factory=Efficiency)
    """Shares of the peaks for phases that `phase_efficiency` does not name."""
    phase_efficiency: Mapping[str, Efficiency] = field(default_factory=dict)
    """Shares by phase (`Phase` value), where calibration measured that phase."""
    devices_share_cores: bool = False
    """True for simulated devices: all of them compute on the same cores."""
    contention: float = 1.0
    """How many times longer a phase takes while another lane computes all along; 1 on real
    accelerators."""
    phase_contention: Mapping[str, float] = field(default_factory=dict)
    """The same by phase (`Phase` value), where calibration ran the trainer's own lanes."""
    verifier_contention: Mapping[str, float] = field(default_factory=dict)
    """How many times longer a phase takes while groups are with the verifiers, by phase; phases not named
    are not slowed."""
    measured_for: Mapping[str, Any] = field(default_factory=dict)
    """Model and workload whose shapes were measured, by field; empty: a device alone."""
    calibrated: bool = False
    """True when measured here, False when read from a datasheet."""
    source: tuple[str, ...] = ()
    """Where the numbers come from."""
    disturbance: str = ""
    """What made the calibration untrustworthy, usually other programs at work; empty: nothing."""
    date: str = ""
    """When it was calibrated, or the day the datasheet was read; ISO 8601."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Software the calibration ran on: jax, jaxlib, python, device kind."""
    held_out: Mapping[str, float] = field(default_factory=dict)
    """Calibration's own check: predicted / measured on shapes it did not fit, by phase and shape.
    """

    def __post_init__(self) -> None:
        """Refuse rates and times that no device has."""
        positive = {
            "hbm_bytes": self.hbm_bytes,
            "hbm_bytes_per_s": self.hbm_bytes_per_s,
            "link_bytes_per_s": self.link_bytes_per_s,
            **{f"peak_flops_per_s[{k}]": v for k, v in self.peak_flops_per_s.items()},
        }
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"hardware {self.name!r}: {name}={value} must be greater than 0")
        for name in ("dispatch_s", "kernel_s", "link_latency_s"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"hardware {self.name!r}: {name}={getattr(self, name)} must be >= 0"
                )
        slower = {"contention": self.contention} | {
            f"{kind}[{name}]": value
            for kind in ("phase_contention", "verifier_contention")
            for name, value in getattr(self, kind).items()
        }
        for name, value in slower.items():
            if value < 1:
                raise ValueError(
                    f"hardware {self.name!r}: {name}={value} must be at least 1, "
                    "which means that lanes do not disturb each other"
                )

    def peak(self, dtype: str) -> float:
        """Dense peak for matrix products in `dtype` [FLOP/s]."""
        if dtype not in self.peak_flops_per_s:
            known = ", ".join(sorted(self.peak_flops_per_s))
            raise ValueError(
                f"hardware {self.name!r} has no peak for dtype {dtype!r}; it has {known}"
            )
        return self.peak_flops_per_s[dtype]

    def efficiency_of(self, phase: Phase) -> Efficiency:
        """Shares of the peaks for this phase, or the general ones where it was not measured."""
        return self.phase_efficiency.get(phase.value, self.efficiency)

    def views_snapshots(self, devices: int, *, adapted: bool) -> bool:
        """Whether decode on so many of them reads a published version where it lies, as `models.fused.can_view`
        says: on a single CPU, and not under an adapter."""
        return self.devices_share_cores and devices == 1 and not adapted

    def contention_of(self, phase: Phase) -> float:
        """How many times longer this phase takes while another lane computes all along."""
        return self.phase_contention.get(phase.value, self.contention)

    def critical_intensity(self, dtype: str) -> float:
        """Flops per byte at which memory stops binding: peak / bandwidth (scaling book,
        roofline chapter)."""
        return self.peak(dtype) / self.hbm_bytes_per_s

    def rows_attention(self, dtype: str, head_size: int) -> RowAttention:
        """Program of attention in packed rows and prompts that a run takes here unasked."""
        if not self.capability:
            return "blocks"
        return rows_on_cuda(self.capability, DTYPE_BYTES.get(dtype, 0), head_size)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary; `from_json` reads it back unchanged."""
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Write as JSON, through a temporary file so that a reader never sees half of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Hardware:
        """Read `to_json`'s dictionary; a missing or unknown field is an error that names it."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        required = {
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        missing = sorted(required - set(values))
        if unknown or missing:
            raise ValueError(
                f"not a hardware description: unknown fields {unknown}, missing fields {missing}; "
                "write one with `python -m roofline.calibrate --out FILE`"
            )
        fields = dict(values)
        fields["efficiency"] = Efficiency(**fields.get("efficiency", {}))
        fields["phase_efficiency"] = {
            phase: Efficiency(**shares)
            for phase, shares in fields.get("phase_efficiency", {}).items()
        }
        fields["source"] = tuple(fields.get("source", ()))
        return cls(**fields)

    @classmethod
    def load(cls, path: Path) -> Hardware:
        """Read a JSON file written by `save`."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} is not JSON ({error}); delete it and calibrate again"
            ) from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds {type(values).__name__}, not one JSON object")
        return cls.from_json(values)
