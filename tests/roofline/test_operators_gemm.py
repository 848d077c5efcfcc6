"""Matrix products: physics of the model, not its errors (tests/roofline/test_validate.py)."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roofline.datasheets import DATASHEETS, datasheet
from roofline.operators.gemm import TILES, gemm_bound_s, gemm_s
from roofline.operators.model import CARRIED_FROM, operator_model

sizes = st.integers(1, 20_000)
gpus = st.sampled_from([operator_model(hardware) for hardware in DATASHEETS.values()])
ROUNDING = 1e-9  # sums of floats in another order
H100 = operator_model(datasheet("h100-80gb-sxm"))


@settings(max_examples=60, deadline=None)
@given(model=gpus, m=sizes, n=sizes, k=sizes)
def test_a_product_is_never_faster_than_the_book(model, m, n, k):
    assert model.gemm(m=m, n=n, k=k) > gemm_bound_s(model.hardware, m=m, n=n, k=k)


@settings(max_examples=60, deadline=None)
@given(
    model=gpus, m=sizes, n=sizes, k=sizes, more=st.integers(1, 5000), which=st.sampled_from("mnk")
)
def test_a_larger_product_takes_no_less_time(model, m, n, k, more, which):
    shape = {"m": m, "n": n, "k": k}
    larger = {**shape, which: shape[which] + more}
    assert model.gemm(**larger) >= model.gemm(**shape) * (1 - ROUNDING)


def test_a_large_product_reaches_the_share_that_the_book_reports():
    seconds = H100.gemm(m=4096, n=4096, k=4096)
    share = 2 * 4096**3 / seconds / H100.hardware.peak("bfloat16")
    assert 0.7 < share < 0.86  # scaling book, roofline chapter: H100 reaches 80-85 % at its best


def test_one_row_costs_the_weights_at_memory_rate():
    seconds = H100.gemm(m=1, n=16384, k=16384)
    share = 2 * 16384**2 / seconds / H100.hardware.hbm_bytes_per_s
    assert 0.75 < share < 0.9  # measured: 207 us, 77 % of 3.35 TB/s


def test_only_an_unfilled_wave_is_lost_to_quantisation():
    exact = dataclasses.replace(H100.gemm_by_dtype["bfloat16"], quantisation=0.0)
    lost = dataclasses.replace(exact, quantisation=1.0)

    def ratio(m: int) -> float:
        shape = {"m": m, "n": 128 * 33, "k": 8192}
        return gemm_s(lost, H100.hardware, **shape) / gemm_s(exact, H100.hardware, **shape)

    assert (256, 128) in TILES  # 4 x 33 of them are one wave of 132 multiprocessors
    assert ratio(256 * 4) == pytest.approx(1.0, rel=ROUNDING)
    assert ratio(256 * 4 + 1) > 1.05


def test_twice_the_rates_halve_all_but_the_fixed_time():
    hardware = H100.hardware
    twice = dataclasses.replace(
        hardware,
        peak_flops_per_s={k: 2 * v for k, v in hardware.peak_flops_per_s.items()},
        hbm_bytes_per_s=2 * hardware.hbm_bytes_per_s,
    )
    c = H100.gemm_by_dtype["bfloat16"]
    for m in (1, 300, 8192):
        slow, fast = (gemm_s(c, hw, m=m, n=4096, k=4096) for hw in (hardware, twice))
        assert fast - c.fixed_s == pytest.approx((slow - c.fixed_s) / 2)


def test_eight_bit_weights_halve_the_time_of_a_memory_bound_product():
    wide = H100.gemm(m=1, n=16384, k=16384)
    narrow = H100.gemm(m=1, n=16384, k=16384, weight_dtype="int8")
    assert narrow == pytest.approx(wide / 2, rel=0.05)  # the fixed time stays


def test_every_datasheet_has_a_model_and_says_whose_it_is():
    for name, hardware in DATASHEETS.items():
        model = operator_model(hardware)
        assert model.measured_on == CARRIED_FROM.get(name, name)
        low, high = model.interval("gemm", 1.0)
        assert low < 1 < high
        own_low, own_high = operator_model(datasheet(model.measured_on)).interval("gemm", 1.0)
        assert (low < own_low and high > own_high) == model.carried


def test_a_device_without_multiprocessors_or_measurements_is_refused():
    c = H100.gemm_by_dtype["bfloat16"]
    cpu = dataclasses.replace(H100.hardware, name="my cpu", num_sms=0)
    with pytest.raises(ValueError, match="num_sms=0"):
        gemm_s(c, cpu, m=1, n=1, k=1)
    with pytest.raises(ValueError, match="no operator models for hardware 'my cpu'"):
        operator_model(cpu)
    with pytest.raises(ValueError, match="m=0"):
        H100.gemm(m=0, n=1, k=1)
