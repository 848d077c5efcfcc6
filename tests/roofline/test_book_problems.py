"""Worked problems of the scaling book (jax-ml.github.io/scaling-book), by this package's functions.

Each entry names a problem of the reference table; its answer and tolerance (the book prints two or
three digits) come from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from models.config import ModelConfig
from roofline import cost
from roofline.hardware import Hardware
from roofline.kernels import Layout, all_gather, all_reduce, passes, product
from roofline.memory import kv_cache_bytes, memory_per_device
from roofline.phases import Phase, PhaseCost
from roofline.predict import predict

BF16 = Layout(compute_dtype="bfloat16", param_dtype="bfloat16", kv_dtype="bfloat16")
INT8 = Layout(compute_dtype="int8", param_dtype="int8", kv_dtype="int8")


def chip(flops_per_s: float, bytes_per_s: float, link_bytes_per_s: float = 1e9) -> Hardware:
    return Hardware(
        name="book",
        peak_flops_per_s={"bfloat16": flops_per_s, "int8": flops_per_s},
        hbm_bytes=16e9,
        hbm_bytes_per_s=bytes_per_s,
        link_bytes_per_s=link_bytes_per_s,
        dispatch_s=0.0,
        kernel_s=0.0,
    )


LLAMA2_13B = ModelConfig(
    vocab_size=32000, width=5120, num_layers=40, num_heads=40, num_kv_heads=40, head_size=128,
    ffw_size=13824, tied_embeddings=False,
)  # fmt: skip
LLAMA3_70B = ModelConfig(
    vocab_size=128256, width=8192, num_layers=80, num_heads=64, num_kv_heads=8, head_size=128,
    ffw_size=28672, tied_embeddings=False,
)  # fmt: skip
INFERENCE_Q1 = ModelConfig(
    vocab_size=32128, width=4096, num_layers=64, num_heads=32, num_kv_heads=8, head_size=256,
    ffw_size=16384,
)  # fmt: skip
TRANSFORMERS_Q1 = ModelConfig(
    vocab_size=32000, width=4096, num_layers=64, num_heads=32, num_kv_heads=32, head_size=128,
    ffw_size=16384, tied_embeddings=False,
)  # fmt: skip
V5E = chip(1.97e14, 0.82e12)


def bound_s(**work: float) -> float:
    return predict(
        PhaseCost(phase=Phase.SCORE, dtype="bfloat16", **work), chip(2.25e15, 8e12)
    ).lower_s


def decode_step_s(model: ModelConfig, slots: int, shards: int = 8) -> float:
    """Memory time of a step at 8192 cached tokens, without softmax passes, as in the book."""
    layout = Layout(
        tensor=shards, compute_dtype="bfloat16", param_dtype="bfloat16", kv_dtype="bfloat16"
    )
    work = cost.decode(model, layout, slots=slots, kv_len=8192, steps=1)
    scores = 4.0 * 4 * model.num_layers * slots * model.num_heads // shards * 8192
    return (work.hbm_bytes - scores) / V5E.hbm_bytes_per_s


ANSWERS: dict[str, Callable[[], float]] = {
    "gpu-q1.3a": lambda: chip(990e12, 3.35e12).critical_intensity("bfloat16"),
    "gpu-q1.3c": lambda: chip(1980e12, 3.35e12).critical_intensity("bfloat16"),
    "gpu-q1.3d": lambda: chip(4500e12, 8e12).critical_intensity("bfloat16"),
    "roof-q5": lambda: chip(989e12, 3.35e12).critical_intensity("bfloat16"),
    "roof-q1": lambda: chip(394e12, 0.82e12).critical_intensity("int8") * 1 / 2,
    "gpu-q1.4a": lambda: bound_s(
        flops=product(64, 4096, 8192, 2).flops, hbm_bytes=product(64, 4096, 8192, 2).hbm_bytes
    ),
    "gpu-q1.7a": lambda: passes(3 * 2**30, 4).hbm_bytes / 3.35e12,
    "gpu-q1.7b": lambda: passes(3 * 65536, 4).hbm_bytes / 3.35e12,
    "gpu-pop1b": lambda: all_gather(2 * 1024 * 16384, 8).link_bytes / 450e9,
    "gpu-sharp-gain": lambda: all_reduce(1.0, 8).link_bytes,
    "prof-ffw": lambda: product(32 * 1024, 8192, 32768, 2).flops / (23e12 * 8),
    "tr-q1a": lambda: TRANSFORMERS_Q1.num_parameters,
    "tr-q1c": lambda: TRANSFORMERS_Q1.kv_bytes_per_token(1),
    "tr-kv8k": lambda: kv_cache_bytes(
        ModelConfig(
            vocab_size=8, width=64, num_layers=64, num_heads=64, num_kv_heads=64, head_size=128,
            ffw_size=64,
        ),
        INT8, slots=1, max_len=8192,
    ),
    "at-total": lambda: LLAMA3_70B.num_parameters,
    "at-flops-tok": lambda: cost.train(LLAMA3_70B, BF16, row_tokens=1, rows=1).flops,
    "inf-kv13b": lambda: kv_cache_bytes(LLAMA2_13B, BF16, slots=1, max_len=8192),
    "inf-q1a": lambda: INFERENCE_Q1.num_parameters,
    "inf-q1b": lambda: INFERENCE_Q1.kv_bytes_per_token(1),
    "ai-32k": lambda: kv_cache_bytes(LLAMA3_70B, INT8, slots=1, max_len=32768),
    "gpu-q5.2.1a": lambda: 70e9 * _state_bytes_per_parameter(),
    "inf-q3": lambda: INFERENCE_Q1.num_parameters / 16 / 0.82e12,
    **{
        f"inf-tab1-b{slots}": lambda slots=slots: decode_step_s(LLAMA2_13B, slots)
        for slots in (1, 8, 16, 32, 64, 240)
    },
}  # fmt: skip


ROUNDED = {"at-flops-tok": 0.01}
"""The book takes 70e9 parameters and no recomputed head for 70.55e9 parameters."""


def _state_bytes_per_parameter() -> float:
    """bfloat16 weights with float32 mean and square of Adam."""
    sizes = memory_per_device(LLAMA3_70B, BF16, trains=True, rows=1, row_tokens=1)
    return (sizes["parameters"] + sizes["optimizer"]) / LLAMA3_70B.num_parameters


@pytest.mark.parametrize("problem", ANSWERS)
def test_worked_problem_of_the_book(shared_data: Path, problem: str) -> None:
    table = json.loads((shared_data / "roofline" / "scaling_book_problems.json").read_text())
    entry = {p["id"]: p for p in table["problems"]}[problem]
    tolerance = ROUNDED.get(problem, entry["rtol"])
    assert ANSWERS[problem]() == pytest.approx(entry["book_answer"], rel=tolerance)
