"""summary.json: the outcome of a run and its roofline, from its files and a few final numbers."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxrl.telemetry.jsonl import finite_or_none
from jaxrl.telemetry.spans import covered_s
from roofline.analyse import companies, in_company
from roofline.hardware import Hardware
from roofline.phases import Phase, PhaseCost
from roofline.predict import mbu, mfu
from roofline.read_run import read_span

_PACKAGES = ("jaxrl", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseSummary:
    """All spans of one phase over the run. Fields are None where no span carried a prediction."""

    calls: int
    measured_s: float
    """Sum over all spans, with and without a prediction; of verifications, which overlap, the time that
    at least one of them took."""
    alone_s: float | None
    """Predicted, as if nothing else ran; this and the next sum over the spans that carry a prediction."""
    predicted_s: float | None
    """Predicted, with the other lane computing beside them as it did."""
    lower_s: float | None
    ratio: float | None
    """Measured over predicted, both summed over the spans that carry a prediction."""
    bound: str | None
    """What binds in most of the predicted time."""
    mfu: float | None
    """Flops over what the peak could do in the measured time."""
    mbu: float | None
    """Memory bytes over what the bandwidth could move in the measured time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a run achieved, how fast, and on what."""

    pass_at_1_before: float | None
    pass_at_1_after: float | None
    pass_at_8_before: float | None
    pass_at_8_after: float | None
    wall_s: float
    """From the first weights, or their restoration, to this summary, over all starts of the run [s]."""
    samples_per_s: float
    """Samples learnt from over the time of the optimizer steps, the sum of time/step_s in metrics.jsonl:
    periodic evaluations and checkpoints are in it, the cold start is not."""
    steps: int
    staleness_histogram: Mapping[int, int]
    """Consumed samples by staleness."""
    phases: Mapping[str, PhaseSummary]
    seed: int
    device: str
    config: str
    """Path of the resolved configuration."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of python and the packages; see `package_versions`."""

    @property
    def impossible(self) -> list[str]:
        """Shares above 1: their cost is too high or the device's peak too low."""
        return [
            f"{name} {kind} {value:.2f}"
            for name, phase in self.phases.items()
            for kind, value in (("MFU", phase.mfu), ("MBU", phase.mbu))
            if value is not None and value > 1
        ]


@dataclass(kw_only=True, slots=True)
class _Totals:
    calls: int = 0
    measured_s: float = 0.0
    costed_s: float = 0.0
    alone_s: float = 0.0
    predicted_s: float = 0.0
    lower_s: float = 0.0
    cost: PhaseCost | None = None
    bounds: Counter[str] = field(default_factory=Counter)
    verified: list[tuple[float, float]] = field(default_factory=list)
    """(start, end) of verifications."""


def summarise_phases(
    spans: Iterable[Mapping[str, Any]], hardware: Hardware | None = None
) -> dict[str, PhaseSummary]:
    """Totals per phase of the records of spans.jsonl, in the order of roofline.phases.Phase.

    MFU and MBU need `hardware`; their time is that of the spans with a prediction. So does the time
    beside the other lane, which without it is the time alone.
    """
    totals: dict[Phase, _Totals] = {}
    records = list(spans)
    read = [read_span(record, "a span", "float32") for record in records]
    for span, seen, company in zip(records, read, companies(read), strict=True):
        total = totals.setdefault(Phase(span["phase"]), _Totals())
        total.calls += 1
        total.measured_s += span["duration_s"]
        if span["phase"] == Phase.REWARD:
            total.verified.append((span["start_s"], span["start_s"] + span["duration_s"]))
        if span["cost"] is None or span["predicted_s"] is None:
            continue
        cost = PhaseCost(phase=Phase(span["phase"]), **span["cost"])
        total.cost = cost if total.cost is None else total.cost + cost
        total.costed_s += span["duration_s"]
        total.alone_s += span["predicted_s"]
        total.predicted_s += (
            in_company(seen, company, hardware) if hardware else span["predicted_s"]
        )
        total.lower_s += span["lower_s"]
        total.bounds[span["bound"]] += span["predicted_s"]
    return {str(phase): _summarised(totals[phase], hardware) for phase in Phase if phase in totals}


def _summarised(total: _Totals, hardware: Hardware | None) -> PhaseSummary:
    measured_s = covered_s(total.verified) if total.verified else total.measured_s
    if total.cost is None or total.predicted_s <= 0 or total.costed_s <= 0:
        return PhaseSummary(
            calls=total.calls,
            measured_s=measured_s,
            alone_s=None,
            predicted_s=None,
            lower_s=None,
            ratio=None,
            bound=None,
            mfu=None,
            mbu=None,
        )
    return PhaseSummary(
        calls=total.calls,
        measured_s=measured_s,
        alone_s=total.alone_s,
        predicted_s=total.predicted_s,
        lower_s=total.lower_s,
        ratio=total.costed_s / total.predicted_s,
        bound=total.bounds.most_common(1)[0][0],
        mfu=mfu(total.cost, total.costed_s, hardware) if hardware else None,
        mbu=mbu(total.cost, total.costed_s, hardware) if hardware else None,
    )


def package_versions() -> dict[str, str]:
    """Versions of python and of the packages that decide numbers; jaxrl itself may be a 'checkout'."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "checkout" if package == "jaxrl" else "not installed"
    return found


def write_summary(summary: Summary, path: Path) -> None:
    """Write summary.json in one atomic move; non-finite numbers become null."""
    partial = path.with_name(path.name + ".partial")
    tree = _finite(dataclasses.asdict(summary))
    partial.write_text(json.dumps(tree, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    return finite_or_none(value) if isinstance(value, float) else value
