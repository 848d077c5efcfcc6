"""Measured times beside predicted ones, under the same phase keys.

    rollout thread --\\
    learner thread ---+-- span()/add() --> buffer --(once per step)--> spans.jsonl
    reward thread ---/         |                                          |
                          open_spans() --> watchdog          close_step() --> time/*, roofline/*

Each line of spans.jsonl holds phase, lane, start_s (since the first start of the run), duration_s,
step, version, work (counts), cost (roofline.phases.PhaseCost of one device), predicted_s, lower_s,
bound. A thread that records a span only appends to a list; who closes the step writes the file.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from jaxrl.telemetry.jsonl import dump_line, finite_or_none, read_records
from roofline.phases import Phase, PhaseCost, PhaseTime

Lane = Literal["rollout", "learner", "reward"]
LANES: tuple[Lane, ...] = ("rollout", "learner", "reward")
"""Rows of the Gantt chart."""

_MAX_BUFFERED = (
    4096  # spans kept before a write outside close_step, so that long evaluations stay small
)
_IDLE_RATIOS = (
    ("perf/trainer_idle_ratio", Phase.WAIT_BATCH),
    ("perf/rollouter_idle_ratio", Phase.WAIT_LEARNER),
)
_COVERED = (Phase.REWARD, Phase.WAIT_BATCH, Phase.WAIT_LEARNER)


class Predicted(Protocol):
    """The part of roofline.predict.Prediction that a span needs."""

    @property
    def expected_s(self) -> float:
        """Predicted duration [s]."""
        ...

    @property
    def lower_s(self) -> float:
        """No program can be faster [s]."""
        ...

    @property
    def bound(self) -> str:
        """What binds: compute, memory, link, overhead."""
        ...


Predict = Callable[[PhaseCost], Predicted]


@dataclass(kw_only=True, slots=True, eq=False)
class Span:
    """A span under way. Cost, work and version may be set inside the `with`, once known."""

    phase: Phase
    lane: Lane
    start_s: float
    step: int
    version: int | None = None
    cost: PhaseCost | None = None
    work: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenSpan:
    """A span that has not ended, as the watchdog sees it."""

    phase: Phase
    lane: str
    start_s: float
    step: int
    predicted_s: float | None


@dataclass(kw_only=True, slots=True)
class _Window:
    """Sums over the spans that ended since the last close_step."""

    start_s: float
    calls: dict[Phase, int] = field(default_factory=lambda: defaultdict(int))
    measured_s: dict[Phase, float] = field(default_factory=lambda: defaultdict(float))
    predicted_s: dict[Phase, float] = field(default_factory=lambda: defaultdict(float))
    costed_s: dict[Phase, float] = field(default_factory=lambda: defaultdict(float))
    flops: dict[Phase, float] = field(default_factory=lambda: defaultdict(float))
    hbm_bytes: dict[Phase, float] = field(default_factory=lambda: defaultdict(float))
    intervals: dict[Phase, list[tuple[float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """(start, end) of waits and of verifications, which overlap."""


class SpanRecorder:
    """Collects spans of all threads and writes them to one file. Thread-safe."""

    def __init__(
        self,
        path: Path,
        *,
        predict: Predict | None = None,
        first_step: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Open the file; spans of an earlier start stay, and times go on where they ended.

        Args:
            path: spans.jsonl.
            predict: prediction for a cost; None leaves predicted_s, lower_s and bound empty.
            first_step: optimizer step under way; spans without a step of their own belong to it.
            clock: seconds, monotonic.
        """
        self._predict = predict
        self._clock = clock
        ends = (record["start_s"] + record["duration_s"] for record in read_records(path))
        self._origin_s = clock() - max(ends, default=0.0)
        self._lock = threading.Lock()
        self._file_lock = threading.Lock()
        self._file = path.open("a", encoding="utf-8")
        self._open: dict[int, Span] = {}
        self._buffer: list[dict[str, Any]] = []
        self._window = _Window(start_s=self.now_s())
        self._step = first_step
        atexit.register(self.close)

    def now_s(self) -> float:
        """Seconds since the first start of the run: the time base of every span."""
        return self._clock() - self._origin_s

    @contextlib.contextmanager
    def span(
        self,
        phase: Phase,
        lane: Lane,
        *,
        step: int | None = None,
        version: int | None = None,
        cost: PhaseCost | None = None,
        work: Mapping[str, float] | None = None,
    ) -> Iterator[Span]:
        """Time what happens inside the `with`; if that raises, the time is kept, not the cost."""
        span = Span(
            phase=phase,
            lane=_checked(lane),
            start_s=self.now_s(),
            step=self._step if step is None else step,
            version=version,
            cost=cost,
            work=work or {},
        )
        with self._lock:
            self._open[id(span)] = span
        try:
            yield span
        except BaseException:
            span.cost = None
            raise
        finally:
            self._record(span, self.now_s() - span.start_s)

    def add(
        self,
        measured: PhaseTime,
        *,
        cost: PhaseCost | None = None,
        work: Mapping[str, float] | None = None,
    ) -> None:
        """Record a span that was timed elsewhere, with start_s on the time base of `now_s`."""
        span = Span(
            phase=measured.phase,
            lane=_checked(measured.lane),
            start_s=measured.start_s,
            step=self._step if measured.step is None else measured.step,
            version=measured.version,
            cost=cost,
            work=work or {},
        )
        self._record(span, measured.duration_s)

    def _record(self, span: Span, duration_s: float) -> None:
        predicted = self._predict(span.cost) if self._predict and span.cost else None
        line = _line(span, duration_s, predicted)
        with self._lock:
            self._open.pop(id(span), None)
            self._buffer.append(line)
            self._count(span, duration_s, predicted)
            full = len(self._buffer) >= _MAX_BUFFERED
        if full:
            self.flush()

    def _count(self, span: Span, duration_s: float, predicted: Predicted | None) -> None:
        window = self._window
        window.calls[span.phase] += 1
        window.measured_s[span.phase] += duration_s
        if predicted is not None:
            window.predicted_s[span.phase] += predicted.expected_s
            window.costed_s[span.phase] += duration_s
            if span.cost is not None:
                window.flops[span.phase] += span.cost.flops
                window.hbm_bytes[span.phase] += span.cost.hbm_bytes
        if span.phase in _COVERED:
            window.intervals[span.phase].append((span.start_s, span.start_s + duration_s))

    def open_spans(self) -> tuple[OpenSpan, ...]:
        """Spans that have begun and not ended, oldest first."""
        with self._lock:
            spans = list(self._open.values())
        return tuple(
            OpenSpan(
                phase=span.phase,
                lane=span.lane,
                start_s=span.start_s,
                step=span.step,
                predicted_s=self._predict(span.cost).expected_s
                if self._predict and span.cost
                else None,
            )
            for span in spans
        )

    def close_step(self, step: int) -> dict[str, float]:
        """Metrics of the time since the last call, and write the spans to the file.

        time/<phase>_s sums every span that ended in this time; groups overlap at the verifiers, so
        that time/reward_s is the time that at least one of them took. roofline/<phase>/* sum only spans
        with a prediction; ratio = measured_s / predicted_s. The idle ratios are the share of this
        time that a lane spent waiting, open waits included; they lie in [0, 1].
        """
        now_s = self.now_s()
        with self._lock:
            window, self._window = self._window, _Window(start_s=now_s)
            for span in self._open.values():
                if span.phase in _COVERED:
                    window.intervals[span.phase].append((span.start_s, now_s))
            self._step = step + 1
        self.flush()
        return _window_metrics(window, now_s)

    def flush(self) -> None:
        """Write what is buffered."""
        with self._file_lock:
            with self._lock:
                lines, self._buffer = self._buffer, []
            if lines and not self._file.closed:
                self._file.write("".join(map(dump_line, lines)))
                self._file.flush()

    def close(self) -> None:
        """Write what is buffered and close the file; may be called twice."""
        atexit.unregister(self.close)
        try:
            self.flush()
        finally:
            self._file.close()


def _checked(lane: str) -> Lane:
    for known in LANES:
        if lane == known:
            return known
    raise ValueError(f"lane={lane!r} is not a lane; use one of {', '.join(LANES)}")


def _line(span: Span, duration_s: float, predicted: Predicted | None) -> dict[str, Any]:
    cost = None if span.cost is None else dataclasses.asdict(span.cost)
    if cost is not None:
        del cost["phase"]
    return {
        "phase": str(span.phase),
        "lane": span.lane,
        "start_s": round(span.start_s, 7),
        "duration_s": round(duration_s, 7),
        "step": span.step,
        "version": span.version,
        "work": dict(span.work),
        "cost": cost,
        "predicted_s": finite_or_none(predicted.expected_s) if predicted else None,
        "lower_s": finite_or_none(predicted.lower_s) if predicted else None,
        "bound": predicted.bound if predicted else None,
    }


def _window_metrics(window: _Window, end_s: float) -> dict[str, float]:
    """Metrics of one window; see SpanRecorder.close_step."""
    metrics: dict[str, float] = {}
    for phase, measured_s in window.measured_s.items():
        if phase == Phase.REWARD:
            measured_s = covered_s(window.intervals[phase])
        metrics[f"time/{phase}_s"] = measured_s
        metrics[f"time/{phase}_calls"] = window.calls[phase]
    for phase, predicted_s in window.predicted_s.items():
        metrics[f"roofline/{phase}/predicted_s"] = predicted_s
        metrics[f"roofline/{phase}/measured_s"] = window.costed_s[phase]
        if predicted_s > 0:
            metrics[f"roofline/{phase}/ratio"] = window.costed_s[phase] / predicted_s
        if window.costed_s[phase] > 0:
            metrics[f"roofline/{phase}/flops_per_s"] = window.flops[phase] / window.costed_s[phase]
            metrics[f"roofline/{phase}/bytes_per_s"] = (
                window.hbm_bytes[phase] / window.costed_s[phase]
            )
    length_s = end_s - window.start_s
    for name, phase in _IDLE_RATIOS:
        waited_s = covered_s(window.intervals[phase], window.start_s, end_s)
        metrics[name] = waited_s / length_s if length_s > 0 else 0.0
    return metrics


def covered_s(
    intervals: Sequence[tuple[float, float]], start_s: float = -math.inf, end_s: float = math.inf
) -> float:
    """Length of the union of (start, end) intervals inside [start_s, end_s]."""
    total_s, reached_s = 0.0, start_s
    for begin, end in sorted(intervals):
        begin, end = max(begin, reached_s), min(end, end_s)
        if end > begin:
            total_s += end - begin
            reached_s = end
    return total_s
