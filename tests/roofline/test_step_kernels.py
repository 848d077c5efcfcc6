"""Kernels of a decode step; against compiled programs: tests/jaxrl/test_rehearse_gpu.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from roofline import cost
from roofline.kernels import Layout, stored_in
from roofline.model_zoo import find_model
from roofline.step_kernels import layer_kernels

MODEL = find_model("qwen3-0.6b").config
HALF = Layout(compute_dtype="bfloat16", param_dtype="bfloat16", kv_dtype="bfloat16")
EIGHT_BITS = replace(HALF, **stored_in("float8_e4m3"))


@pytest.mark.parametrize(
    ("model", "layout", "compiled"),
    [
        (MODEL, HALF, 18),
        (replace(MODEL, qk_norm=False), HALF, 15),
        (replace(MODEL, qk_norm=False, qkv_bias=True), HALF, 15),
        (MODEL, EIGHT_BITS, 22),
    ],
)
def test_a_layer_has_the_kernels_that_were_compiled_for_an_h200(model, layout, compiled) -> None:
    assert layer_kernels(model, layout) == compiled


def test_a_gpu_starts_fewer_kernels_than_a_cpu_which_writes_every_step_out() -> None:
    fused = cost.decode(MODEL, HALF, 64, 512, 1).launches
    assert fused < cost.decode(MODEL, Layout(), 64, 512, 1).launches


def test_kernels_do_not_depend_on_slots_and_grow_with_steps() -> None:
    one = cost.decode(MODEL, HALF, 1, 512, 1).launches
    assert cost.decode(MODEL, HALF, 256, 512, 16).launches == 16 * one
