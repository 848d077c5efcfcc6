"""The fit recovers known shares; a calibration of this machine is complete, cached and sane."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from models.config import ModelConfig
from models.sharding import make_mesh
from roofline import cost
from roofline.calibrate import Workload, cached_or_calibrate, calibrate, measure, timing
from roofline.calibrate import __main__ as command
from roofline.calibrate.micro import (
    CHAIN_S,
    Rates,
    _collectives,
    exchanges,
    long_enough,
    with_better,
)
from roofline.datasheets import datasheet
from roofline.fit import Sample, fit_all, fit_phase, held_out_ratios
from roofline.hardware import Efficiency, Hardware
from roofline.kernels import Layout
from roofline.machine import busy_core_s
from roofline.phases import Phase, PhaseCost
from roofline.predict import predict

MODEL = ModelConfig(
    vocab_size=20, width=32, num_layers=3, num_heads=4, num_kv_heads=2, head_size=8, ffw_size=64
)
SMALL = Workload(slots=8, kv_len=8, chunk_steps=2, rows=4, row_tokens=16)
FIT_ERROR = 0.10  # what the prior's pull may leave, of noiseless times
LIMIT_S = 0.01  # a call of SMALL takes well below a millisecond


def made_up_samples(truth: Efficiency, shapes: list[tuple[int, int]]) -> list[Sample]:
    hardware = dataclasses.replace(datasheet("h100-sxm"), phase_efficiency={"train": truth})
    samples = []
    for rows, tokens in shapes:
        work = cost.train(MODEL, Layout(), tokens, rows)
        measured_s = predict(work, hardware).expected_s
        samples.append(Sample(name=f"{rows}x{tokens}", cost=work, measured_s=measured_s))
    return samples


@pytest.mark.parametrize(
    "truth",
    [
        Efficiency(compute=0.8, memory=0.6, kernel_s=4e-6),
        Efficiency(compute=0.02, memory=0.3, kernel_s=1e-7),
        Efficiency(compute=0.3, memory=0.01, kernel_s=3e-5),
    ],
)
def test_the_fit_explains_what_it_saw_and_shapes_between(truth: Efficiency) -> None:
    hardware = datasheet("h100-sxm")
    seen = made_up_samples(truth, [(512, 256), (64, 64), (4096, 32)])
    fitted = fit_phase(seen, hardware, hardware.efficiency)
    between = made_up_samples(truth, [(256, 256), (1024, 64)])
    for ratio in held_out_ratios(
        seen + between, dataclasses.replace(hardware, phase_efficiency={"train": fitted})
    ).values():
        assert ratio == pytest.approx(1, rel=FIT_ERROR)


def test_one_sample_is_met_and_leaves_the_rest_at_the_prior() -> None:
    hardware = datasheet("h100-sxm")
    (sample,) = made_up_samples(hardware.efficiency, [(64, 64)])
    fitted = fit_phase([sample], hardware, hardware.efficiency)
    assert fitted.compute == pytest.approx(hardware.efficiency.compute, rel=FIT_ERROR)
    assert fitted.memory == pytest.approx(hardware.efficiency.memory, rel=FIT_ERROR)


def test_a_fit_over_two_phases_is_refused() -> None:
    hardware = datasheet("h100-sxm")
    (train,) = made_up_samples(hardware.efficiency, [(4, 4)])
    other = dataclasses.replace(train, cost=cost.optimizer(MODEL, Layout()))
    with pytest.raises(ValueError, match="one phase"):
        fit_phase([train, other], hardware, hardware.efficiency)


def test_forward_phases_that_were_not_measured_take_over_what_a_like_phase_did() -> None:
    def fit(work: PhaseCost) -> dict[str, Efficiency]:
        return fit_all([Sample(name="s", cost=work, measured_s=1e-3)], datasheet("h100-sxm"))

    scored = fit(cost.score(MODEL, Layout(), 16, 4))
    assert scored["reference"] == scored["score"]
    filled = fit(cost.prefill(MODEL, Layout(), 4, 16))
    assert filled["reference"] == filled["score"] == filled["prefill"]
    assert set(fit(cost.optimizer(MODEL, Layout()))) == {"optimizer"}


def test_a_chain_of_products_is_long_against_its_start_on_any_device() -> None:
    start_s = 40e-6
    for pair_s in (1e-3, 5e-5, 4e-6):  # a CPU's, and a GPU's

        def run_s(pairs: int, calls: int, pair_s: float = pair_s) -> float:
            return calls * max(pairs * pair_s, start_s) + start_s  # calls are started ahead

        pairs, took_s = long_enough(run_s)
        assert took_s > CHAIN_S / 2
        assert pairs * pair_s == pytest.approx(took_s, rel=0.02)


def test_a_chain_that_is_long_already_is_timed_once() -> None:
    asked = []

    def run_s(pairs: int, calls: int) -> float:
        asked.append((pairs, calls))
        return 1.0

    assert long_enough(run_s) == (2, 1.0)
    assert asked == [(2, 1)]


def test_every_kind_of_collective_is_measured_by_a_program_that_is_one() -> None:
    devices = jax.devices()[:4]
    mesh, values = make_mesh(devices, data=4, fsdp=1, tensor=1), np.arange(32, dtype=np.float32)
    known = exchanges(mesh)
    assert set(known) == {"all-gather", "reduce-scatter", "all-reduce"}
    for kind, (program, given, passes) in known.items():
        array = jax.device_put(values, NamedSharding(mesh, given))
        text = program.lower(array).compile().as_text()
        assert [k for k in known if f" {k}(" in text] == [kind]
        summed = values if kind == "all-gather" else 4 * values
        np.testing.assert_array_equal(program(array), summed)
        assert passes == (2 if kind == "all-reduce" else 1)
    found = _collectives(devices)
    assert set(found) == set(known)
    assert all(fixed_s > 0 and bytes_per_s > 0 for fixed_s, bytes_per_s in found.values())
    assert _collectives(devices[:2]) == {}


def test_a_peak_measured_in_a_bad_moment_gives_way_to_a_better_one_and_never_the_reverse() -> None:
    whole = datasheet("h100-sxm")
    peaks, rate = dict.fromkeys(whole.peak_flops_per_s, 2e11), 5e10
    first = dataclasses.replace(
        whole, peak_flops_per_s=peaks, hbm_bytes_per_s=rate, efficiency=Efficiency(compute=0.5)
    )
    better = with_better(
        first, Rates(flops_per_s=3e11, best_flops_per_s=4e11, bytes_per_s=7e10), "float32"
    )
    assert better.peak("float32") == better.peak("bfloat16") == 4e11
    assert better.hbm_bytes_per_s == 7e10
    assert better.efficiency.compute == 0.75
    worse = with_better(
        first, Rates(flops_per_s=9e10, best_flops_per_s=1e11, bytes_per_s=3e10), "float32"
    )
    assert worse == first


@pytest.fixture(scope="module")
def calibrated() -> Hardware:
    return calibrate(MODEL, workload=SMALL, devices=jax.devices()[:2], budget_s=60.0)


def test_calibration_measures_every_phase_of_a_step(calibrated: Hardware) -> None:
    assert calibrated.calibrated
    assert {"decode", "train", "optimizer", "publish", "prefill"} <= set(
        calibrated.phase_efficiency
    )
    assert calibrated.devices_share_cores
    assert calibrated.contention >= 1
    assert calibrated.versions["jax"] == jax.__version__


def test_calibrated_predictions_are_bounded_and_of_a_sensible_size(calibrated: Hardware) -> None:
    for work in (
        cost.decode(MODEL, Layout(), SMALL.slots, SMALL.kv_len, SMALL.chunk_steps),
        cost.train(MODEL, Layout(), SMALL.row_tokens, SMALL.rows),
        cost.optimizer(MODEL, Layout()),
    ):
        seen = predict(work, calibrated)
        assert seen.lower_s <= seen.expected_s
        assert 0 < seen.expected_s < LIMIT_S * 100
    assert 0 < calibrated.dispatch_s < LIMIT_S
    assert 0 < calibrated.kernel_s < LIMIT_S


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "measure_device", lambda *_: datasheet("h100-sxm"))
    return tmp_path / "jaxrl" / "calibration"


def others_say(monkeypatch: pytest.MonkeyPatch, disturbance: str) -> None:
    monkeypatch.setattr(measure.OtherPrograms, "disturbance", lambda *_: disturbance)


def test_a_calibration_is_stored_once_per_model_and_workload(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others_say(monkeypatch, "")
    first = cached_or_calibrate()
    (stored,) = store.glob("*.json")
    written = stored.stat().st_mtime_ns
    assert cached_or_calibrate() == first
    assert stored.stat().st_mtime_ns == written
    cached_or_calibrate(again=True)
    assert stored.stat().st_mtime_ns > written
    cached_or_calibrate(workload=Workload(slots=4))
    assert len(list(store.glob("*.json"))) == 2


def test_a_disturbed_calibration_says_so_and_is_measured_again(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others_say(monkeypatch, "other programs took 40% of the cores")
    assert cached_or_calibrate().disturbance
    assert not list(store.glob("*.json"))
    others_say(monkeypatch, "")
    assert not cached_or_calibrate().disturbance
    assert list(store.glob("*.json"))


class Program:
    """Takes the given times, one after another, on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: Iterator[float]) -> None:
        self.now_s, self.times = 0.0, times
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now_s)
        monkeypatch.setattr(timing.time, "sleep", self.wait)

    def wait(self, duration_s: float) -> None:
        self.now_s += duration_s

    def __call__(self) -> None:
        self.now_s += next(self.times)


def test_a_time_is_what_a_quarter_of_the_calls_agree_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the calls collide with another program, and one is quick by luck."""
    program = Program(
        monkeypatch, itertools.cycle([0.020, 0.010, 0.025, 0.0101, 0.0095, 0.013, 0.03])
    )
    (seen,) = timing.in_turn([program], deadline_s=60.0)
    assert seen.calm
    assert seen.seconds == pytest.approx(0.010, rel=0.02)


def test_no_program_always_follows_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "timed", lambda run: run() or 0.01)
    called: list[int] = []
    runs = [partial(called.append, number) for number in range(4)]
    seen = timing.in_turn(runs, deadline_s=time.perf_counter() + 60)
    rounds = [called[at : at + 4] for at in range(4, len(called), 4)]  # the first is the warm-up
    assert len(seen) == 4
    assert all(sorted(order) == [0, 1, 2, 3] for order in rounds)
    for number in range(4):
        before = {order[order.index(number) - 1] for order in rounds if order[0] != number}
        assert len(before) > 1


def test_rounds_go_on_until_a_quiet_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = [0.02 + 0.004 * i for i in range(timing.ROUNDS)]
    program = Program(monkeypatch, itertools.chain(busy, itertools.repeat(0.01)))
    (seen,) = timing.in_turn([program], deadline_s=60.0)
    assert seen.calm
    assert seen.seconds == pytest.approx(0.01)


def test_repeats_that_never_agree_are_called_a_disturbance(monkeypatch: pytest.MonkeyPatch) -> None:
    program = Program(monkeypatch, (0.01 * 1.5**i for i in itertools.count()))
    others = measure.OtherPrograms()
    (seen,) = timing.in_turn([program], deadline_s=1.0)
    assert not seen.calm
    said = others.disturbance({"train 4x16": seen}, jax.devices()[0])
    assert "repeats of train 4x16 differ" in said


def test_other_programs_are_seen_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores, watched for ten seconds; this process computed for four, the cores for twelve."""
    clock = {"now_s": 0.0, "busy_s": 100.0, "own_s": 50.0}
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock["now_s"])
    monkeypatch.setattr(measure, "own_s", lambda: clock["own_s"])
    monkeypatch.setattr(measure, "busy_core_s", lambda: clock["busy_s"])
    monkeypatch.setattr(measure, "usable_cores", lambda: 2)
    others = measure.OtherPrograms()
    clock.update(now_s=10.0, busy_s=112.0, own_s=54.0)
    assert others.share() == pytest.approx(0.4)
    assert others.disturbance({}, jax.devices()[0]) == "other programs took 40% of the cores"
    clock["own_s"] = 62.0
    assert others.disturbance({}, jax.devices()[0]) == ""


def test_the_cores_work_is_counted_where_the_system_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    before = busy_core_s()
    if before is None:
        pytest.skip("this system does not count the work of its cores")
    begin_s = time.process_time()
    while time.process_time() - begin_s < 0.3:
        pass
    after = busy_core_s()
    assert after is not None
    assert after - before > 0.25  # ticks of 10 ms


def test_without_time_phases_are_left_out_and_named() -> None:
    hardware = calibrate(MODEL, workload=SMALL, devices=jax.devices()[:1], budget_s=0.0)
    assert Phase.TRAIN.value in hardware.phase_efficiency
    assert any("left out" in line and "prefill" in line for line in hardware.source)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--slots", "0"], "--slots=0 must be finite and greater than 0"),
        (["--budget-s", "nan"], "--budget-s=nan must be finite"),
        (["--model", "qwen3-1.8b"], "did you mean 'qwen3-1.7b'"),
        (["--config", "quickstrat"], "no configuration 'quickstrat'"),
        (["--out", "tests"], "it is a folder; name a file in it: tests/hardware.json"),
        (
            ["--out", "pyproject.toml/hardware.json"],
            "cannot write --out=pyproject.toml/hardware.json",
        ),
    ],
)
def test_bad_input_ends_the_command_in_one_line_before_anything_is_measured(
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["calibrate", *arguments])
    monkeypatch.setattr(command, "calibrate", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: ")
    assert said.count("\n") == 1
    assert words in said
