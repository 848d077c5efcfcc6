"""Predicted training steps against measured ones, and properties of pipelines and networks."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roofline.estimate import Estimate, fit_stack
from roofline.kernel_times import gpu
from roofline.model_zoo import ZOO
from roofline.network import Network
from roofline.operators.collectives import NETWORK_SHARE
from roofline.training import (
    TRAINING_FACTORS,
    Framework,
    Parallel,
    Recompute,
    TrainStep,
    model_flops,
    train_step,
)
from roofline.validate.end_to_end import TRAIN_STEP, training_estimate

H100 = gpu("h100-80gb-sxm")
MODEL = ZOO["llama-3.1-8b"].config
CALIBRATION_ROWS, SEEDS = 8, 10
CALIBRATED_MEAN = {"Megatron-style": 0.08, "llm-foundry PyTorch FSDP": 0.06}
"""Mean error on the rows that did not calibrate, over ten seeds: 0.064 and 0.058 over twenty.
llm-foundry is three stacks, one per GPU type."""
RANK = 0.9


def groups(folder: Path, stack: str) -> dict[str, list[tuple[dict[str, Any], Estimate]]]:
    """Rows and estimates by hardware."""
    found: dict[str, list[tuple[dict[str, Any], Estimate]]] = {}
    text = (folder / "measured" / "train_step.jsonl").read_text("utf-8")
    for row in map(json.loads, text.splitlines()):
        if row["stack"] == stack and (made := training_estimate(row)):
            found.setdefault(TRAIN_STEP.stack(row), []).append((row, made))
    return found


@pytest.mark.parametrize("stack", CALIBRATED_MEAN)
def test_eight_rows_of_a_stack_calibrate_the_rest(shared_data: Path, stack: str) -> None:
    errors: list[float] = []
    for cases in groups(shared_data, stack).values():
        for seed in range(SEEDS):
            known = set(random.Random(seed).sample(range(len(cases)), CALIBRATION_ROWS))
            fitted = fit_stack(
                [cases[i][1] for i in known],
                [cases[i][0]["measured_s"] for i in known],
                TRAINING_FACTORS,
            )
            errors += [
                abs(fitted.apply(made).expected_s / row["measured_s"] - 1)
                for i, (row, made) in enumerate(cases)
                if i not in known
            ]
    assert statistics.mean(errors) < CALIBRATED_MEAN[stack]


@pytest.mark.parametrize("stack", CALIBRATED_MEAN)
def test_alternatives_of_a_stack_are_ranked_without_calibration(
    shared_data: Path, stack: str
) -> None:
    for name, cases in groups(shared_data, stack).items():
        made = sorted(range(len(cases)), key=lambda i: cases[i][1].expected_s)
        measured = sorted(range(len(cases)), key=lambda i: cases[i][0]["measured_s"])
        places = [(made.index(i), measured.index(i)) for i in range(len(cases))]
        correlation = statistics.correlation([a for a, _ in places], [b for _, b in places])
        assert correlation > RANK, name


def step_of(parallel: Parallel, **changes: Any) -> Estimate:
    values: dict[str, Any] = {"global_batch": 64, "micro_batch": 1, "seq": 4096} | changes
    return train_step(MODEL, H100, parallel, TrainStep(**values))


def test_one_device_has_no_collectives() -> None:
    assert step_of(Parallel()).parts["collectives"] == 0


def test_a_pipeline_is_idle_for_its_stages_less_one() -> None:
    """m + (p - 1) / v turns of a p-th of the layers; the head runs m times."""
    alone = step_of(Parallel()).parts["attention"]
    staged = step_of(Parallel(pipeline=4)).parts["attention"]
    interleaved = step_of(Parallel(pipeline=4, interleave=8)).parts["attention"]
    assert staged == pytest.approx(alone / 4 * (64 + 3) / 64)
    assert interleaved == pytest.approx(alone / 4 * (64 + 3 / 8) / 64)


def test_recomputing_layers_costs_one_more_forward() -> None:
    plain, again = step_of(Parallel()), step_of(Parallel(), recompute="full")
    assert again.lower_s == pytest.approx(plain.lower_s * 4 / 3)
    # a third of the layers' products; the head is not recomputed
    assert 1.25 < again.parts["products"] / plain.parts["products"] < 4 / 3
    assert again.parts["attention"] == pytest.approx(plain.parts["attention"] * 4.5 / 3.5)


@settings(max_examples=15, deadline=None)
@given(
    tensor=st.sampled_from((1, 2, 4, 8)),
    pipeline=st.sampled_from((1, 2, 4)),
    fsdp=st.sampled_from((1, 8, 16)),
    context=st.sampled_from((1, 2)),
    recompute=st.sampled_from(("none", "selective", "full")),
)
def test_steps_lie_above_their_bound_and_grow_with_the_batch(
    tensor: int, pipeline: int, fsdp: int, context: int, recompute: str
) -> None:
    parallel = Parallel(fsdp=fsdp, tensor=tensor, pipeline=pipeline, context=context)
    step = step_of(parallel, recompute=recompute)
    larger = step_of(parallel, recompute=recompute, global_batch=128)
    assert 0 < step.lower_s <= step.expected_s < larger.expected_s
    assert step.lower_s <= step.upper_s


def test_a_group_across_nodes_pays_the_network_and_shares_it() -> None:
    """All-reduce over N nodes: 2 A (N - 1) / N through the node's egress, times the groups
    beside each other."""
    network = Network(node_bytes_per_s=100e9, hop_s=0.0)
    size = 1e9
    within = network.collective_s(H100, "all_reduce", size, 8)
    assert within == H100.collective_s("all_reduce", size, 8)
    across = network.collective_s(H100, "all_reduce", size, 16)
    strided = network.collective_s(H100, "all_reduce", size, 2, stride=8)
    assert across > within
    assert strided == pytest.approx(8 * across)


def test_hidden_gathers_cost_less_than_exposed_ones() -> None:
    values = TrainStep(global_batch=64, micro_batch=1, seq=4096)
    parallel = Parallel(fsdp=16)
    hidden, shown = (
        train_step(MODEL, H100, parallel, values, framework=Framework(exposed_gathers=share))
        for share in (0.0, 1.0)
    )
    assert hidden.expected_s < shown.expected_s


def test_a_layer_s_weights_are_gathered_twice_and_its_gradients_scattered_once() -> None:
    step, parallel = TrainStep(global_batch=32, micro_batch=2, seq=1024), Parallel(fsdp=8)
    seen = train_step(MODEL, H100, parallel, step, framework=Framework(exposed_gathers=1.0))
    weights = 2.0 * (MODEL.num_layers * MODEL.layer_parameters + MODEL.vocab_size * MODEL.width)
    gather = H100.collective_s("all_gather", weights, 8)
    scatter = H100.collective_s("reduce_scatter", weights, 8)
    assert seen.parts["collectives"] == pytest.approx(2 * (2 * gather + scatter))


@pytest.mark.parametrize(("recompute", "sums"), [("none", 4), ("full", 6)])
def test_tensor_parallel_layers_sum_two_activations_a_pass(recompute: Recompute, sums: int) -> None:
    step = TrainStep(global_batch=2, micro_batch=2, seq=1024, recompute=recompute)
    seen = train_step(MODEL, H100, Parallel(tensor=8), step)
    once = H100.collective_s("all_reduce", 2.0 * 2 * 1024 * MODEL.width, 8)
    assert seen.parts["collectives"] == pytest.approx(sums * MODEL.num_layers * once)


def test_a_sum_crosses_the_network_twice_and_a_gather_once() -> None:
    network = Network(devices_per_node=1, node_bytes_per_s=50e9)
    gather, summed = (
        network.collective_s(H100, kind, 1e9, 4) - 4 * network.hop_s
        for kind in ("all_gather", "all_reduce")
    )
    assert gather == pytest.approx(1e9 * 3 / 4 / (NETWORK_SHARE * 50e9))
    assert summed == pytest.approx(2 * gather)


def test_model_flops_are_six_per_weight_and_token_plus_causal_attention() -> None:
    weights = MODEL.num_layers * MODEL.layer_parameters + MODEL.vocab_size * MODEL.width
    attention = 6 * MODEL.num_layers * MODEL.num_heads * MODEL.head_size * 4096
    assert model_flops(MODEL, 10, 4096) == 10 * (6 * weights + attention)


@pytest.mark.parametrize(
    ("parallel", "changes", "message"),
    [
        (Parallel(tensor=3), {}, "tensor=3 does not divide heads=32"),
        (Parallel(fsdp=3), {}, "use 63 or 66"),
        (Parallel(pipeline=64), {}, "the model has 32"),
    ],
)
def test_impossible_splits_are_refused_with_what_would_fit(
    parallel: Parallel, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        step_of(parallel, **changes)
