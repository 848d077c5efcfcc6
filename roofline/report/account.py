"""Where the seconds of a measured step went, and how well calls were predicted. Standard library
only.

The waterfall of a lane takes the mean step between the first and the last publication and adds up
to it exactly:

    ideal           matrix products and memory at the peaks, perfectly overlapped
    efficiency      what the calibrated shares of the peaks add
    launch          fixed times of dispatches and kernels
    host            the calls' own host time: Python, transfers, waiting for the interpreter
    communication   transfers and collectives; nothing of them is assumed to be hidden
    sharing         the other lane and the verifiers at work on the same cores
    unexplained     measured less all of the above; negative where calls were faster than expected
    unpredicted     evaluation, checkpoints, compilation
    waiting         for the other lane
    between         Python, packing, logging: time in no span

The first seven add up to the time in spans with a prediction.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from roofline.analyse import DEVICE_LANES, companies, in_company, stepping
from roofline.phases import Phase
from roofline.predict import Company, beside, predict
from roofline.read_run import Run, Span

POINTS_PER_PHASE = 80
"""Calls of one phase that the scatter shows, evenly strided over the run."""
CALIBRATION_CALLS = 8
"""First calls of each phase, from which the constant-MFU baseline takes its one number; no
predictor is scored on them."""
TERMS = (
    "ideal", "efficiency", "launch", "host", "communication", "sharing", "unexplained", "unpredicted",
    "waiting", "between",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Waterfall:
    """One lane's mean step, term by term."""

    lane: str
    step_s: float
    """Mean time between two publications [s]."""
    steps: int
    terms_s: Mapping[str, float]
    """Seconds by name, in the order of TERMS; they add up to `step_s`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One measured call beside its expectation in company."""

    phase: Phase
    expected_s: float
    measured_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseErrors:
    """How far predictors are off on one phase's calls: medians of |predicted / measured - 1|."""

    phase: str
    """Or "all"."""
    calls: int
    ours: float
    """Calibrated, with the other lane computing as it did."""
    of_median: float
    """The same of the median call: |median expected / median measured - 1|, without the scatter of
    single calls; of all phases the median over the phases."""
    alone: float
    """Calibrated, as if nothing else ran."""
    bound: float
    """Roofline bound: peaks, perfect overlap."""
    constant_mfu: float | None
    """Flops at one share of the peak; None without flops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """Predictions of a run's calls against their measured times."""

    errors: tuple[PhaseErrors, ...]
    """By phase, "all" last."""
    mfu: float | None
    """The constant of `constant_mfu`: median share of the peak that the first calls reached."""
    calls: tuple[Call, ...]
    """A sample of the calls, for the scatter."""
    held_out: Mapping[str, float]
    """Calibration's own check: predicted / measured of shapes it did not fit."""


def waterfalls(run: Run) -> list[Waterfall]:
    """One per device lane; none for a run that published fewer than two versions."""
    window = stepping(run)
    if window is None:
        return []
    shares = companies(run.spans)
    return [
        _waterfall(run, lane, window, shares)
        for lane in DEVICE_LANES
        if any(span.lane == lane for span in run.spans)
    ]


def _waterfall(
    run: Run, lane: str, window: tuple[float, float, int], shares: Sequence[Company]
) -> Waterfall:
    start_s, end_s, steps = window
    terms: dict[str, float] = dict.fromkeys(TERMS, 0.0)
    inside: list[Span] = []
    for span, share in zip(run.spans, shares, strict=True):
        cut_s = min(span.end_s, end_s) - max(span.start_s, start_s)
        if span.lane != lane or cut_s <= 0:
            continue
        inside.append(span)
        if not span.computes:
            terms["waiting"] += cut_s
        elif span.cost is None or span.predicted_s is None:
            terms["unpredicted"] += cut_s
        else:
            part = cut_s / span.duration_s  # of a span that reaches beyond the window
            for name, seconds in _terms(run, span, share).items():
                terms[name] += part * seconds
    # spans of one lane follow each other; where two overlap, the common time is taken from between
    terms["between"] = (end_s - start_s) - sum(terms.values())
    step_s = (end_s - start_s) / steps
    return Waterfall(
        lane=lane, step_s=step_s, steps=steps, terms_s={n: s / steps for n, s in terms.items()}
    )


def _terms(run: Run, span: Span, company: Company) -> dict[str, float]:
    """A predicted call's own duration, split."""
    assert span.cost is not None
    seen, hardware, work = predict(span.cost, run.hardware), run.hardware, span.cost
    ideal = max(work.flops / hardware.peak(work.dtype), work.hbm_bytes / hardware.hbm_bytes_per_s)
    host_s = hardware.efficiency_of(span.phase).call_s
    latency = work.collectives * hardware.link_latency_s
    shared = beside(seen.expected_s, span.phase, company, hardware)
    return {
        "ideal": ideal,
        "efficiency": seen.expected_s - seen.overhead_s - seen.link_s - ideal,
        "launch": seen.overhead_s - latency - host_s,
        "host": host_s,
        "communication": seen.link_s + latency,
        "sharing": shared - seen.expected_s,
        "unexplained": span.duration_s - shared,
    }


def validation(run: Run) -> Validation | None:
    """Score the predictions on this run's calls; None where no call carried one."""
    shares = companies(run.spans)
    by_phase: dict[Phase, list[tuple[Span, float]]] = {}
    for span, share in zip(run.spans, shares, strict=True):
        if span.predicted_s and span.lower_s and span.duration_s > 0 and span.cost is not None:
            call = span, in_company(span, share, run.hardware)
            by_phase.setdefault(span.phase, []).append(call)
    if not by_phase:
        return None
    first = {p: min(CALIBRATION_CALLS, len(calls) // 2) for p, calls in by_phase.items()}
    reached = [
        _math_s(run, span) / span.duration_s
        for phase, calls in by_phase.items()
        for span, _ in calls[: first[phase]]
        if _math_s(run, span) > 0
    ]
    share_of_peak = statistics.median(reached) if reached else None
    scored = {phase: calls[first[phase] :] for phase, calls in by_phase.items()}
    rows = [
        _errors(run, phase.value, calls, share_of_peak) for phase, calls in sorted(scored.items())
    ]
    everything = [call for calls in scored.values() for call in calls]
    whole = dataclasses.replace(
        _errors(run, "all", everything, share_of_peak),
        of_median=statistics.median(row.of_median for row in rows),
    )
    return Validation(
        errors=(*rows, whole),
        mfu=share_of_peak,
        calls=tuple(
            Call(phase=phase, expected_s=expected, measured_s=span.duration_s)
            for phase, calls in scored.items()
            for span, expected in calls[:: max(1, len(calls) // POINTS_PER_PHASE)]
        ),
        held_out=run.hardware.held_out,
    )


def _math_s(run: Run, span: Span) -> float:
    """Flops of a call at the dense peak [s]."""
    return span.cost.flops / run.hardware.peak(span.cost.dtype) if span.cost else 0.0


def _errors(
    run: Run, name: str, calls: Sequence[tuple[Span, float]], share_of_peak: float | None
) -> PhaseErrors:
    def median(predicted: Callable[[Span, float], float]) -> float:
        return statistics.median(abs(predicted(s, e) / s.duration_s - 1) for s, e in calls)

    with_flops = [call for call in calls if _math_s(run, call[0]) > 0]
    constant = None
    if share_of_peak and with_flops:
        constant = statistics.median(
            abs(_math_s(run, s) / share_of_peak / s.duration_s - 1) for s, _ in with_flops
        )
    measured_s = statistics.median(s.duration_s for s, _ in calls)
    return PhaseErrors(
        phase=name,
        calls=len(calls),
        ours=median(lambda _, expected: expected),
        of_median=abs(statistics.median(expected for _, expected in calls) / measured_s - 1),
        alone=median(lambda span, _: span.predicted_s or 0.0),
        bound=median(lambda span, _: span.lower_s or 0.0),
        constant_mfu=constant,
    )


def concurrency(spans: Sequence[Span]) -> list[tuple[float, int]]:
    """(time, number of spans that run from then on), ascending in time [s]."""
    changes = sorted([(s.start_s, 1) for s in spans] + [(s.end_s, -1) for s in spans])
    level, steps = 0, []
    for time_s, change in changes:
        level += change
        if steps and steps[-1][0] == time_s:
            steps[-1] = (time_s, level)
        else:
            steps.append((time_s, level))
    return steps


def subrows(spans: Sequence[Span]) -> list[int]:
    """A row for each span, in the given order, such that no two spans of one row overlap; the
    fewest rows (first free row by start)."""
    order = sorted(range(len(spans)), key=lambda i: spans[i].start_s)
    free_from: list[float] = []
    rows = [0] * len(spans)
    for index in order:
        span = spans[index]
        row = next((r for r, end in enumerate(free_from) if end <= span.start_s), len(free_from))
        if row == len(free_from):
            free_from.append(0.0)
        free_from[row] = span.end_s
        rows[index] = row
    return rows
