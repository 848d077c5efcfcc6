"""What a run's spans say: per phase, per lane, and in words. Standard library only.

Lanes on shared cores stretch each other. From the spans follows for how much of each call another
lane was at work; `roofline.predict.stretched` turns the prediction for the call alone into one
for the call in company, which is what the measured time is compared with. Verifiers are left out of
this: their spans hold queueing and latency, not computing.
"""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from roofline.estimate import QUANTILE_95, SPREAD_PRIOR, SPREAD_PRIOR_STEPS
from roofline.hardware import Hardware
from roofline.phases import Phase, PhaseCost
from roofline.predict import LANES, Company, StepComparison, beside, compare_step, mbu, mfu
from roofline.read_run import WAITING, Run, Span

DEVICE_LANES = ("rollout", "learner")
"""Lanes that compute on devices and so can disturb each other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseRow:
    """All calls of one phase. Times are per call; predictions None where no call carried one."""

    phase: Phase
    calls: int
    measured_s: float
    """Sum over all calls, overlapping ones counted each."""
    median_s: float
    p10_s: float
    p90_s: float
    lower_s: float | None
    """Median of the roofline bound."""
    alone_s: float | None
    """Median of the expectation with nothing else running."""
    shared_s: float | None
    """Median of the expectation with the other lane computing as it did."""
    low_s: float | None
    """Lower end of the 90 % interval around `shared_s`; None on hardware that nobody calibrated."""
    high_s: float | None
    ratio: float | None
    """Measured over expected in company, both summed over the calls with a prediction."""
    overlap: float
    """Mean share of a call during which the other lane computed."""
    bound: str | None
    cost: PhaseCost | None
    """Mean work of a call."""
    intensity: float | None
    """Flops per byte of memory traffic."""
    mfu: float | None
    mbu: float | None
    wall_share: float
    """Time covered by at least one call over the run's wall time, in [0, 1]."""
    step_share: float | None
    """The same between the first and the last publication: the share of an optimizer step. None in
    a run that published fewer than two versions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneRow:
    """How one lane spent the run, as shares of the wall time."""

    lane: str
    computing: float
    waiting: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """One optimizer step."""

    predicted: StepComparison
    """From the expectations alone (phases without one: as measured)."""
    measured_s: float
    """Median distance between optimizer steps."""
    steps: int


def phase_rows(run: Run) -> list[PhaseRow]:
    """One row per phase that occurred, in the order of `Phase`."""
    shares = companies(run.spans)
    window = stepping(run)
    by_phase: dict[Phase, list[int]] = {}
    for index, span in enumerate(run.spans):
        by_phase.setdefault(span.phase, []).append(index)
    return [
        _row(run, phase, by_phase[phase], shares, window) for phase in Phase if phase in by_phase
    ]


def stepping(run: Run) -> tuple[float, float, int] | None:
    """From the end of the first publication to that of the last [s, s], and the steps in between;
    None with fewer than two."""
    ends = sorted(s.end_s for s in run.spans if s.phase is Phase.PUBLISH)
    return (ends[0], ends[-1], len(ends) - 1) if len(ends) > 1 and ends[-1] > ends[0] else None


def spread(hardware: Hardware) -> float | None:
    """Standard deviation of log(measured / expected): from the shapes that calibration held out,
    with the prior of `roofline.estimate`; None for hardware that nobody calibrated."""
    if not hardware.calibrated:
        return None
    known = sum(math.log(ratio) ** 2 for ratio in hardware.held_out.values())
    known += SPREAD_PRIOR_STEPS * SPREAD_PRIOR**2
    return math.sqrt(known / (len(hardware.held_out) + SPREAD_PRIOR_STEPS))


def _row(
    run: Run, phase: Phase, indices: Sequence[int], shares: Sequence[Company],
    window: tuple[float, float, int] | None,
) -> PhaseRow:  # fmt: skip
    spans = [run.spans[i] for i in indices]
    durations = sorted(span.duration_s for span in spans)
    known = [(run.spans[i], shares[i]) for i in indices if run.spans[i].predicted_s is not None]
    alone = [span.predicted_s or 0.0 for span, _ in known]
    shared = [in_company(span, company, run.hardware) for span, company in known]
    lower = [span.lower_s for span, _ in known if span.lower_s is not None]
    measured = sum(span.duration_s for span, _ in known)
    costed = [span for span, _ in known if span.cost is not None and span.duration_s > 0]
    total = _total([span.cost for span in costed if span.cost is not None])
    costed_s = sum(span.duration_s for span in costed)
    bounds = [span.bound for span, _ in known if span.bound]
    expected_s = statistics.median(shared) if shared else None
    low_s, high_s = interval(expected_s, run.hardware)
    covered = Covered(spans)
    return PhaseRow(
        phase=phase,
        calls=len(spans),
        measured_s=sum(durations),
        median_s=statistics.median(durations),
        p10_s=_quantile(durations, 0.1),
        p90_s=_quantile(durations, 0.9),
        lower_s=statistics.median(lower) if lower else None,
        alone_s=statistics.median(alone) if alone else None,
        shared_s=expected_s,
        low_s=low_s,
        high_s=high_s,
        ratio=measured / sum(shared) if sum(shared) > 0 else None,
        overlap=statistics.fmean(shares[i].lane for i in indices),
        bound=statistics.mode(bounds) if bounds else None,
        cost=_mean(total, len(costed)),
        intensity=total.flops / total.hbm_bytes if total and total.hbm_bytes > 0 else None,
        mfu=mfu(total, costed_s, run.hardware) if total else None,
        mbu=mbu(total, costed_s, run.hardware) if total else None,
        wall_share=covered.total_s / run.wall_s if run.wall_s > 0 else 0.0,
        step_share=(
            covered.covered_s(window[0], window[1]) / (window[1] - window[0]) if window else None
        ),
    )


def in_company(span: Span, company: Company, hardware: Hardware) -> float:
    """Expected seconds of a predicted call in this company."""
    return beside(span.predicted_s or 0.0, span.phase, company, hardware)


def interval(expected_s: float | None, hardware: Hardware) -> tuple[float | None, float | None]:
    """Ends of the 90 % interval around an expectation, if log errors are normal [s]."""
    deviation = spread(hardware)
    if expected_s is None or deviation is None:
        return None, None
    factor = math.exp(QUANTILE_95 * deviation)
    return expected_s / factor, expected_s * factor


def _total(costs: Sequence[PhaseCost]) -> PhaseCost | None:
    return None if not costs else sum(costs[1:], start=costs[0])


def _mean(total: PhaseCost | None, calls: int) -> PhaseCost | None:
    if total is None:
        return None
    return PhaseCost(
        phase=total.phase,
        flops=total.flops / calls,
        hbm_bytes=total.hbm_bytes / calls,
        streamed_bytes=total.streamed_bytes / calls,
        link_bytes=total.link_bytes / calls,
        launches=round(total.launches / calls),
        collectives=round(total.collectives / calls),
        dispatches=round(total.dispatches / calls),
        dtype=total.dtype,
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between the values of a sorted sequence."""
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def companies(spans: Sequence[Span]) -> list[Company]:
    """For what shares of each span the other device lane and the verifiers were at work.

    A lane that records when it waits is at work all the rest of its time, between its spans in
    Python; one that never waits, in its spans. Spans that compute on no device have no company.
    """
    busy = {lane: _at_work([s for s in spans if s.lane == lane]) for lane in DEVICE_LANES}
    verifying = Covered([s for s in spans if s.phase is Phase.REWARD])
    found = []
    for span in spans:
        if span.lane not in DEVICE_LANES or not span.computes or span.duration_s == 0:
            found.append(Company())
            continue
        others = [busy[lane] for lane in DEVICE_LANES if lane != span.lane]
        covered = sum(other.covered_s(span.start_s, span.end_s) for other in others)
        verified = verifying.covered_s(span.start_s, span.end_s)
        found.append(
            Company(
                lane=min(1.0, covered / span.duration_s),
                verifiers=min(1.0, verified / span.duration_s),
            )
        )
    return found


def overlaps(spans: Sequence[Span]) -> list[float]:
    """Share of each span during which the other device lane was at work, in [0, 1]."""
    return [company.lane for company in companies(spans)]


def _at_work(spans: Sequence[Span]) -> Covered:
    """When the lane with these spans worked."""
    waits = sorted((s.start_s, s.end_s) for s in spans if not s.computes)
    if not waits:
        return Covered(spans)
    at_work, at_s = [], min(s.start_s for s in spans)
    for start_s, end_s in waits:
        if start_s > at_s:
            at_work.append((at_s, start_s))
        at_s = max(at_s, end_s)
    return Covered.of([*at_work, (at_s, max(at_s, *(s.end_s for s in spans)))])


class Covered:
    """Time covered by a set of spans, answered for any window in logarithmic time."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._cover((span.start_s, span.end_s) for span in spans)

    @classmethod
    def of(cls, intervals: Iterable[tuple[float, float]]) -> Covered:
        """Of (start, end) intervals [s]."""
        covered = cls(())
        covered._cover(intervals)
        return covered

    def _cover(self, intervals: Iterable[tuple[float, float]]) -> None:
        self._starts: list[float] = []
        self._ends: list[float] = []
        for start_s, end_s in sorted(intervals):
            if self._ends and start_s <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end_s)
            else:
                self._starts.append(start_s)
                self._ends.append(end_s)
        lengths = (end - start for start, end in zip(self._starts, self._ends, strict=True))
        self._before = [0.0, *itertools.accumulate(lengths)]

    @property
    def total_s(self) -> float:
        """Time in which at least one of the spans ran [s]."""
        return self._before[-1]

    def _until(self, time_s: float) -> float:
        """Covered time left of `time_s`."""
        index = bisect.bisect_right(self._starts, time_s)
        if index == 0:
            return 0.0
        inside = min(time_s, self._ends[index - 1]) - self._starts[index - 1]
        return self._before[index - 1] + inside

    def covered_s(self, start_s: float, end_s: float) -> float:
        """Covered time inside [start_s, end_s]."""
        return self._until(end_s) - self._until(start_s)


def lane_rows(run: Run) -> list[LaneRow]:
    """Computing and waiting shares of each lane that occurred."""
    rows = []
    first = min(s.start_s for s in run.spans)
    for lane in LANES:
        spans = [s for s in run.spans if s.lane == lane]
        if not spans or run.wall_s <= 0:
            continue
        until = first + run.wall_s
        busy = Covered([s for s in spans if s.computes]).covered_s(first, until)
        idle = Covered([s for s in spans if not s.computes]).covered_s(first, until)
        rows.append(LaneRow(lane=lane, computing=busy / run.wall_s, waiting=idle / run.wall_s))
    return rows


def step_times(run: Run) -> StepTimes | None:
    """Predicted and measured time of an optimizer step; None without two recorded steps."""
    walls = [row["wall_s"] for row in run.metrics if isinstance(row.get("wall_s"), int | float)]
    gaps = [b - a for a, b in itertools.pairwise(walls)]
    if not gaps:
        return None
    steps = len(walls)
    of_step = {phase for phases in LANES.values() for phase in phases}
    seconds: dict[Phase, float] = {}
    for span in run.spans:
        if span.phase in of_step:
            value = span.duration_s if span.predicted_s is None else span.predicted_s
            seconds[span.phase] = seconds.get(span.phase, 0.0) + value / steps
    # a verifier's span holds queueing and latency: it occupies no core, and groups overlap
    reward = Covered([s for s in run.spans if s.phase == Phase.REWARD])
    if Phase.REWARD in seconds:
        seconds[Phase.REWARD] = reward.total_s / steps
    waiting = {p: s for p, s in seconds.items() if p == Phase.REWARD}
    predicted = compare_step(seconds, run.hardware, waiting_s=waiting)
    return StepTimes(predicted=predicted, measured_s=statistics.median(gaps), steps=steps)


def story(run: Run, rows: Sequence[PhaseRow]) -> list[str]:
    """Where the time went, as sentences."""
    lines = []
    for lane in lane_rows(run):
        if lane.lane not in DEVICE_LANES:
            lines.append(f"{lane.lane}: a verifier was busy {lane.computing:.0%} of the wall time.")
            continue
        rest = max(0.0, 1 - lane.computing - lane.waiting)
        lines.append(
            f"{lane.lane}: computing {lane.computing:.0%} of the wall time, waiting "
            f"{lane.waiting:.0%}, neither {rest:.0%} (Python, packing, logging)."
        )
    work = sorted((r for r in rows if r.phase not in WAITING), key=lambda r: -r.wall_share)
    if work:
        top = ", ".join(f"{r.phase} {r.wall_share:.0%}" for r in work[:3])
        lines.append(f"The largest phases by share of the wall time: {top}.")
    for row in work:
        if row.ratio is not None and row.alone_s and not 0.8 <= row.ratio <= 1.25:
            lines.append(_outlier(row))
    if times := step_times(run):
        best = times.predicted
        lines.append(
            f"The phases of a step (verification as measured) are predicted to take "
            f"{best.sync_s:.3g} s in lockstep and {best.async_s:.3g} s with the lanes side by side "
            f"({best.speedup:.2f} times as fast), without what happens between phases; the median "
            f"of {times.steps} steps took {times.measured_s:.3g} s."
        )
    return lines


def _outlier(row: PhaseRow) -> str:
    word = "slower" if (row.ratio or 1) > 1 else "faster"
    factor = max(row.ratio or 1, 1 / (row.ratio or 1))
    spread = row.p90_s / row.p10_s if row.p10_s > 0 else 1.0
    reasons = [f"bound by {row.bound}"] if row.bound else []
    if row.overlap > 0.05:
        reasons.append(f"another lane computed during {row.overlap:.0%} of it, already counted")
    if spread > 2:
        reasons.append(f"p90 is {spread:.1f} times p10, so the machine or the shapes vary")
    return f"{row.phase} is {factor:.2f} times {word} than expected ({'; '.join(reasons)})."
