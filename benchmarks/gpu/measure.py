"""How a case is timed, and what its times are set beside."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax

from benchmarks.gpu.cases import MAX_ROUNDS, MIN_ROUNDS, WARM_UPS
from benchmarks.record import spread
from jaxrl.observe import Observed, Observer, Work
from roofline.hardware import Hardware
from roofline.phases import Phase, PhaseCost
from roofline.predict import Prediction, compare_step, predict

Result = dict[str, Any]
"""What a finished case says, as JSON."""


def _nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A case that is ready to run. Its first call compiles."""

    once: Callable[[], Sequence[float]]
    """Runs the phase and waits for it; seconds of each call of it."""
    useful: Callable[[], Sequence[PhaseCost]]
    """Work that the results need, of one call; the bound follows from it. Asked after the last call."""
    executed: Callable[[], Sequence[PhaseCost]]
    """Work that the programs do, of one call; the calibrated prediction follows from it."""
    tokens: int
    """Tokens sampled, scored or trained on by one call; 0 where it has none."""
    model_flops: float = 0.0
    """Flops of the model itself: causal attention, nothing computed twice; 0: no MFU is given."""
    overlapped: bool = False
    """Phases run side by side, so the bound is that of their summed work, not the sum of bounds."""
    before: Callable[[], None] = _nothing
    """Untimed, before every call of `once`."""
    close: Callable[[], None] = _nothing
    programs: tuple[str, ...] = ()
    """Compiled programs that are the phase, for a profile; empty: all that `once` runs."""
    facts: Callable[[], Result] = dict
    """More that the results should say."""


def measure(
    prepared: Prepared, hardware: Hardware, seconds: float, min_rounds: int = MIN_ROUNDS
) -> Result:
    """Warm up, repeat for `seconds` [s] or `min_rounds` calls, and compare with the predictions."""
    began = time.perf_counter()
    peak_before = peak_bytes()
    for _ in range(WARM_UPS):
        prepared.before()
        prepared.once()
    warm_up_s = time.perf_counter() - began
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < MAX_ROUNDS:
        prepared.before()
        times += prepared.once()
        if len(times) >= min_rounds and time.perf_counter() - began > seconds:
            break
    peak = peak_bytes()
    return {
        **compared(prepared, hardware, statistics.median(times)),
        "measured_s": spread(times),
        "warm_up_s": warm_up_s,
        "peak_bytes": peak,
        "peak_is_this_cases": peak > peak_before,
        **prepared.facts(),
    }


def compared(prepared: Prepared, hardware: Hardware, measured_s: float) -> Result:
    """Bound and prediction beside a measured time, MFU, tokens per second."""
    needed = [predict(cost, hardware) for cost in prepared.useful()]
    done = [predict(cost, hardware) for cost in prepared.executed()]
    bound_s = sum(p.lower_s for p in needed)
    if prepared.overlapped:
        bound_s = _overlapped_bound_s(prepared.useful(), hardware)
        phase_s = _seconds_by_phase(done)
        expected_s = compare_step(phase_s, hardware).async_s
    else:
        expected_s = sum(p.expected_s for p in done)
    result: Result = {
        "bound_s": bound_s,
        "expected_s": expected_s,
        "binds": _binds(done),
        "share_of_bound": bound_s / measured_s,
        "ratio": measured_s / expected_s,
    }
    if prepared.tokens:
        result["tokens_per_s"] = prepared.tokens / measured_s
    if prepared.model_flops:
        dtype = prepared.useful()[0].dtype
        result["mfu"] = prepared.model_flops / measured_s / hardware.peak(dtype)
    return result


def _seconds_by_phase(predictions: Sequence[Prediction]) -> dict[Phase, float]:
    seconds: dict[Phase, float] = {}
    for p in predictions:
        seconds[p.phase] = seconds.get(p.phase, 0.0) + p.expected_s
    return seconds


def _overlapped_bound_s(costs: Sequence[PhaseCost], hardware: Hardware) -> float:
    """Work of several phases at the peaks when one's compute hides another's memory traffic."""
    compute_s = sum(cost.flops / hardware.peak(cost.dtype) for cost in costs)
    return max(compute_s, sum(cost.hbm_bytes for cost in costs) / hardware.hbm_bytes_per_s)


def _binds(predictions: Sequence[Prediction]) -> str:
    by_bound: dict[str, float] = {}
    for p in predictions:
        by_bound[p.bound] = by_bound.get(p.bound, 0.0) + p.expected_s
    return max(by_bound, key=lambda bound: by_bound[bound])


def peak_bytes() -> int:
    """Most device memory this process ever used; on a CPU, of host memory [bytes]."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is None:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(stats["peak_bytes_in_use"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One phase as the trainer's own code marked it."""

    phase: Phase
    seconds: float
    work: Work = field(default_factory=dict)


class Stopwatch(Observer):
    """Collects the spans that engine and learner report. Any thread."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[Span] = []

    def take(self) -> list[Span]:
        """Spans since the last call."""
        taken, self.spans = self.spans, []
        return taken

    def prefill(self, *, version: int) -> Observed:
        return self._timed(Phase.PREFILL)

    def decode(self, *, version: int) -> Observed:
        return self._timed(Phase.DECODE)

    def reference(self, microbatches: int) -> Observed:
        return self._timed(Phase.REFERENCE)

    def train(self, microbatches: int) -> Observed:
        return self._timed(Phase.TRAIN)

    def optimizer(self) -> Observed:
        return self._timed(Phase.OPTIMIZER)

    def publish(self, version: int) -> Observed:
        return self._timed(Phase.PUBLISH)

    def phase(self, phase: Phase, *, step: int | None = None) -> Observed:
        return self._timed(phase)

    def waited_for_learner(self, start: float) -> None:
        self.spans.append(Span(phase=Phase.WAIT_LEARNER, seconds=time.perf_counter() - start))

    @contextmanager
    def _timed(self, phase: Phase) -> Iterator[Work]:
        work: Work = {}
        began = time.perf_counter()
        yield work
        self.spans.append(Span(phase=phase, seconds=time.perf_counter() - began, work=work))


def seconds_of(spans: Sequence[Span], phase: Phase) -> list[float]:
    """Durations of one phase."""
    return [span.seconds for span in spans if span.phase == phase]
