"""Spans: nothing lost, predicted beside measured, idle shares that are shares; the watchdog."""

import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from jaxrl.telemetry.spans import SpanRecorder, covered_s
from jaxrl.telemetry.watchdog import HangError, Limits, Watchdog
from roofline.phases import Phase, PhaseCost, PhaseTime

ROOT = Path(__file__).resolve().parents[2]
ROUNDING_S = 1e-6  # spans.jsonl keeps seven decimals, a tenth of a microsecond


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds


@dataclass
class Prediction:
    expected_s: float
    lower_s: float
    bound: str = "compute"


def predict(cost: PhaseCost) -> Prediction:
    """One gigaflop per second, half of it hidden."""
    return Prediction(cost.flops / 1e9, cost.flops / 2e9)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "spans.jsonl"


@pytest.fixture
def recorder(path, clock):
    recorder = SpanRecorder(path, predict=predict, clock=clock)
    yield recorder
    recorder.close()


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _cost(seconds: float, phase: Phase = Phase.TRAIN) -> PhaseCost:
    return PhaseCost(phase=phase, flops=seconds * 1e9, hbm_bytes=3.0, launches=2)


def test_a_span_is_written_with_its_prediction(recorder, clock, path):
    with recorder.span(Phase.DECODE, "rollout", version=4, work={"tokens": 64}) as span:
        clock.pass_s(0.5)
        span.cost = _cost(0.25, Phase.DECODE)
    recorder.close_step(1)
    (line,) = _read(path)
    assert line["cost"].items() >= {"flops": 0.25e9, "hbm_bytes": 3.0, "launches": 2}.items()
    assert PhaseCost(phase=Phase.DECODE, **line.pop("cost")) == _cost(0.25, Phase.DECODE)
    assert line == {
        "phase": "decode",
        "lane": "rollout",
        "start_s": 0.0,
        "duration_s": 0.5,
        "step": 1,
        "version": 4,
        "work": {"tokens": 64},
        "predicted_s": 0.25,
        "lower_s": 0.125,
        "bound": "compute",
    }


def test_a_step_sums_measured_and_predicted_per_phase(recorder, clock):
    for measured_s in (0.5, 1.5):
        with recorder.span(Phase.TRAIN, "learner", cost=_cost(0.5)):
            clock.pass_s(measured_s)
    with recorder.span(Phase.TRAIN, "learner"):  # without a cost: in the time, not in the ratio
        clock.pass_s(4.0)
    metrics = recorder.close_step(1)
    assert metrics["time/train_s"] == pytest.approx(6.0)
    assert metrics["time/train_calls"] == 3
    assert metrics["roofline/train/predicted_s"] == pytest.approx(1.0)
    assert metrics["roofline/train/measured_s"] == pytest.approx(2.0)
    assert metrics["roofline/train/ratio"] == pytest.approx(2.0)
    assert metrics["roofline/train/flops_per_s"] == pytest.approx(1e9 / 2.0)
    assert metrics["roofline/train/bytes_per_s"] == pytest.approx(6.0 / 2.0)


def test_a_step_counts_only_its_own_spans(recorder, clock, path):
    for step in (1, 2):
        with recorder.span(Phase.TRAIN, "learner"):
            clock.pass_s(float(step))
        assert recorder.close_step(step)["time/train_s"] == pytest.approx(step)
    assert [line["step"] for line in _read(path)] == [1, 2]


def test_verifications_that_overlap_are_not_added_up(recorder, clock):
    clock.pass_s(3.0)
    for start_s in (0.0, 0.5, 2.0):
        timed = PhaseTime(phase=Phase.REWARD, lane="reward", start_s=start_s, duration_s=1.0)
        recorder.add(timed)
    metrics = recorder.close_step(1)
    assert metrics["time/reward_calls"] == 3
    assert metrics["time/reward_s"] == pytest.approx(2.5)


def test_idle_ratios_count_open_waits_and_clip_old_ones(recorder, clock):
    with recorder.span(Phase.WAIT_LEARNER, "rollout"):
        clock.pass_s(1.0)
        with recorder.span(Phase.WAIT_BATCH, "learner"):
            clock.pass_s(3.0)
        first = recorder.close_step(1)
        clock.pass_s(2.0)
    clock.pass_s(6.0)
    second = recorder.close_step(2)
    assert first["perf/rollouter_idle_ratio"] == pytest.approx(1.0)
    assert first["perf/trainer_idle_ratio"] == pytest.approx(0.75)
    assert second["perf/rollouter_idle_ratio"] == pytest.approx(0.25)
    assert second["perf/trainer_idle_ratio"] == 0.0


@given(st.lists(st.tuples(st.floats(-2, 3), st.floats(-2, 3)).map(sorted).map(tuple), max_size=6))
def test_covered_time_is_a_share_of_the_window_and_ignores_order(intervals):
    covered = covered_s(intervals, 0.0, 1.0)
    assert 0.0 <= covered <= 1.0
    assert covered == covered_s(intervals[::-1], 0.0, 1.0)
    inside = [min(end, 1.0) - max(begin, 0.0) for begin, end in intervals]
    assert max([0.0, *inside]) <= covered + ROUNDING_S
    assert covered <= sum(max(0.0, part) for part in inside) + ROUNDING_S


def _fail(clock: Clock) -> None:
    clock.pass_s(2.0)
    raise RuntimeError("boom")


def test_a_span_that_fails_keeps_its_time_and_loses_its_cost(recorder, clock, path):
    failing = recorder.span(Phase.TRAIN, "learner", cost=_cost(1.0))
    with pytest.raises(RuntimeError, match="boom"), failing:
        _fail(clock)
    assert recorder.open_spans() == ()
    assert "roofline/train/ratio" not in recorder.close_step(1)
    assert [(line["duration_s"], line["predicted_s"]) for line in _read(path)] == [(2.0, None)]


def test_no_span_of_any_thread_is_lost(path):
    recorder = SpanRecorder(path)
    threads, spans = 8, 200
    start = threading.Barrier(threads + 1)

    def work(thread: int) -> None:
        start.wait()
        for i in range(spans):
            with recorder.span(Phase.DECODE, "rollout", version=thread, work={"i": i}):
                pass

    running = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
    for thread in running:
        thread.start()
    start.wait()
    calls = sum(recorder.close_step(step).get("time/decode_calls", 0) for step in range(1, 6))
    for thread in running:
        thread.join()
    calls += recorder.close_step(6).get("time/decode_calls", 0)
    recorder.close()
    written = {(line["version"], line["work"]["i"]) for line in _read(path)}
    assert calls == threads * spans
    assert written == {(thread, i) for thread in range(threads) for i in range(spans)}


def test_spans_are_written_when_the_process_ends_without_closing(path):
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from jaxrl.telemetry.spans import SpanRecorder\nfrom roofline.phases import Phase\n"
        "recorder = SpanRecorder(Path(sys.argv[1]))\n"
        "with recorder.span(Phase.TRAIN, 'learner'): pass\n"
        "sys.exit(3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, check=False, timeout=60
    )
    assert done.returncode == 3
    assert [line["phase"] for line in _read(path)] == ["train"]


def test_a_second_start_goes_on_where_the_first_ended(recorder, clock, path):
    clock.pass_s(1.0)
    recorder.add(PhaseTime(phase=Phase.REWARD, lane="reward", start_s=0.5, duration_s=2.0, step=3))
    recorder.close()
    later = SpanRecorder(path, first_step=4, clock=Clock())
    assert later.now_s() == pytest.approx(2.5)
    with later.span(Phase.TRAIN, "learner"):
        pass
    later.close()
    assert [(line["start_s"], line["step"]) for line in _read(path)] == [(0.5, 3), (2.5, 4)]


def test_an_unknown_lane_is_refused(recorder):
    with pytest.raises(ValueError, match="rollout, learner, reward"):
        recorder.add(PhaseTime(phase=Phase.TRAIN, lane="trainer", start_s=0.0, duration_s=1.0))


def test_open_spans_name_what_runs_now(recorder, clock):
    with recorder.span(Phase.WAIT_BATCH, "learner"):
        clock.pass_s(1.0)
        with recorder.span(Phase.DECODE, "rollout", cost=_cost(0.5, Phase.DECODE)):
            seen = [(s.phase, s.start_s, s.predicted_s) for s in recorder.open_spans()]
    assert seen == [(Phase.WAIT_BATCH, 0.0, None), (Phase.DECODE, 1.0, 0.5)]
    assert recorder.open_spans() == ()


def _watchdog(recorder, **limits) -> tuple[Watchdog, list[HangError]]:
    heard: list[HangError] = []
    return Watchdog(recorder.open_spans, recorder.now_s, Limits(**limits), heard.append), heard


def test_the_watchdog_names_the_working_phase_not_the_one_that_waits_for_it(recorder, clock):
    watchdog, heard = _watchdog(recorder, factor=10, floor_s=1.0)
    with (
        recorder.span(Phase.WAIT_BATCH, "learner"),
        recorder.span(Phase.DECODE, "rollout", cost=_cost(0.5, Phase.DECODE)),
    ):
        clock.pass_s(4.9)
        first = watchdog.check()
        clock.pass_s(0.2)
        watchdog.check()
    assert first is not None  # the wait has no prediction, only the floor
    assert "wait_batch" in str(first)
    assert heard == [first]

    watchdog, heard = _watchdog(recorder, factor=10, floor_s=1.0)
    with (
        recorder.span(Phase.WAIT_BATCH, "learner"),
        recorder.span(Phase.DECODE, "rollout", cost=_cost(0.5, Phase.DECODE)),
    ):
        clock.pass_s(5.1)
        assert "phase decode (rollout, step 1)" in str(watchdog.check())
    assert len(heard) == 1


def test_the_limit_is_a_multiple_of_the_prediction_and_at_least_the_floor(recorder, clock):
    watchdog, _ = _watchdog(
        recorder, factor=10, floor_s=1.0, predicted_s={Phase.TRAIN: 0.5, Phase.DECODE: 2.0}
    )
    with recorder.span(Phase.TRAIN, "learner"):
        clock.pass_s(5.0)
        assert watchdog.check() is None
    with recorder.span(Phase.WAIT_BATCH, "learner"):  # waits for all phases together
        clock.pass_s(25.0)
        assert watchdog.check() is None
    with recorder.span(Phase.EVAL, "learner"):
        clock.pass_s(1.1)
        assert watchdog.check() is not None


def test_a_hang_is_reported_once_and_raised_in_the_thread_that_asks(recorder, clock):
    watchdog, heard = _watchdog(recorder, floor_s=1.0)
    watchdog.raise_if_hung()
    with recorder.span(Phase.TRAIN, "learner"):
        clock.pass_s(2.0)
        watchdog.check()
        watchdog.check()
    assert len(heard) == 1
    with pytest.raises(HangError, match="phase train"):
        watchdog.raise_if_hung()


def test_the_watchdog_thread_finds_a_hang_and_ends(recorder, clock):
    found = threading.Event()
    watchdog = Watchdog(
        recorder.open_spans, recorder.now_s, Limits(floor_s=1.0), lambda error: found.set()
    )
    before = threading.active_count()
    with recorder.span(Phase.TRAIN, "learner"):
        clock.pass_s(2.0)
        watchdog.start(every_s=0.001)
        assert found.wait(timeout=10)
    watchdog.stop()
    assert threading.active_count() == before


def test_abort_ends_a_stuck_process_with_the_phase_and_the_stacks():
    program = (
        "import threading\nfrom jaxrl.telemetry.watchdog import HangError, abort\n"
        "threading.Thread(target=abort, args=(HangError('phase decode hangs'),)).start()\n"
        "threading.Event().wait()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "Error: phase decode hangs" in done.stderr
    assert "most recent call first" in done.stderr
