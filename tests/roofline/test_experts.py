"""Mixtures of experts: flops by the chosen experts, memory by all of them, tokens dealt by all-to-all."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.config import ModelConfig
from models.parameters import layer_table
from roofline import cost, parameters, traffic
from roofline.experts import read_experts
from roofline.kernels import Layout, shard
from roofline.memory import memory_per_device

DENSE = ModelConfig(
    vocab_size=512, width=64, num_layers=3, num_heads=4, num_kv_heads=2, head_size=16, ffw_size=96
)
MIXED = replace(DENSE, num_experts=8, experts_per_token=2)
ROWS, TOKENS = 4, 32


def mlp_flops(model: ModelConfig, tokens: int) -> float:
    """2 flops per parameter of the MLPs and the router that a token meets."""
    chosen = max(1, model.experts_per_token)
    met = chosen * model.mlp_parameters + model.width * model.num_experts
    return 2.0 * tokens * model.num_layers * met


def test_forward_flops_grow_by_the_chosen_experts_and_the_router_alone() -> None:
    dense, mixed = (cost.score(m, Layout(), TOKENS, ROWS).flops for m in (DENSE, MIXED))
    tokens = ROWS * TOKENS
    assert mixed - dense == mlp_flops(MIXED, tokens) - mlp_flops(DENSE, tokens)


@pytest.mark.parametrize("remat", ["none", "block"])
def test_training_multiplies_the_chosen_experts_three_times_and_again_what_remat_remakes(
    remat: cost.Remat,
) -> None:
    dense, mixed = (
        cost.train(m, Layout(), TOKENS, ROWS, remat=remat).flops for m in (DENSE, MIXED)
    )
    tokens, times = ROWS * TOKENS, 3 if remat == "none" else 4
    expected = times * (mlp_flops(MIXED, tokens) - mlp_flops(DENSE, tokens))
    if remat == "block":  # the last product of a layer is not made again
        more = MIXED.experts_per_token - 1
        expected -= 2 * tokens * more * MIXED.num_layers * MIXED.ffw_size * MIXED.width
    assert mixed - dense == expected


def test_decode_of_one_token_reads_the_chosen_experts_and_of_many_tokens_all() -> None:
    assert read_experts(MIXED, Layout(), 1) == pytest.approx(2)
    assert read_experts(MIXED, Layout(), 10_000) == pytest.approx(8)
    few, many = (cost.decode(MIXED, Layout(), slots, 32, 1).hbm_bytes for slots in (1, 64))
    assert many > 2 * few


@given(experts=st.integers(2, 64), tokens=st.integers(1, 4096))
def test_more_experts_never_cost_fewer_bytes(experts: int, tokens: int) -> None:
    fewer, more = (replace(MIXED, num_experts=n) for n in (experts, 2 * experts))
    assert read_experts(fewer, Layout(), tokens) <= read_experts(more, Layout(), tokens) + 1e-9


def test_all_experts_are_held_and_have_gradients_and_optimizer_state() -> None:
    held = parameters.held_parameters(MIXED, Layout())
    assert held == MIXED.num_parameters
    sizes = memory_per_device(MIXED, Layout(), trains=True, rows=1, row_tokens=1)
    assert (sizes["parameters"], sizes["optimizer"]) == (4 * held, 8 * held)


@pytest.mark.parametrize("layout", [Layout(fsdp=4), Layout(fsdp=4, expert=4), Layout(data=4, expert=4),
                                    Layout(fsdp=2, tensor=2), Layout(data=2, fsdp=2, expert=2)])  # fmt: skip
def test_experts_are_split_over_fsdp_tensor_and_the_devices_they_are_dealt_to(
    layout: Layout,
) -> None:
    part, whole = shard(MIXED, layout), DENSE.num_layers * MIXED.num_experts * MIXED.mlp_parameters
    spread = max(layout.fsdp, layout.expert) * layout.tensor
    without, dense = replace(DENSE, ffw_size=0), replace(layout, expert=1)
    router = MIXED.num_layers * part.width // layout.fsdp * MIXED.num_experts
    rest = parameters.held_parameters(without, dense) + router
    assert parameters.held_parameters(MIXED, layout) == rest + whole // spread


def test_tokens_go_to_their_experts_and_back_in_every_layer_forward_and_backward() -> None:
    layout = Layout(data=4, expert=4, compute_dtype="bfloat16")
    found = [c for c in traffic.train(MIXED, layout, 100) if c.kind == "all-to-all"]
    assert sum(c.count for c in found) == 4 * MIXED.num_layers
    assert {c.array_bytes for c in found} == {100 * MIXED.experts_per_token * MIXED.width * 2}
    sent = 4 * MIXED.num_layers * 100 * 2 * MIXED.width * 2 * 3 / 4
    assert sum(c.link_bytes for c in found) == sent


def test_dealt_experts_are_not_gathered() -> None:
    gathered, dealt = (
        sum(c.link_bytes for c in traffic.layers(MIXED, layout, 1) if c.kind == "all-gather")
        for layout in (Layout(fsdp=4), Layout(fsdp=4, expert=4))
    )
    assert dealt < gathered / 4


def test_a_dense_model_sends_no_tokens_about() -> None:
    assert not [c for c in traffic.train(DENSE, Layout(fsdp=4), 9) if c.kind == "all-to-all"]


def test_experts_that_do_not_divide_are_refused_with_the_choices() -> None:
    with pytest.raises(
        ValueError, match=r"expert=3 does not divide num_experts=8; use one of \[1, 2"
    ):
        cost.train(MIXED, Layout(data=3, expert=3), TOKENS, ROWS)
    with pytest.raises(ValueError, match="must divide data"):
        Layout(data=2, expert=4)
    with pytest.raises(ValueError, match=r"experts_per_token=9 must lie in 1\.\.num_experts=8"):
        replace(MIXED, experts_per_token=9)


def test_a_mixture_cannot_be_computed_with() -> None:
    with pytest.raises(ValueError, match="predictions only"):
        layer_table(MIXED)


def test_of_the_experts_dealt_to_a_device_those_are_read_that_any_device_s_tokens_choose() -> None:
    """8 experts, 2 to a token; of 4 devices each has 2 and 3 tokens of its own: 12 choose among the 2."""
    chosen = MIXED.experts_per_token / MIXED.num_experts
    held = MIXED.num_experts / 4
    seen = read_experts(MIXED, Layout(data=4, expert=4), 3)
    assert seen == pytest.approx(held * (1 - (1 - chosen) ** 12))
