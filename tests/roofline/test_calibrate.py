"""The fit recovers known shares; a calibration of this machine is complete, cached and sane."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import pytest

from models.config import ModelConfig
from roofline import cost
from roofline.calibrate import Workload, cached_or_calibrate, calibrate
from roofline.datasheets import datasheet
from roofline.fit import Sample, fit_all, fit_phase, held_out_ratios
from roofline.hardware import Efficiency, Hardware
from roofline.kernels import Layout
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


def test_a_calibration_is_stored_once_per_model_and_workload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    devices = jax.devices()[:1]
    first = cached_or_calibrate(devices=devices)
    (stored,) = (tmp_path / "jaxrl" / "calibration").glob("*.json")
    written = stored.stat().st_mtime_ns
    assert cached_or_calibrate(devices=devices) == first
    assert stored.stat().st_mtime_ns == written
    cached_or_calibrate(devices=devices, workload=Workload(slots=4))
    assert len(list(stored.parent.glob("*.json"))) == 2


def test_without_time_phases_are_left_out_and_named() -> None:
    hardware = calibrate(MODEL, workload=SMALL, devices=jax.devices()[:1], budget_s=0.0)
    assert Phase.TRAIN.value in hardware.phase_efficiency
    assert any("left out" in line and "prefill" in line for line in hardware.source)
