"""Worked problems of the scaling book (jax-ml.github.io/scaling-book), by this package's functions.

Each entry names a problem of the reference table; its answer and tolerance (the book prints two or
three digits) come from there. Inputs are the book's own.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from models.config import ModelConfig
from roofline import book, cost
from roofline.hardware import Hardware
from roofline.kernels import Layout, all_gather, all_reduce, passes, product
from roofline.memory import kv_cache_bytes, memory_per_device
from roofline.phases import Phase, PhaseCost
from roofline.predict import predict

BF16 = Layout(compute_dtype="bfloat16", param_dtype="bfloat16", kv_dtype="bfloat16")
INT8 = Layout(compute_dtype="int8", param_dtype="int8", kv_dtype="int8")
YEAR_S = 365 * book.DAY_S


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
LLAMA2_13B_GQA = dataclasses.replace(LLAMA2_13B, num_kv_heads=8)
LLAMA3_70B = ModelConfig(
    vocab_size=128256, width=8192, num_layers=80, num_heads=64, num_kv_heads=8, head_size=128,
    ffw_size=28672, tied_embeddings=False,
)  # fmt: skip
INFERENCE_Q1 = ModelConfig(
    vocab_size=32128, width=4096, num_layers=64, num_heads=32, num_kv_heads=8, head_size=256,
    ffw_size=16384,
)  # fmt: skip
INFERENCE_Q2_MQA = dataclasses.replace(INFERENCE_Q1, num_kv_heads=1)
TRANSFORMERS_Q1 = ModelConfig(
    vocab_size=32000, width=4096, num_layers=64, num_heads=32, num_kv_heads=32, head_size=128,
    ffw_size=16384, tied_embeddings=False,
)  # fmt: skip
TRANSFORMERS_KV = ModelConfig(
    vocab_size=8, width=64, num_layers=64, num_heads=64, num_kv_heads=64, head_size=128,
    ffw_size=64,
)  # fmt: skip
V5E = chip(1.97e14, 0.82e12)
V5E_BYTES_PER_S, V5E_HBM_BYTES = 8.2e11, 16e9
V5P_FLOPS_PER_S, V5P_ALPHA = 4.59e14, 2550.0
H100_FLOPS_PER_S = 990e12
H100_NODE_ALPHA, H800_ALPHA = 2475.0, 3300.0
LLAMA3_FLOPS = book.train_flops(70e9, 15e12)
DEEPSEEK_FLOPS, DEEPSEEK_H800_S = book.train_flops(37e9, 14.8e12), 2.79e6 * 3600
ALL_CACHES_BYTES = 1.3e12
"""Of 240 sequences, as the book rounds it (5.3 GB each)."""
IB_BYTES_PER_S = book.bits_to_bytes_per_s(400e9)


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


def grouped_step_s(slots: int) -> float:
    """Table 2 keeps the weights of the model with as many kv heads as query heads."""
    return book.min_decode_step_s(
        slots,
        kv_cache_bytes(LLAMA2_13B_GQA, BF16, slots=1, max_len=8192),
        2 * LLAMA2_13B.num_parameters,
        8 * V5E_BYTES_PER_S,
    )


def inference_batch(model: ModelConfig) -> int:
    return math.floor(
        book.max_batch(
            16, V5E_HBM_BYTES, model.num_parameters, kv_cache_bytes(model, INT8, 1, 128000)
        )
    )


def state_bytes_per_parameter() -> float:
    """bfloat16 weights with float32 mean and square of Adam."""
    sizes = memory_per_device(LLAMA3_70B, BF16, trains=True, rows=1, row_tokens=1)
    return (sizes["parameters"] + sizes["optimizer"]) / LLAMA3_70B.num_parameters


DEVICES: dict[str, Callable[[], float]] = {
    "gpu-q1.1a": lambda: book.vector_lanes(132),
    "gpu-q1.1b": lambda: book.vector_lanes(148),
    "gpu-q1.2a": lambda: book.vector_flops_per_s(book.vector_lanes(132), 1.59e9),
    "gpu-q1.2b": lambda: book.vector_flops_per_s(book.vector_lanes(132), 1.98e9),
    "gpu-q1.3a": lambda: chip(990e12, 3.35e12).critical_intensity("bfloat16"),
    "gpu-q1.3c": lambda: chip(1980e12, 3.35e12).critical_intensity("bfloat16"),
    "gpu-q1.3d": lambda: chip(4500e12, 8e12).critical_intensity("bfloat16"),
    "gpu-q1.4a": lambda: bound_s(
        flops=product(64, 4096, 8192, 2).flops, hbm_bytes=product(64, 4096, 8192, 2).hbm_bytes
    ),
    "gpu-q1.6": lambda: book.clock_hz(80e12, book.vector_lanes(148)),
    "gpu-q1.7a": lambda: passes(3 * 2**30, 4).hbm_bytes / 3.35e12,
    "gpu-q1.7b": lambda: passes(3 * 65536, 4).hbm_bytes / 3.35e12,
    "gpu-q2.1": lambda: book.node_bytes_per_s(book.links_bytes_per_s(4 * 64, 25e9), 8, 450e9),
    "gpu-q3.1a": lambda: book.links_bytes_per_s(8, IB_BYTES_PER_S),
    "gpu-q3.1b": lambda: book.links_bytes_per_s(8 * 32, IB_BYTES_PER_S),
    "gpu-q3.1c": lambda: book.links_bytes_per_s(16 * 64, IB_BYTES_PER_S),
    "gpu-h100-nvlink": lambda: book.links_bytes_per_s(18, 25e9),
    "prof-ffw": lambda: product(32 * 1024, 8192, 32768, 2).flops / (23e12 * 8),
    "roof-q1": lambda: chip(394e12, 0.82e12).critical_intensity("int8") * 1 / 2,
    "roof-q2": lambda: book.critical_batch_tokens(1.97e14, 8.2e11, weight_to_compute_bits=8 / 16),
    "roof-q4": lambda: book.per_example_matmul_intensity(64, 8192, 8192, 1),
    "roof-q5": lambda: chip(989e12, 3.35e12).critical_intensity("bfloat16"),
    "roof-dot": lambda: book.dot_product_intensity(10**6),
}

COLLECTIVES: dict[str, Callable[[], float]] = {
    "gpu-pop1a": lambda: book.gather_s(2 * 1024 * 16384, 450e9),
    "gpu-pop1b": lambda: all_gather(2 * 1024 * 16384, 8).link_bytes / 450e9,
    "gpu-tree-leaf": lambda: book.tree_gather_bytes_per_s(32, 400e9),
    "gpu-tree-spine": lambda: book.tree_gather_bytes_per_s(4, 12.8e12),
    "gpu-q4.5b": lambda: book.tree_gather_bytes_per_s(2, 400e9),
    "gpu-a2a-1node": lambda: book.all_to_all_s(1.0, 2, 400e9) / book.all_to_all_s(1.0, 8, 450e9),
    "gpu-sharp-gain": lambda: all_reduce(1.0, 8).link_bytes,
    "sh-q1": lambda: book.replicas(8, 2),
    "inf-lat360": lambda: book.latency_bound_bytes(8, 4.5e10, 1e-6),
}

COUNTS: dict[str, Callable[[], float]] = {
    "tr-q1a": lambda: TRANSFORMERS_Q1.num_parameters,
    "tr-q1b": lambda: book.attention_share(TRANSFORMERS_Q1),
    "tr-q1c": lambda: TRANSFORMERS_Q1.kv_bytes_per_token(1),
    "tr-q5": lambda: book.context_of_equal_attention(TRANSFORMERS_Q1),
    "tr-q7b": lambda: book.available_flops(DEEPSEEK_H800_S, 1.513e15),
    "tr-q7c": lambda: book.utilisation(DEEPSEEK_FLOPS, DEEPSEEK_H800_S, 1.513e15),
    "tr-ckpt20": lambda: book.saved_activation_bytes(4e6, 20 * 8192, 64),
    "tr-blockremat": lambda: book.saved_activation_bytes(4e6, 8192, 64),
    "tr-kv8k": lambda: kv_cache_bytes(TRANSFORMERS_KV, INT8, slots=1, max_len=8192),
    "train-q1a": lambda: book.mlp_parameters(LLAMA2_13B),
    "train-q1b": lambda: book.attention_parameters(LLAMA2_13B),
    "train-q2b": lambda: book.saved_activation_bytes(16e6, 5120 + 2 * 13824, 40),
    "at-ffw": lambda: book.mlp_parameters(LLAMA3_70B),
    "at-attn": lambda: book.attention_parameters(LLAMA3_70B),
    "at-vocab": lambda: book.vocabulary_parameters(LLAMA3_70B),
    "at-total": lambda: LLAMA3_70B.num_parameters,
    "at-flops-tok": lambda: book.train_flops(70e9, 1),
    "inf-q1a": lambda: INFERENCE_Q1.num_parameters,
    "inf-q1b": lambda: INFERENCE_Q1.kv_bytes_per_token(1),
    "inf-q5a": lambda: book.moe_parameters(INFERENCE_Q1, experts=16),
    "inf-kv13b": lambda: kv_cache_bytes(LLAMA2_13B, BF16, slots=1, max_len=8192),
    "inf-prefill-act": lambda: book.activation_bytes(8192, 5120),
    "inf-act131": lambda: book.activation_bytes(16, 8192, 1),
    "ai-32k": lambda: kv_cache_bytes(LLAMA3_70B, INT8, slots=1, max_len=32768),
}

TRAINING: dict[str, Callable[[], float]] = {
    "gpu-dp-ds": lambda: 2048 * book.critical_batch_tokens(990e12, 300e9),
    "gpu-dp-llama3": lambda: 16000 * book.critical_batch_tokens(990e12, 400e9),
    "gpu-dp-2node": lambda: book.data_parallel_tokens_of_nodes(H100_NODE_ALPHA, 2),
    "gpu-tp-llama": lambda: book.max_tensor_parallel(28000, H100_NODE_ALPHA),
    "gpu-tp-2node": lambda: book.max_tensor_parallel(28000, H100_NODE_ALPHA, node=8),
    "gpu-q5.1a": lambda: book.critical_batch_tokens(2.25e15, 900e9),
    "gpu-q5.1b": lambda: book.critical_batch_tokens(2.25e15, 400e9),
    "gpu-q5.2.1a": lambda: book.train_state_bytes(70e9, state_bytes_per_parameter()),
    "gpu-q5.2.2a": lambda: LLAMA3_FLOPS,
    "gpu-q5.2.2b": lambda: book.run_s(LLAMA3_FLOPS, 4096, H100_FLOPS_PER_S, 0.45),
    "gpu-q5.2.3a": lambda: book.tokens_per_device(4e6, 4096),
    "gpu-q5.2.3b": lambda: book.train_state_bytes(70e9, state_bytes_per_parameter(), devices=8),
    "gpu-q5.2.3c": lambda: book.data_parallel_tokens(
        book.critical_batch_tokens(H100_FLOPS_PER_S, 400e9), model_parallel=8
    ),
    "gpu-q5.3b": lambda: book.tokens_per_device(384 * 4096, 768),
    "gpu-q5.3c": lambda: book.tokens_per_device(1536 * 4096, 3072),
    "train-q3b": lambda: book.mixed_tokens_per_device(V5P_ALPHA, 13824),
    "train-q3c": lambda: book.best_fsdp_axis(3e6, 4096, 13824),
    "train-mixed": lambda: book.mixed_tokens_per_device(V5P_ALPHA, 32768),
    "train-dcn": lambda: book.critical_batch_tokens(V5P_FLOPS_PER_S, 6.25e9),
    "train-850": lambda: book.data_parallel_tokens(V5P_ALPHA, axes=3),
    "train-18823": lambda: book.devices_of_batch(
        16e6, book.data_parallel_tokens(V5P_ALPHA, axes=3)
    ),
    "train-17d": lambda: book.run_s(LLAMA3_FLOPS, 18823, V5P_FLOPS_PER_S, 0.5) / book.DAY_S,
    "train-tp8-F": lambda: book.ffw_of_tensor_parallel(8, V5P_ALPHA),
    "at-44d": lambda: book.run_s(LLAMA3_FLOPS, 8960, V5P_FLOPS_PER_S, 0.4),
    "at-xopt": lambda: book.best_fsdp_axis(4.19e6, 8960, 28672),
    "at-1ms": lambda: book.run_s(book.train_flops(70e9, 1), 1, V5P_FLOPS_PER_S),
    "at-435y": lambda: book.run_s(LLAMA3_FLOPS, 1, V5P_FLOPS_PER_S) / YEAR_S,
    "at-113": lambda: book.mixed_tokens_per_device(V5P_ALPHA, 28672),
    "at-1752d": lambda: book.rescaled_s(44, 8960, 225),
}

INFERENCE: dict[str, Callable[[], float]] = {
    **{
        f"inf-tab1-b{slots}": lambda slots=slots: decode_step_s(LLAMA2_13B, slots)
        for slots in (1, 8, 16, 32, 64, 240)
    },
    **{
        f"inf-tab1-thr-b{slots}": lambda slots=slots: book.decode_tokens_per_s(
            slots, decode_step_s(LLAMA2_13B, slots)
        )
        for slots in (1, 8, 32, 240)
    },
    **{
        f"inf-tab2-b{slots}": lambda slots=slots: grouped_step_s(slots)
        for slots in (1, 16, 32, 64, 240)
    },
    "inf-q2a": lambda: inference_batch(INFERENCE_Q1),
    "inf-q2b": lambda: inference_batch(INFERENCE_Q2_MQA),
    "inf-q3": lambda: book.weight_load_s(INFERENCE_Q1.num_parameters, 16, V5E_BYTES_PER_S),
    "inf-q5c": lambda: book.critical_moe_batch_tokens(240, experts=16, active=2),
    "inf-q7": lambda: book.weight_stationary_2d_devices(4096, 16384),
    "inf-ici": lambda: book.max_decode_tensor_parallel(16384, 32, 8),
    "ai-86": lambda: book.devices_for(book.serving_bytes(70e9, 1, ALL_CACHES_BYTES), V5E_HBM_BYTES),
    "ai-112": lambda: book.serving_bytes(70e9, 32, 160e3 * 8192),
    "ai-235": lambda: book.decode_tokens_per_s(32, 0.017, devices=8),
    "ai-19ms": lambda: book.memory_sweep_s(V5E_HBM_BYTES, V5E_BYTES_PER_S),
    "ai-hbm": lambda: book.weight_load_s(2 * 8192 * 28672, 32, V5E_BYTES_PER_S),
    "ai-prefill": lambda: book.prefill_s(70e9, 8192, 16, 1.97e14, 0.4),
    "ai-evict": lambda: book.evicted_tokens_per_step(32, 8192, 4096),
    "ai-pd": lambda: book.prefill_per_decode_servers(0.91, 32, 0.019, 512),
    "ai-min16": lambda: book.devices_for(2 * 70e9, V5E_HBM_BYTES),
    "ai-140": lambda: book.max_batch(32, V5E_HBM_BYTES, 2 * 70e9, 324e3 * 8192),
    "ai-1439": lambda: book.requests_per_s(140, 0.019, 512),
    "ai-Y56": lambda: book.max_decode_tensor_parallel(28672, 64, 8),
    "ai-tput": lambda: book.decode_tokens_per_s(32, 0.017),
    "tpu-q1": lambda: book.weight_load_s(2 * 200e9, 32, 1.23e12),
}

ANSWERS = {**DEVICES, **COLLECTIVES, **COUNTS, **TRAINING, **INFERENCE}


@pytest.fixture(scope="module")
def problems(shared_data: Path) -> dict[str, dict]:
    table = json.loads((shared_data / "roofline" / "scaling_book_problems.json").read_text())
    return {problem["id"]: problem for problem in table["problems"]}


@pytest.mark.parametrize("problem", ANSWERS)
def test_worked_problem_of_the_book(problems: dict[str, dict], problem: str) -> None:
    entry = problems[problem]
    assert ANSWERS[problem]() == pytest.approx(entry["book_answer"], rel=entry["rtol"])


def test_every_problem_of_the_table_is_answered(problems: dict[str, dict]) -> None:
    assert set(ANSWERS) == set(problems)
