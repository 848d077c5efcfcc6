"""Errors of predictors on measured cases, and the calibration of one stack. Standard library only.

Per kind and stack, on the same rows for every predictor: those that no shipped coefficient was
fitted on and that calibration did not use. Error of a row: predicted / measured - 1. The rows of a
stack that calibrate it are drawn by a fixed seed, from the already fitted ones where the stack has
enough of them (they are lost to the score anyway), else from all; at most half of a stack.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from roofline.validate.kinds import Kind, Predictor, Row

SEED = 20261120
"""Draws the calibration rows."""
NOISE, SCALE_PRIOR, SLOPE_PRIOR = 0.08, 0.5, 0.1
"""Standard deviations in log seconds: of one measurement around a calibrated prediction, of a
stack's scale, and of its exponent around 1."""
PREDICTORS = ("bound", "constant_mfu", "ours", "calibrated", "peer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """How far one predictor is off on n rows; shares of the measured time."""

    n: int
    mean: float
    """Mean of |predicted / measured - 1|."""
    median: float
    p90: float
    bias: float
    """Mean of predicted / measured - 1."""
    rank: float | None
    """Spearman's correlation of predicted and measured; None with fewer than three rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One stack of one kind."""

    kind: str
    stack: str
    rows: int
    """Rows of the stack that could be read."""
    fitted: int
    """Of these, left out of the score because shipped coefficients were fitted on them."""
    calibration: tuple[str, ...]
    """Ids of the rows that calibrated the stack, also left out."""
    unpredicted: int
    """Rows that our predictor says nothing about, also left out."""
    errors: Mapping[str, Errors]
    """By predictor, of PREDICTORS; absent where it says nothing."""
    inside: float | None
    """Share of the scored rows inside the stated interval; None where the kind states none."""
    ratios: Mapping[str, tuple[float, ...]]
    """Predicted over measured of every scored row, by predictor."""


def score_kind(kind: Kind, rows: Sequence[Row], *, calibrate_rows: int) -> list[Score]:
    """Scores by stack, in the order of their names.

    Raises:
        ValueError: calibrate_rows below 0.
    """
    if calibrate_rows < 0:
        raise ValueError(f"calibrate_rows={calibrate_rows} must be at least 0")
    stacks: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        stacks[kind.stack(row)].append(row)
    return [
        score_stack(kind, stack, stacks[stack], calibrate_rows=calibrate_rows)
        for stack in sorted(stacks)
    ]


def score_stack(kind: Kind, stack: str, rows: Sequence[Row], *, calibrate_rows: int) -> Score:
    """Score of the rows of one stack."""
    known = [row for row in rows if kind.predict(row) is not None]
    calibration = calibration_rows(kind, stack, known, calibrate_rows)
    used = {row["id"] for row in calibration}
    scored = [row for row in known if row["id"] not in used and not kind.fitted(row)]
    by_name = _predictors(kind, calibration)
    ratios: dict[str, tuple[float, ...]] = {}
    errors: dict[str, Errors] = {}
    for name, predict in by_name.items():
        pairs = [(p, kind.measured(row)) for row in scored if (p := predict(row)) is not None]
        if pairs:
            errors[name] = errors_of(pairs)
            ratios[name] = tuple(predicted / measured for predicted, measured in pairs)
    return Score(
        kind=kind.name,
        stack=stack,
        rows=len(rows),
        fitted=sum(map(kind.fitted, rows)),
        calibration=tuple(sorted(used)),
        unpredicted=len(rows) - len(known),
        errors=errors,
        inside=_inside(kind, scored),
        ratios=ratios,
    )


def calibration_rows(kind: Kind, stack: str, rows: Sequence[Row], count: int) -> list[Row]:
    """Rows that calibrate a stack; at most half of them."""
    pool = sorted(rows, key=lambda row: row["id"])
    fitted = [row for row in pool if kind.fitted(row)]
    if len(fitted) >= count:
        pool = fitted
    else:
        count = min(count, len(pool) // 2)
    return random.Random(f"{SEED}:{kind.name}:{stack}").sample(pool, count)


def _predictors(kind: Kind, calibration: Sequence[Row]) -> dict[str, Predictor]:
    """By name; those that need calibration rows only when there are some."""
    found: dict[str, Predictor] = {"bound": kind.bound, "ours": kind.predict, "peer": kind.peer}
    if calibration:
        found["constant_mfu"] = constant_mfu(kind, calibration)
        calibrate = kind.calibrate or scale_and_slope
        found["calibrated"] = calibrate(calibration, kind.predict)
    return {name: found[name] for name in PREDICTORS if name in found}


def constant_mfu(kind: Kind, rows: Sequence[Row]) -> Predictor:
    """The baseline: flops at the one share of the peak that serves these rows best (least mean
    error)."""
    pairs = [
        (seconds, kind.measured(row)) for row in rows if (seconds := kind.math(row)) is not None
    ]
    shares = [seconds / measured for seconds, measured in pairs if seconds > 0]

    def error(share: float) -> float:
        return sum(abs(seconds / share / measured - 1) for seconds, measured in pairs)

    best = min(shares, key=error, default=None)

    def predict(row: Row) -> float | None:
        seconds = kind.math(row)
        return None if seconds is None or best is None else seconds / best

    return predict


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """log t = log p + scale + slope (log p - centre)."""

    scale: float = 0.0
    slope: float = 0.0
    centre: float = 0.0

    def seconds(self, predicted_s: float) -> float:
        """Corrected time [s]."""
        return predicted_s * math.exp(
            self.scale + self.slope * (math.log(predicted_s) - self.centre)
        )


def corrections(pairs: Sequence[tuple[float, float]]) -> list[Correction]:
    """None, a scale, and a scale with a slope, for (predicted, measured) pairs.

    Least squares in log seconds with normal priors around 0, in closed form: with x the centred
    logarithms of the predictions and r those of measured / predicted, scale = sum r / (n + (noise /
    scale prior)^2) and slope = sum x (r - scale) / (sum x^2 + (noise / slope prior)^2).
    """
    logs = [(math.log(p), math.log(measured / p)) for p, measured in pairs]
    centre = statistics.fmean(x for x, _ in logs)
    scale = sum(r for _, r in logs) / (len(logs) + (NOISE / SCALE_PRIOR) ** 2)
    slope = sum((x - centre) * (r - scale) for x, r in logs) / (
        sum((x - centre) ** 2 for x, _ in logs) + (NOISE / SLOPE_PRIOR) ** 2
    )
    return [
        Correction(),
        Correction(scale=scale),
        Correction(scale=scale, slope=slope, centre=centre),
    ]


def scale_and_slope(rows: Sequence[Row], predict: Predictor) -> Predictor:
    """The correction that predicts calibration rows from the others, then fitted on all of them. A
    more flexible one is taken only where its absolute log error is smaller by more than one
    standard error of the difference, row by row: eight noisy rows must not spoil a good fit."""
    pairs = [(p, float(row["measured_s"])) for row in rows if (p := predict(row)) is not None]
    if len(pairs) < 3:
        return predict
    made = [corrections([*pairs[:i], *pairs[i + 1 :]]) for i in range(len(pairs))]
    errors = [
        [abs(math.log(m[c].seconds(p) / t)) for m, (p, t) in zip(made, pairs, strict=True)]
        for c in range(3)
    ]
    taken = 0
    for choice in (1, 2):
        gains = [a - b for a, b in zip(errors[taken], errors[choice], strict=True)]
        if statistics.fmean(gains) > statistics.stdev(gains) / math.sqrt(len(gains)):
            taken = choice
    chosen = corrections(pairs)[taken]

    def calibrated(row: Row) -> float | None:
        seconds = predict(row)
        return None if seconds is None else chosen.seconds(seconds)

    return calibrated


def errors_of(pairs: Sequence[tuple[float, float]]) -> Errors:
    """Errors of (predicted, measured) pairs.

    Raises:
        ValueError: no pairs.
    """
    if not pairs:
        raise ValueError("errors need at least one pair of predicted and measured time")
    off = [predicted / measured - 1 for predicted, measured in pairs]
    sizes = sorted(map(abs, off))
    return Errors(
        n=len(off),
        mean=statistics.fmean(sizes),
        median=statistics.median(sizes),
        p90=sizes[math.ceil(0.9 * len(sizes)) - 1],
        bias=statistics.fmean(off),
        rank=rank_correlation([p for p, _ in pairs], [m for _, m in pairs]),
    )


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Spearman's rho, ties at their mean rank; None below three pairs or where one side is
    constant."""
    if len(xs) < 3 or len(set(xs)) == 1 or len(set(ys)) == 1:
        return None
    return statistics.correlation(_ranks(xs), _ranks(ys))


def _ranks(values: Sequence[float]) -> list[float]:
    places: dict[float, list[int]] = defaultdict(list)
    for place, value in enumerate(sorted(values)):
        places[value].append(place)
    return [statistics.fmean(places[value]) for value in values]


def _inside(kind: Kind, rows: Sequence[Row]) -> float | None:
    interval: Callable[[Row], tuple[float, float] | None] | None = kind.interval
    if interval is None:
        return None
    hits = [
        bounds[0] <= kind.measured(row) <= bounds[1]
        for row in rows
        if (bounds := interval(row)) is not None
    ]
    return statistics.fmean(hits) if hits else None


def pooled(scores: Sequence[Score]) -> dict[str, Errors]:
    """Errors over the rows of several stacks; ranks only hold within one stack."""
    found: dict[str, Errors] = {}
    for name in PREDICTORS:
        ratios = [(ratio, 1.0) for score in scores for ratio in score.ratios.get(name, ())]
        if ratios:
            found[name] = errors_of(ratios)
    return found
