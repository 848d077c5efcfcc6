"""A run folder, read through its files alone. Standard library only, so that a report needs no jax.

hardware.json   roofline.hardware.Hardware the predictions were made with (required)
spans.jsonl     one measured span per line, with its cost and prediction (required)
metrics.jsonl   one object per optimizer step
summary.json    totals of a finished run
config.yaml     the resolved configuration
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roofline.hardware import Hardware
from roofline.phases import Phase, PhaseCost

WAITING = (Phase.WAIT_BATCH, Phase.WAIT_LEARNER)
"""Phases in which a lane computes nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One line of spans.jsonl."""

    phase: Phase
    lane: str
    start_s: float
    duration_s: float
    step: int | None = None
    version: int | None = None
    work: Mapping[str, float] = field(default_factory=dict)
    cost: PhaseCost | None = None
    predicted_s: float | None = None
    """Expected seconds of this call, alone on the device."""
    lower_s: float | None = None
    bound: str | None = None

    @property
    def end_s(self) -> float:
        """When the span ended [s]."""
        return self.start_s + self.duration_s

    @property
    def computes(self) -> bool:
        """False while the lane waits for another."""
        return self.phase not in WAITING


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Everything a report needs."""

    folder: Path
    hardware: Hardware
    spans: tuple[Span, ...]
    metrics: tuple[Mapping[str, float], ...]
    summary: Mapping[str, Any]
    config: Mapping[str, str]
    """Configuration values as text, by dotted name."""
    notes: tuple[str, ...]
    """What is missing or torn, for the reader of the report."""

    @property
    def wall_s(self) -> float:
        """From the first span's start to the last span's end [s]."""
        return max(s.end_s for s in self.spans) - min(s.start_s for s in self.spans)


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        ValueError: no such folder, a required file is missing, or a line does not hold what it
        should; the message
            names the file, the line and the field.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the run folder that training wrote")
    notes: list[str] = []
    hardware = _read_hardware(folder / "hardware.json")
    config = _read_config(folder / "config.yaml", notes)
    dtype = config.get("model.dtype", "float32")
    spans = read_spans(folder / "spans.jsonl", dtype, notes)
    metrics = tuple(value for _, value in _json_lines(folder / "metrics.jsonl", notes))
    return Run(
        folder=folder,
        hardware=hardware,
        spans=spans,
        metrics=metrics,
        summary=_read_summary(folder / "summary.json", notes),
        config=config,
        notes=tuple(notes),
    )


def read_spans(path: Path, dtype: str, notes: list[str] | None = None) -> tuple[Span, ...]:
    """The spans of a file, in its order. `dtype`: of costs that name none; `notes`: gets what is torn.

    Raises:
        ValueError: as `read_run`.
    """
    lines = _json_lines(path, [] if notes is None else notes, required=True)
    spans = tuple(read_span(value, f"{path}:{line}", dtype) for line, value in lines)
    if not spans:
        raise ValueError(f"{path} holds no span; the run did no timed work yet")
    return spans


def _read_hardware(path: Path) -> Hardware:
    if not path.is_file():
        raise ValueError(f"{path} is missing; a run folder holds the hardware it was predicted for")
    try:
        return Hardware.load(path)
    except TypeError as error:
        raise ValueError(f"{path} is not a hardware description: {error}") from error


def _read_summary(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        notes.append("summary.json is missing: the run has not finished.")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, not one JSON object")
    return value


def _json_lines(
    path: Path, notes: list[str], *, required: bool = False
) -> list[tuple[int, dict[str, Any]]]:
    """Line numbers and objects. A last line without its newline is a torn write: left out, and
    noted."""
    if not path.is_file():
        if required:
            raise ValueError(f"{path} is missing; give a folder that training wrote")
        notes.append(f"{path.name} is missing.")
        return []
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    if torn := lines.pop():
        notes.append(f"The last line of {path.name} is torn ({len(torn)} bytes) and left out.")
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}:{number} holds {type(value).__name__}, not a JSON object")
        rows.append((number, value))
    return rows


def read_span(value: Mapping[str, Any], where: str, dtype: str) -> Span:
    """One line of spans.jsonl. `where`: for errors; `dtype`: of a cost that names none.

    Raises:
        ValueError: a field is missing or does not hold what it should.
    """
    try:
        phase = Phase(value["phase"])
        return Span(
            phase=phase,
            lane=str(value["lane"]),
            start_s=float(value["start_s"]),
            duration_s=_duration(value["duration_s"]),
            step=value.get("step"),
            version=value.get("version"),
            work=value.get("work") or {},
            cost=_cost(phase, value.get("cost"), dtype),
            predicted_s=_optional(value.get("predicted_s")),
            lower_s=_optional(value.get("lower_s")),
            bound=value.get("bound"),
        )
    except KeyError as error:
        raise ValueError(
            f"{where} has no field {error}; a span needs phase, lane, start_s, duration_s"
        ) from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is not a span: {error}") from error


def _duration(value: Any) -> float:
    seconds = float(value)
    if not seconds >= 0:
        raise ValueError(f"duration_s={value} must be >= 0")
    return seconds


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


def _cost(phase: Phase, value: Mapping[str, Any] | None, dtype: str) -> PhaseCost | None:
    if value is None:
        return None
    return PhaseCost(
        phase=phase,
        flops=float(value.get("flops", 0.0)),
        hbm_bytes=float(value.get("hbm_bytes", 0.0)),
        streamed_bytes=float(value.get("streamed_bytes", 0.0)),
        link_bytes=float(value.get("link_bytes", 0.0)),
        launches=int(value.get("launches", 0)),
        collectives=int(value.get("collectives", 0)),
        dispatches=int(value.get("dispatches", 0)),
        dtype=str(value.get("dtype", dtype)),
    )


def _read_config(path: Path, notes: list[str]) -> dict[str, str]:
    """Scalars of a nested mapping, by dotted name; enough YAML for a file that a program wrote."""
    if not path.is_file():
        notes.append("config.yaml is missing.")
        return {}
    values: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.split(" #")[0].rstrip()
        name, colon, value = text.strip().partition(":")
        if not colon or name.startswith(("#", "-")):
            continue
        indent = len(text) - len(text.lstrip())
        while parents and parents[-1][0] >= indent:
            parents.pop()
        if value.strip():
            dotted = ".".join([*(parent for _, parent in parents), name])
            values[dotted] = value.strip().strip("'\"")
        else:
            parents.append((indent, name))
    return values
