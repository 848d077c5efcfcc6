"""What validation needs to know about one kind of measured case. Standard library only.

A case is a row (one JSON object) with at least `id`, `kind`, `hardware`, `stack` and `measured_s`;
the rest depends on its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Predictor = Callable[[Row], float | None]
"""Seconds of a row, or None where the predictor cannot say (unknown hardware, missing field)."""


def measured_s(row: Row) -> float:
    """The time that was measured [s]."""
    return float(row["measured_s"])


def peer_s(row: Row) -> float | None:
    """What another predictor said about the same row [s]; None where none was asked."""
    value = row.get("peer_prediction_s")
    return None if value is None else float(value)


def hardware_and_stack(row: Row) -> str:
    """Rows that share kernels and framework: one calibration serves them all."""
    return f"{row['hardware']} / {str(row['stack']).strip()}"


def never_fitted(_row: Row) -> bool:
    """For kinds whose predictor has seen no row of any table."""
    return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """How to predict and to score one kind of case."""

    name: str
    """Value of `kind` in the rows."""
    predict: Predictor
    """Our time without calibration [s]."""
    bound: Predictor
    """The book's lower bound from datasheet peaks [s]; never above what hardware can do."""
    math: Predictor
    """Time of the model flops alone (of the link bytes alone, for collectives) at the datasheet
    peak [s]: what the constant-MFU baseline divides by one share per stack."""
    calibrate: Callable[[Sequence[Row], Predictor], Predictor] | None = None
    """Given a stack's calibration rows and the uncalibrated predictor: the predictor for that
    stack. None: `score.scale_and_slope`."""
    measured: Callable[[Row], float] = measured_s
    stack: Callable[[Row], str] = hardware_and_stack
    """Name of the group that is calibrated and scored together."""
    peer: Predictor = peer_s
    interval: Callable[[Row], tuple[float, float] | None] | None = None
    """Where nine of ten measurements should lie without calibration [s]; None: not stated."""
    fitted: Callable[[Row], bool] = never_fitted
    """True for rows that shipped coefficients were fitted on: they are never scored."""
