"""Properties of predictions, hardware descriptions and the sync-or-async comparison."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.config import ModelConfig
from roofline import cost
from roofline.datasheets import DATASHEETS, datasheet, datasheet_of_device
from roofline.hardware import Efficiency, Hardware
from roofline.kernels import Layout
from roofline.memory import memory_per_device
from roofline.phases import Phase, PhaseCost
from roofline.predict import compare_step, mbu, mfu, predict, stretched

MODEL = ModelConfig(
    vocab_size=1024,
    width=256,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_size=32,
    ffw_size=512,
)
OUTER = MODEL.vocab_size * MODEL.width  # the tied embedding; its gradients are summed as two
LAYERS = MODEL.num_parameters - OUTER - (2 * MODEL.num_layers + 1) * MODEL.width  # without norms
ROUNDING = 1 + 1e-9  # sums of floats in another order

amounts = st.just(0.0) | st.floats(1, 1e18)  # none, or at least one operation or byte
costs = st.builds(
    lambda flops, matrix, streamed, link, launches, collectives, dispatches: PhaseCost(
        phase=Phase.TRAIN, flops=flops, hbm_bytes=matrix + streamed, streamed_bytes=streamed,
        link_bytes=link, launches=launches, collectives=collectives, dispatches=dispatches,
        dtype="bfloat16",
    ),
    amounts, amounts, amounts, amounts,
    st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6),
)  # fmt: skip
shares = st.floats(0.01, 1)
calibrations = st.builds(
    Efficiency, compute=shares, memory=shares, link=shares, kernel_s=st.none() | st.floats(0, 1e-3),
    call_s=st.floats(0, 1),
)  # fmt: skip
machines = st.builds(
    lambda hardware, share: dataclasses.replace(hardware, phase_efficiency={"train": share}),
    st.sampled_from(list(DATASHEETS.values())), calibrations,
)  # fmt: skip


@given(costs, machines)
def test_the_bounds_enclose_as_they_should(work: PhaseCost, hardware: Hardware) -> None:
    seen = predict(work, hardware)
    assert seen.lower_s <= seen.upper_s * ROUNDING
    assert seen.lower_s <= seen.expected_s * ROUNDING
    assert seen.upper_s <= 3 * seen.lower_s * ROUNDING


@given(costs, machines, st.sampled_from(["flops", "hbm_bytes", "link_bytes"]), st.floats(1, 100))
def test_more_work_never_takes_less_time(
    work: PhaseCost, hardware: Hardware, field: str, factor: float
) -> None:
    more = dataclasses.replace(work, **{field: getattr(work, field) * factor})
    for name in ("lower_s", "upper_s", "expected_s"):
        before, after = (
            getattr(predict(work, hardware), name),
            getattr(predict(more, hardware), name),
        )
        assert before <= after * ROUNDING


@given(costs, machines)
def test_twice_as_fast_a_device_halves_all_but_the_fixed_times(
    work: PhaseCost, hardware: Hardware
) -> None:
    faster = dataclasses.replace(
        hardware,
        peak_flops_per_s={k: 2 * v for k, v in hardware.peak_flops_per_s.items()},
        hbm_bytes_per_s=2 * hardware.hbm_bytes_per_s,
        link_bytes_per_s=2 * hardware.link_bytes_per_s,
    )
    slow, fast = predict(work, hardware), predict(work, faster)
    assert fast.lower_s == pytest.approx(slow.lower_s / 2)
    assert fast.overhead_s == slow.overhead_s
    assert fast.expected_s - fast.overhead_s == pytest.approx(
        (slow.expected_s - slow.overhead_s) / 2, abs=1e-9 * slow.expected_s
    )


@pytest.mark.parametrize("phase", ["prefill", "decode", "score", "train", "optimizer"])
def test_one_device_sends_nothing_and_many_do(phase: str) -> None:
    def of(layout: Layout) -> PhaseCost:
        return {
            "prefill": lambda: cost.prefill(MODEL, layout, 8, 16),
            "decode": lambda: cost.decode(MODEL, layout, 8, 64, 4),
            "score": lambda: cost.score(MODEL, layout, 32, 8),
            "train": lambda: cost.train(MODEL, layout, 32, 8),
            "optimizer": lambda: cost.optimizer(MODEL, layout),
        }[phase]()

    alone = of(Layout())
    assert (alone.link_bytes, alone.collectives) == (0, 0)
    split = of(Layout(tensor=2))
    assert split.link_bytes > 0
    assert split.collectives > 0
    assert split.flops * 2 == alone.flops


def test_data_parallel_training_sends_the_gradient_twice_less_one_part() -> None:
    sent = cost.train(MODEL, Layout(data=4), 32, 8).link_bytes
    assert sent == 2 * 4 * (LAYERS + 2 * OUTER) * 3 / 4


def test_fsdp_training_gathers_the_weights_twice_and_scatters_all_gradients_but_the_heads() -> None:
    layout = Layout(fsdp=4, compute_dtype="bfloat16")
    sent = cost.train(MODEL, layout, 32, 8).link_bytes
    gathered, scattered = 2 * (LAYERS + OUTER), LAYERS + OUTER  # OUTER as embedding and as head
    summed_in_float32 = 2 * 4 * OUTER
    assert sent == (2 * (gathered + scattered) + summed_in_float32) * 3 / 4


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 8))
def test_cost_grows_with_slots_context_and_steps(slots: int, kv_len: int, steps: int) -> None:
    base = cost.decode(MODEL, Layout(), slots, kv_len, steps)
    for more in (
        cost.decode(MODEL, Layout(), slots + 1, kv_len, steps),
        cost.decode(MODEL, Layout(), slots, kv_len + cost.KV_BLOCK_TOKENS, steps),
        cost.decode(MODEL, Layout(), slots, kv_len, steps + 1),
    ):
        assert more.flops > base.flops
        assert more.hbm_bytes > base.hbm_bytes


def test_big_batches_are_bound_by_compute_and_single_streams_by_memory() -> None:
    big = ModelConfig(
        vocab_size=32000, width=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_size=128,
        ffw_size=14336, tied_embeddings=False,
    )  # fmt: skip
    layout = Layout(compute_dtype="bfloat16", param_dtype="bfloat16", kv_dtype="bfloat16")
    h100 = datasheet("h100-sxm")
    assert predict(cost.decode(big, layout, 1, 512, 1), h100).bound == "memory"
    assert predict(cost.train(big, layout, 256, 64, remat="block"), h100).bound == "compute"
    tiny = ModelConfig(
        vocab_size=20,
        width=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_size=32,
        ffw_size=64,
    )
    assert predict(cost.decode(tiny, layout, 8, 16, 8), h100).bound == "overhead"


def test_utilisation_is_one_at_the_bound_that_binds() -> None:
    h100 = datasheet("h100-sxm")
    work = PhaseCost(phase=Phase.TRAIN, flops=1e15, hbm_bytes=1e9, dtype="bfloat16")
    assert mfu(work, predict(work, h100).lower_s, h100) == pytest.approx(1)
    stream = PhaseCost(phase=Phase.TRAIN, flops=1e9, hbm_bytes=1e13, dtype="bfloat16")
    assert mbu(stream, predict(stream, h100).lower_s, h100) == pytest.approx(1)


def test_costs_of_different_phases_or_types_do_not_add() -> None:
    train = PhaseCost(phase=Phase.TRAIN)
    with pytest.raises(ValueError, match="decode"):
        train + PhaseCost(phase=Phase.DECODE)
    with pytest.raises(ValueError, match="bfloat16"):
        train + PhaseCost(phase=Phase.TRAIN, dtype="bfloat16")


def test_a_peak_that_the_hardware_lacks_is_named() -> None:
    work = PhaseCost(phase=Phase.TRAIN, dtype="float8")
    with pytest.raises(ValueError, match=r"float8.*bfloat16"):
        predict(work, datasheet("a100-sxm-80gb"))


def test_a_layout_that_does_not_divide_the_model_names_the_sizes_that_do() -> None:
    with pytest.raises(ValueError, match=r"tensor=3.*num_kv_heads=4.*\[1, 2, 4\]"):
        cost.decode(MODEL, Layout(tensor=3), 8, 8, 1)


# -- sync or async ---------------------------------------------------------------------------------

STEP = {Phase.DECODE: 6.0, Phase.TRAIN: 3.0, Phase.OPTIMIZER: 1.0}


def sharing(contention: float) -> Hardware:
    return dataclasses.replace(datasheet("l4"), contention=contention)


def test_on_devices_of_their_own_the_longest_lane_sets_the_step() -> None:
    best = compare_step(STEP, sharing(1.0))
    assert (best.sync_s, best.async_s, best.winner) == (10.0, 6.0, "async")
    assert best.speedup == pytest.approx(10 / 6)


def test_on_shared_cores_overlap_gains_nothing() -> None:
    best = compare_step(STEP, sharing(2.0))
    assert (best.async_s, best.winner, best.speedup) == (10.0, "sync", 1.0)


def test_a_verifier_that_only_waits_is_hidden_even_on_shared_cores() -> None:
    best = compare_step({**STEP, Phase.REWARD: 5.0}, sharing(2.0), waiting_s={Phase.REWARD: 5.0})
    assert (best.sync_s, best.async_s, best.winner) == (15.0, 10.0, "async")


@given(st.floats(0.001, 10), st.floats(0.001, 10), st.floats(1, 3))
def test_the_overlapped_step_lies_between_the_longest_lane_and_the_stretched_sum(
    rollout_s: float, learner_s: float, contention: float
) -> None:
    best = compare_step({Phase.DECODE: rollout_s, Phase.TRAIN: learner_s}, sharing(contention))
    longest, shortest = max(rollout_s, learner_s), min(rollout_s, learner_s)
    assert best.async_s == pytest.approx(longest + shortest * (contention - 1))


def test_a_phase_outside_the_step_is_refused() -> None:
    with pytest.raises(ValueError, match="eval is not part of a step"):
        compare_step({Phase.EVAL: 1.0}, sharing(1.0))


@given(st.floats(1e-6, 100), st.floats(0, 1), st.floats(1, 4))
def test_a_stretched_call_does_its_work_in_its_own_span(
    alone_s: float, share: float, contention: float
) -> None:
    span = stretched(alone_s, share, contention)
    assert span * (1 - share) + span * share / contention == pytest.approx(alone_s)
    assert alone_s <= span * ROUNDING


# -- hardware --------------------------------------------------------------------------------------


def test_hardware_survives_its_file(tmp_path: Path) -> None:
    hardware = dataclasses.replace(
        datasheet("h200"),
        phase_efficiency={"train": Efficiency(compute=0.5, memory=0.25, kernel_s=1e-6)},
        held_out={"train 8x8": 1.1},
        versions={"jax": "0"},
    )
    hardware.save(tmp_path / "hardware.json")
    assert Hardware.load(tmp_path / "hardware.json") == hardware


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hbm_bytes_per_s": 0.0}, "hbm_bytes_per_s"),
        ({"peak_flops_per_s": {"float32": -1.0}}, "float32"),
        ({"kernel_s": -1e-6}, "kernel_s"),
        ({"contention": 0.5}, "contention"),
    ],
)
def test_impossible_hardware_is_refused_by_field(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(datasheet("h200"), **change)


@pytest.mark.parametrize("share", [0.0, 1.2, -1.0])
def test_a_share_outside_zero_to_one_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share of a peak"):
        Efficiency(memory=share)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80gb"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_a_driver_name_finds_its_datasheet(kind: str, name: str) -> None:
    assert datasheet_of_device(kind) is datasheet(name)


@pytest.mark.parametrize("kind", ["cpu", "Tesla V100-SXM2-16GB", "NVIDIA L40"])
def test_an_unknown_device_has_no_datasheet(kind: str) -> None:
    assert datasheet_of_device(kind) is None


def test_datasheets_agree_with_the_collected_specifications(shared_data: Path) -> None:
    names = {
        "A100-SXM4-40GB": "a100-sxm-40gb", "A100-SXM4-80GB": "a100-sxm-80gb",
        "H100-SXM5-80GB": "h100-sxm", "H100-PCIe-80GB": "h100-pcie", "H200-SXM5-141GB": "h200",
        "B200-SXM-180GB": "b200", "L40S-48GB": "l40s", "L4-24GB": "l4", "RTX-4090": "rtx-4090",
        "RTX-3090": "rtx-3090",
    }  # fmt: skip
    specs = json.loads((shared_data / "roofline" / "gpu_specs.json").read_text())["gpus"]
    for spec in specs:
        ours = datasheet(names.pop(spec["name"]))
        assert ours.peak("bfloat16") == pytest.approx(1e12 * spec["dense_tflops"]["bf16"])
        assert ours.hbm_bytes_per_s == pytest.approx(1e9 * spec["hbm_gb_per_s"])
        assert ours.hbm_bytes == pytest.approx(1e9 * spec["memory_gb"])
    assert not names


# -- memory ----------------------------------------------------------------------------------------


def test_block_recomputation_and_more_devices_need_less_memory() -> None:
    def of(layout: Layout, remat: cost.Remat = "none") -> dict[str, int]:
        return memory_per_device(MODEL, layout, trains=True, rows=16, row_tokens=64, remat=remat)

    assert of(Layout(), "block")["activations"] < of(Layout())["activations"]
    for layout in (Layout(fsdp=2), Layout(tensor=2)):
        split, whole = of(layout), of(Layout())
        assert split["parameters"] < 0.6 * whole["parameters"]
        assert split["activations"] < 0.8 * whole["activations"]


def test_a_rollout_device_holds_both_snapshots_and_its_share_of_the_cache() -> None:
    sizes = memory_per_device(MODEL, Layout(data=2, tensor=2), slots=8, max_len=64, snapshots=2)
    assert sizes["snapshots"] == 2 * 4 * MODEL.num_parameters / 2
    assert sizes["kv_cache"] == 8 * 64 * MODEL.kv_bytes_per_token(4) / 4
    assert "gradients" not in sizes
