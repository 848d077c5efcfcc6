"""The fit of operator coefficients: which rows it may see, and that it finds what is there."""

import json
import random
import statistics
from pathlib import Path

import pytest

from roofline.datasheets import datasheet
from roofline.operators.collectives import ProtocolCurve, SendCurve
from roofline.operators.fit import (
    CURVE_SCALES,
    LL_BYTES,
    curve_seconds,
    fit,
    fit_one,
    fit_sends,
    is_fitted,
    send_seconds,
    shape_of,
)
from roofline.operators.model import load_fitted, operator_model

TRUTH = {
    "latency_s": 9e-6, "ll128_s": 3e-6, "simple_s": 15e-6,
    "ll": 0.015, "ll128": 0.4, "simple": 0.7,
}  # fmt: skip
SECONDS = curve_seconds(datasheet("h100-80gb-sxm"))


def synthetic(noise: float) -> list[dict[str, object]]:
    draw, rows = random.Random(3), []
    for exponent in range(9, 30):
        row = {"kind": "collective", "op": "all_gather", "bytes": 2**exponent, "devices": 8}
        row["measured_s"] = SECONDS(TRUTH, row) * (1 + noise * draw.uniform(-1, 1))
        rows.append(row)
    return rows


def test_a_curve_is_recovered_between_the_sizes_it_was_fitted_on():
    found = fit_one(synthetic(noise=0.02), CURVE_SCALES, SECONDS)
    assert len(found.inside) == 11
    assert len(found.outside) == 10
    assert max(abs(ratio - 1) for ratio in found.outside) < 0.1  # noise 2 %, corners between sizes
    assert found.values["latency_s"] == pytest.approx(TRUTH["latency_s"], rel=0.05)
    assert found.values["simple"] == pytest.approx(TRUTH["simple"], rel=0.1)


@pytest.mark.parametrize("ll_bytes", LL_BYTES)
def test_the_limit_of_ll_is_found_from_the_fitted_sizes(ll_bytes):
    h100 = datasheet("h100-80gb-sxm")
    truth = {
        "latency_s": 8e-6, "spread_s": 1e-6, "simple_s": 4e-6, "full_s": 25e-6,
        "ll": 0.02, "simple": 0.7, "few": 0.75,
    }  # fmt: skip
    rows = {
        n: [{**row, "op": "alltoall", "devices": n} for row in synthetic(noise=0.0)] for n in (4, 8)
    }
    for row in [*rows[4], *rows[8]]:
        row["measured_s"] = send_seconds(h100, ll_bytes)(truth, row)
    found = fit_sends(rows, h100)
    assert {fit.values["ll_bytes"] for fit in found.values()} == {ll_bytes}
    assert max(abs(ratio - 1) for fit in found.values() for ratio in fit.outside) < 0.1


def test_one_wild_measurement_bends_the_curve_only_nearby():
    rows = synthetic(noise=0.0)
    rows[12]["measured_s"] *= 3
    values = fit(rows, CURVE_SCALES, SECONDS)
    off = [abs(SECONDS(values, row) / SECONDS(TRUTH, row) - 1) for row in rows]
    assert statistics.median(off) < 0.02
    assert max(off) < 2 / 8  # the wild row is off by 2: the curve follows it by less than an eighth


def test_the_side_of_a_row_depends_on_its_shape_alone():
    shape = {"kind": "gemm", "m": 64, "n": 4096, "k": 1024}
    one = {**shape, "id": "gemm-a", "hardware": "h100-80gb-sxm", "measured_s": 1.0}
    other = {**shape, "id": "gemm-b", "hardware": "a100-80gb-sxm", "measured_s": 2.0}
    assert is_fitted(one) == is_fitted(other)
    assert shape_of(one) == shape_of(other) == "64,4096,1024"
    parts = [is_fitted({**shape, "m": m}) for m in range(2000)]
    assert 0.2 < sum(parts) / len(parts) < 0.3


def test_the_shipped_coefficients_name_exactly_the_rows_they_saw(shared_data: Path):
    for kind, ids in load_fitted()["fitted_rows"].items():
        lines = (shared_data / "measured" / f"{kind}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert set(ids.split()) == {r["id"].rpartition("-")[2] for r in rows if is_fitted(r)}


def test_shipped_shares_are_shares():
    for name in load_fitted()["gpus"]:
        model = operator_model(datasheet(name))
        for c in model.gemm_by_dtype.values():
            assert all(0 < x <= 1 for x in (c.compute, c.memory, c.quantisation, c.half_tile))
        assert 0 < model.prefill_coefficients.compute < 1
        assert 0 < model.decode_coefficients.memory < 1
        curves = [
            c for ops in model.curves.values() for by_n in ops.values() for c in by_n.values()
        ]
        assert all(c.ll < c.simple <= 1 for c in curves)
        assert all(c.ll < c.ll128 < c.simple for c in curves if isinstance(c, ProtocolCurve))
        assert all(c.ll < c.few < 1 for c in curves if isinstance(c, SendCurve))
