"""Pipeline stages and nodes: what they add follows the formulas, and what cannot be is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from roofline.answer import answer, collectives_of, cost_of
from roofline.choose import find_model
from roofline.datasheets import datasheet
from roofline.hardware import Hardware
from roofline.phases import Phase
from roofline.placement import Placement, turns_of
from roofline.predict import predict
from roofline.question import Question
from roofline.traffic import Axis, Collective, Kind
from roofline.what_if import main

H100 = datasheet("h100-sxm")
MODEL = find_model("qwen3-1.7b", 128)  # 28 layers
TRAIN = Question(
    model=MODEL, hardware=H100, phase=Phase.TRAIN, batch=64, tokens=512, remat="block",
    fsdp=2, data=4,
)  # fmt: skip
ROUNDING = 1e-9


def gather(axis: Axis, devices: int, kind: Kind = "all-gather") -> Collective:
    return Collective(kind=kind, axis=axis, devices=devices, array_bytes=1e9)


def test_across_nodes_a_gather_takes_the_book_s_bytes_over_the_node_s_egress() -> None:
    place = Placement(data=32, nodes=4)
    egress = 8 * H100.network_bytes_per_s
    book_s = 1e9 * max(7 / 8 / H100.link_bytes_per_s, 3 / 4 / egress)
    assert place.collective_s(gather("data", 32), H100) == pytest.approx(book_s)
    summed = place.collective_s(gather("data", 32, kind="all-reduce"), H100)
    assert summed == pytest.approx(2 * book_s)


def test_groups_beside_each_other_share_a_node_s_egress() -> None:
    apart = Placement(data=2, fsdp=8, nodes=2)
    egress = 8 * H100.network_bytes_per_s
    expected = 1e9 * 8 * (1 / 2) / egress  # eight groups of two, one device of each in either node
    assert apart.collective_s(gather("data", 2), H100) == pytest.approx(expected)


def test_axes_wider_than_a_node_have_every_device_of_it_beside_each_other() -> None:
    place = Placement(data=2, fsdp=4, tensor=4, nodes=4)  # 8 groups of 2, one device in each node
    found = Collective(kind="all-reduce", axis="data", devices=2, array_bytes=1e9)
    assert place.collective_s(found, H100) == pytest.approx(2 * 1e9 * 8 / 2 / (8 * 50e9))


def test_nodes_filled_unevenly_are_as_many_as_are_begun() -> None:
    place = Placement(fsdp=5, nodes=2)  # 3 and 2
    assert place.per_node == 3
    seconds = place.collective_s(gather("fsdp", 5), H100)
    assert seconds == pytest.approx(gather("fsdp", 5).array_bytes / 2 / (3 * 50e9))


def test_a_stage_that_fills_its_node_hands_on_over_the_network() -> None:
    filling = Placement(tensor=8, pipeline=2, nodes=2)
    beside = Placement(tensor=4, pipeline=4, nodes=2)
    for place, rate in ((filling, 50e9), (beside, 450e9)):
        assert place.hop_s(1e9, H100) == pytest.approx(H100.link_latency_s + 1e9 / rate)


def test_of_an_exchange_every_device_sends_its_own_array_at_its_part_of_the_network() -> None:
    place = Placement(data=32, nodes=4)
    found = Collective(kind="all-to-all", axis="expert", devices=32, array_bytes=1e9)
    seconds = place.collective_s(found, H100)
    assert seconds == pytest.approx(1e9 * 24 / 32 / H100.network_bytes_per_s)


def test_inside_a_node_nothing_changes() -> None:
    place = Placement(data=2, tensor=8, nodes=2)
    inside = gather("tensor", 8)
    assert place.collective_s(inside, H100) == pytest.approx(
        inside.link_bytes / H100.link_bytes_per_s
    )


@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.DECODE, Phase.SCORE, Phase.TRAIN])
def test_the_collectives_over_axes_send_what_the_phase_s_cost_counts(phase: Phase) -> None:
    fsdp = 1 if phase in (Phase.PREFILL, Phase.DECODE) else 2
    question = dataclasses.replace(TRAIN, phase=phase, fsdp=fsdp, tensor=2, data=2, pipeline=2)
    sent = sum(found.link_bytes for found in collectives_of(question))
    assert sent == pytest.approx(cost_of(question).link_bytes, rel=ROUNDING)


def test_what_sampling_gathers_over_heads_of_one_node_does_not_cross_the_network() -> None:
    one = dataclasses.replace(
        TRAIN, phase=Phase.DECODE, batch=64, steps=16, fsdp=1, tensor=4, data=2, pipeline=1, nodes=1
    )
    near, far = (answer(dataclasses.replace(one, nodes=nodes)).prediction for nodes in (1, 2))
    assert far.link_s < 1.01 * near.link_s  # the samples themselves, some bytes for each slot, do


def test_the_network_between_nodes_costs_time_and_a_faster_one_less() -> None:
    quick = dataclasses.replace(H100, network_bytes_per_s=2 * H100.network_bytes_per_s)
    near, far, faster = (
        answer(dataclasses.replace(TRAIN, **changes)).prediction
        for changes in ({"nodes": 1}, {"nodes": 4}, {"nodes": 4, "hardware": quick})
    )
    assert near.link_s < faster.link_s < far.link_s
    assert near.expected_s <= faster.expected_s <= far.expected_s
    assert near.compute_s == far.compute_s


def test_devices_beyond_a_node_fill_the_fewest_nodes() -> None:
    assert dataclasses.replace(TRAIN, data=16).placement.nodes == 4
    assert TRAIN.placement.nodes == 1


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 1), (2, 8), (4, 4), (7, 28)])
def test_a_pipeline_takes_a_turn_more_for_each_stage_beyond_the_first(
    stages: int, microbatches: int
) -> None:
    question = dataclasses.replace(
        TRAIN, data=1, fsdp=1, batch=28 * 8, pipeline=stages, microbatches=microbatches
    )
    seen, turns = answer(question), question.turns
    assert turns.turns == microbatches + stages - 1
    alone = predicted_alone(question)
    expected = alone * turns.turns / microbatches + seen.hops_s
    assert seen.prediction.expected_s == pytest.approx(expected)
    assert turns.idle == pytest.approx((stages - 1) / turns.turns)


def predicted_alone(question: Question) -> float:
    return predict(cost_of(question), question.hardware).expected_s


def test_stages_share_the_layers_their_memory_and_their_products() -> None:
    one = dataclasses.replace(TRAIN, data=1, fsdp=1, batch=32, microbatches=8)
    four = dataclasses.replace(one, pipeline=4)
    assert four.stage.num_layers == 7
    first, last = answer(one), answer(four)
    for name in ("parameters", "optimizer"):
        assert last.memory_bytes[name] < first.memory_bytes[name]
    assert last.cost.flops < first.cost.flops
    assert last.prediction.expected_s > first.prediction.expected_s / 4


def test_more_microbatches_leave_stages_less_idle() -> None:
    idle = [turns_of(64, 4, m).idle for m in (1, 2, 4, 8, 16, 64)]
    assert idle == sorted(idle, reverse=True)
    assert turns_of(64, 4, 0).microbatches == 16
    assert turns_of(5, 4, 0).microbatches == 5


def test_decoding_in_a_pipeline_keeps_every_stage_at_work() -> None:
    one = Question(model=MODEL, hardware=H100, phase=Phase.DECODE, batch=64, kv_len=512)
    two = dataclasses.replace(one, pipeline=2)
    head = 2 * 64 * MODEL.vocab_size * MODEL.width
    assert cost_of(two).flops - head == pytest.approx((cost_of(one).flops - head) / 2)
    assert two.turns.idle == 0
    assert answer(two).hops_s > 0


ARGUMENTS = [
    "--model", "qwen3-1.7b", "--hardware", "h100-80gb-sxm", "--phase", "train", "--batch", "64",
    "--tokens", "512", "--remat", "block", "--devices", "16", "--parallel.fsdp", "2",
]  # fmt: skip


def test_the_command_predicts_a_pipeline_on_several_nodes(capsys) -> None:
    main([*ARGUMENTS, "--parallel.pipeline", "4", "--nodes", "2", "--json"])
    seen = json.loads(capsys.readouterr().out)
    assert seen["placement"] == {"data": 2, "fsdp": 2, "tensor": 1, "pipeline": 4, "nodes": 2}
    assert seen["turns"] == {"stages": 4, "microbatches": 16}
    assert seen["tuned_s"][1] < seen["tuned_s"][0] < seen["tuned_s"][2]
    main([*ARGUMENTS, "--parallel.pipeline", "4", "--nodes", "2"])
    text = capsys.readouterr().out
    for words in ("on 2 nodes of 8", "pipeline 4", "16 micro-batches in 19 turns, idle 15.8%"):
        assert words in text


@pytest.mark.parametrize("sweep", ["pipeline=1,2,4,7", "nodes=2,4,8", "microbatches=1..4"])
def test_stages_nodes_and_microbatches_can_be_swept(sweep: str, capsys) -> None:
    main([*ARGUMENTS[:-4], "--parallel.data", "16", "--sweep", sweep, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert not [row["error"] for row in rows if "error" in row]
    if sweep.startswith("nodes"):
        times = [row["prediction"]["link_s"] for row in rows]
        assert times == sorted(times)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--parallel.pipeline", "3"], "is not a multiple of fsdp * pipeline = 6; use 12 or 18"),
        (["--parallel.pipeline", "8"], "pipeline=8 does not divide num_layers=28; use one of [1, 2, 4, 7"),
        (["--nodes", "3"], "nodes=3 do not share 16 devices evenly; use 2 or 4"),
        (["--nodes", "1"], "a node of h100-sxm has 8; use --nodes 2"),
        (["--nodes", "0"], "--nodes=0 must be >= 1"),
        (["--microbatches", "99"], "microbatches=99, but a replica has 4 rows; use at most 4"),
        (["--hardware", "rtx-4090"], "whose network is not known"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_nearest_choice(changes, words: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*ARGUMENTS, *changes])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_hardware_without_a_network_still_answers_within_a_node() -> None:
    unknown: Hardware = dataclasses.replace(H100, network_bytes_per_s=0.0)
    assert answer(dataclasses.replace(TRAIN, hardware=unknown)).placement.nodes == 1
