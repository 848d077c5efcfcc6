"""A dozen predictions worked again with pen and paper: the scaling book's formulas and a model's sizes alone.

products of a layer   2 D (N + K) H + 3 D F weights; forward 2 flops each and token, training 6
attention             4 B T S N H flops, half of them where a kernel leaves out what the mask hides
cache                 4 S L K H bytes of a sequence (bfloat16)
egress of a device    gather or scatter A (n - 1) / n, all-reduce twice that, all-to-all as a gather
"""

from __future__ import annotations

import dataclasses

import pytest

from roofline.answer import answer, collectives_of, cost_of
from roofline.choose import find_model
from roofline.cost import prefill, train
from roofline.datasheets import datasheet
from roofline.hardware import Efficiency
from roofline.kernel_times import gpu
from roofline.kernels import Layout
from roofline.phases import Phase, PhaseCost
from roofline.predict import predict, stretched
from roofline.question import Question
from roofline.serving import decode_step, prefill_step, serving_step
from roofline.training import Parallel, TrainStep, train_step

H100, A100 = datasheet("h100-sxm"), datasheet("a100-sxm-80gb")
M = find_model("qwen3-8b", 128)  # untied: an embedding and a head
L, D, N, K, H, F, V = (
    M.num_layers, M.width, M.num_heads, M.num_kv_heads, M.head_size, M.ffw_size, M.vocab_size,
)  # fmt: skip
LAYER = 2 * D * (N + K) * H + 3 * D * F
NORMS = L * (2 * D + 2 * H) + D  # of which every device has all
MIX = find_model("mixtral-8x7b", 128)
EXPERT, ROUTER = 3 * MIX.width * MIX.ffw_size, MIX.width * MIX.num_experts
MIX_ATTENTION = 2 * MIX.width * (MIX.num_heads + MIX.num_kv_heads) * MIX.head_size
BF16, F32 = 2, 4
ACTIVATIONS = 1.12
"""Bytes over those of weights and cache alone: float32 scores of attention, activations and logits, which the
book leaves out of a decode step."""


def ask(**changes: object) -> Question:
    base = Question(model=M, hardware=H100, phase=Phase.DECODE, batch=64, kv_len=2048)
    return dataclasses.replace(base, **changes)


def test_a_decode_step_reads_every_weight_and_every_cached_key_once() -> None:
    seen = answer(ask())
    weights, cache = BF16 * (L * LAYER + V * D), 64 * 4 * 2048 * L * K * H
    assert weights + cache < seen.cost.hbm_bytes < ACTIVATIONS * (weights + cache)
    flops = 2 * 64 * (L * LAYER + V * D) + 4 * 64 * 2048 * N * H * L
    assert seen.cost.flops == flops
    assert seen.prediction.lower_s == seen.cost.hbm_bytes / 3350e9
    assert seen.mfu == pytest.approx(flops / 989.4e12 / seen.prediction.expected_s)
    assert seen.mbu == pytest.approx(seen.cost.hbm_bytes / 3350e9 / seen.prediction.expected_s)


def test_a_chunk_s_tokens_are_its_steps_times_its_sequences() -> None:
    seen = answer(ask(steps=16))
    assert seen.tokens_per_s == 64 * 16 / seen.prediction.expected_s
    prompts = answer(ask(phase=Phase.PREFILL, batch=4, tokens=512))
    assert prompts.tokens_per_s == 4 * 512 / prompts.prediction.expected_s


def test_tensor_parallel_decode_divides_what_is_read_and_reduces_two_activations_a_layer() -> None:
    alone, split = cost_of(ask()), cost_of(ask(tensor=4))
    gathered = F32 * 64 * V * 3 / 4  # the logits of a step, which sampling needs whole
    embedding = 2 * 64 * D * BF16 * 3 / 4
    assert split.flops == alone.flops / 4
    assert split.link_bytes == 2 * L * 2 * 64 * D * BF16 * 3 / 4 + gathered + embedding
    assert alone.link_bytes == 0
    assert alone.hbm_bytes / 4 < split.hbm_bytes < 1.15 * alone.hbm_bytes / 4


@pytest.mark.parametrize(("hardware", "of_pairs"), [(H100, 2), (A100, 4)])
def test_a_prompt_s_flops_are_those_of_its_layers_and_of_the_attention_there(
    hardware: object, of_pairs: int
) -> None:
    seen = answer(ask(phase=Phase.PREFILL, batch=4, tokens=4096, hardware=hardware))
    assert seen.cost.flops == 4 * 4096 * 2 * L * LAYER + of_pairs * 4 * 4096**2 * N * H * L


def test_training_takes_six_flops_a_weight_and_token_and_the_logits_again() -> None:
    seen = cost_of(ask(phase=Phase.TRAIN, batch=8, tokens=4096, fsdp=8))
    attention = (6 + 1) * 4096**2 * N * H * L  # forward 2, backward 4, the scores again
    assert seen.flops == 4096 * (6 * L * LAYER + 8 * V * D) + attention
    again = cost_of(ask(phase=Phase.TRAIN, batch=8, tokens=4096, fsdp=8, remat="block"))
    recomputed = L * 4096 * 2 * (LAYER - D * F)  # all products of a layer but the last
    assert again.flops == seen.flops + recomputed


def test_fully_sharded_training_gathers_twice_and_scatters_once() -> None:
    seen = cost_of(ask(phase=Phase.TRAIN, batch=8, tokens=4096, fsdp=8))
    layers, matrix = BF16 * L * LAYER, V * D
    of_embedding = 2 * BF16 * matrix  # gathered, its gradient scattered
    of_head = BF16 * matrix + 2 * F32 * matrix  # gathered, its gradient reduced whole in float32
    assert seen.link_bytes == (3 * layers + of_embedding + of_head) * 7 / 8


def test_tensor_parallel_training_reduces_four_activations_a_layer() -> None:
    seen = cost_of(ask(phase=Phase.TRAIN, batch=1, tokens=4096, tensor=8))
    reduced = [c for c in collectives_of(ask(phase=Phase.TRAIN, batch=1, tokens=4096, tensor=8))]
    assert {(c.kind, c.axis, c.devices) for c in reduced} == {("all-reduce", "tensor", 8)}
    activation = 2 * 4096 * D * BF16 * 7 / 8
    statistics = 4 * 2 * 4096 * F32 * 7 / 8
    assert seen.link_bytes == (4 * L + 2) * activation + statistics  # 2: embedding and head


def test_a_mixture_s_step_reads_the_chosen_experts_and_computes_with_k_of_them() -> None:
    two = dataclasses.replace(H100, hbm_bytes=1e12)
    one = cost_of(ask(model=MIX, hardware=two, batch=1, kv_len=32))
    many = cost_of(ask(model=MIX, hardware=two, batch=512, kv_len=32))
    head, layers = MIX.vocab_size * MIX.width, MIX.num_layers
    active = layers * (MIX_ATTENTION + ROUTER + 2 * EXPERT) + head
    attention = 4 * 32 * MIX.num_heads * MIX.head_size * layers
    assert one.flops == 2 * active + attention
    assert many.flops == 512 * one.flops
    assert BF16 * active < one.hbm_bytes < ACTIVATIONS * BF16 * active
    held = BF16 * (layers * (MIX_ATTENTION + ROUTER + 8 * EXPERT) + head)
    cache = 512 * 4 * 32 * layers * MIX.num_kv_heads * MIX.head_size
    assert held + cache < many.hbm_bytes < ACTIVATIONS * (held + cache)


def test_experts_dealt_to_devices_send_every_chosen_copy_there_and_back_twice() -> None:
    layout = {"data": 8, "compute_dtype": "bfloat16"}
    apart, whole = (train(MIX, Layout(**layout, expert=expert), 1024, 8) for expert in (8, 1))
    copies = 4 * MIX.num_layers * 1024 * 2 * MIX.width * BF16 * 7 / 8
    of_experts = 2 * MIX.num_layers * 8 * EXPERT * BF16 * 7 / 8  # whose gradients nobody sums then
    assert apart.link_bytes - whole.link_bytes == pytest.approx(copies - of_experts)


def test_a_pipeline_takes_a_turn_for_each_microbatch_and_each_stage_after_the_first() -> None:
    seen = answer(ask(phase=Phase.SCORE, batch=16, tokens=2048, pipeline=4, microbatches=8))
    alone = answer(
        ask(
            phase=Phase.SCORE, batch=2, tokens=2048, model=dataclasses.replace(M, num_layers=L // 4)
        )
    )
    hop = H100.link_latency_s + 2 * 2048 * D * BF16 / 450e9
    expected = (8 + 3) * (alone.prediction.expected_s + hop)
    assert seen.prediction.expected_s == pytest.approx(expected)
    assert seen.prediction.lower_s == pytest.approx((8 + 3) * alone.prediction.lower_s)
    assert seen.turns.idle == 3 / 11


def test_training_sends_gradients_back_and_keeps_as_many_microbatches_as_there_are_stages() -> None:
    sizes = {"batch": 16, "tokens": 512, "pipeline": 4, "microbatches": 8, "fsdp": 1}
    score, trained = (answer(ask(phase=phase, **sizes)) for phase in (Phase.SCORE, Phase.TRAIN))
    assert trained.hops_s == 2 * score.hops_s
    halves = answer(ask(phase=Phase.TRAIN, **sizes, tensor=2))
    sent = trained.hops_s - 2 * 11 * H100.link_latency_s
    assert halves.hops_s - 2 * 11 * H100.link_latency_s == pytest.approx(sent / 2)
    stage = dataclasses.replace(M, num_layers=L // 4)
    once = answer(ask(phase=Phase.TRAIN, batch=2, tokens=512, model=stage))
    assert trained.memory_bytes["activations"] == 4 * once.memory_bytes["activations"]
    few = answer(ask(phase=Phase.TRAIN, **{**sizes, "microbatches": 2, "batch": 4}))
    assert few.memory_bytes["activations"] == 2 * once.memory_bytes["activations"]


def test_a_stage_keeps_of_the_layers_without_rotation_those_that_it_has() -> None:
    model = dataclasses.replace(M, no_rope_layers=(3, 8, 35))
    assert ask(model=model, pipeline=4).stage.no_rope_layers == (3, 8)


def test_gradients_of_replicas_on_two_nodes_cross_the_network_once_each_way() -> None:
    """A ring over 2 nodes of 8: a node sends A (M - 1) / M twice, at 8 x 50 GB/s."""
    asked = ask(
        phase=Phase.TRAIN, batch=16, tokens=512, data=16, model=find_model("qwen3-0.6b", 128)
    )
    model = asked.model
    layer = 2 * model.width * (16 + 8) * 128 + 3 * model.width * model.ffw_size
    matrix = model.vocab_size * model.width
    array = BF16 * (model.num_layers * layer + matrix) + F32 * matrix
    seen, near = answer(asked), dataclasses.replace(H100, network_bytes_per_s=1e15)
    inside = answer(dataclasses.replace(asked, hardware=near))
    assert seen.cost.link_bytes == pytest.approx(2 * array * 15 / 16)
    across_s = max(2 * array * (2 - 1) / 2 / 400e9, 2 * array * 7 / 8 / 450e9)
    inside_s = 2 * array * 7 / 8 / 450e9
    slower = (across_s - inside_s) / H100.efficiency.link
    found = seen.prediction.expected_s - inside.prediction.expected_s
    assert found == pytest.approx(slower, abs=1e-9)


def test_an_optimizer_s_step_moves_thirty_two_bytes_of_every_parameter_held() -> None:
    seen = answer(ask(phase=Phase.OPTIMIZER, fsdp=8))
    assert seen.cost.hbm_bytes == 32 * (L * LAYER + 2 * V * D) / 8 + 32 * NORMS


def test_a_publication_casts_gathers_and_copies_to_every_replica() -> None:
    seen = cost_of(ask(phase=Phase.PUBLISH, fsdp=8))
    matrices = BF16 * (L * LAYER + 2 * V * D)
    assert seen.link_bytes == matrices * 7 / 8 + (matrices + BF16 * NORMS) * 8 / 8


def test_the_expected_time_is_fixed_times_products_streams_and_links() -> None:
    work = PhaseCost(
        phase=Phase.TRAIN, flops=1e15, hbm_bytes=4e12, streamed_bytes=1e12, link_bytes=1e11,
        launches=1000, collectives=10, dispatches=2, dtype="bfloat16",
    )  # fmt: skip
    share = Efficiency(compute=0.5, memory=0.8, link=0.4, call_s=1e-3)
    fixed = 1e-3 + 2 * H100.dispatch_s + 1000 * H100.kernel_s + 10 * H100.link_latency_s
    products = max(1e15 / 989.4e12 / 0.5, 3e12 / 3350e9 / 0.8)
    expected = fixed + products + 1e12 / 3350e9 / 0.8 + 1e11 / 450e9 / 0.4
    assert predict(work, H100, share).expected_s == pytest.approx(expected)


@pytest.mark.parametrize(("share", "span"), [(0.0, 1.0), (0.5, 1.2), (1.0, 1.5), (2.0, 2.0)])
def test_beside_lanes_at_work_a_call_advances_at_their_pace(share: float, span: float) -> None:
    """Alone 1 s, contention 1.5: span M = 1 - share + share / 1.5 of itself done; two lanes: 1 + 2 x 0.5."""
    assert stretched(1.0, share, 1.5) == pytest.approx(span)


def test_chunks_of_logits_change_no_flops_and_weights_are_cast_once_for_each_pass() -> None:
    whole = cost_of(ask(phase=Phase.TRAIN, batch=8, tokens=4096, fsdp=8))
    chunked = cost_of(ask(phase=Phase.TRAIN, batch=8, tokens=4096, fsdp=8, chunk_tokens=1024))
    assert chunked.flops == whole.flops
    stored, cast = (
        train(M, Layout(compute_dtype="bfloat16", param_dtype=dtype), 1024, 1)
        for dtype in ("bfloat16", "float32")
    )
    assert cast.hbm_bytes - stored.hbm_bytes == 2 * (F32 + BF16) * M.num_parameters


def test_replicas_sum_each_device_s_shard_of_the_gradients() -> None:
    sizes = {"phase": Phase.TRAIN, "tokens": 1024, "fsdp": 4}
    one, two = cost_of(ask(**sizes, batch=4)), cost_of(ask(**sizes, batch=8, data=2))
    gradients = (BF16 * (L * LAYER + V * D) + F32 * V * D) / 4
    assert two.link_bytes - one.link_bytes == pytest.approx(2 * gradients / 2)


def test_tuned_kernels_take_a_chunk_s_steps_and_a_batch_s_microbatches() -> None:
    once, chunk = answer(ask()).tuned_s, answer(ask(steps=16)).tuned_s
    assert once is not None
    assert chunk is not None
    assert chunk[0] == pytest.approx(16 * once[0])
    seen = answer(ask(phase=Phase.TRAIN, batch=16, tokens=1024, fsdp=8, microbatches=2)).tuned_s
    step = TrainStep(global_batch=16, micro_batch=1, seq=1024, dtype="bfloat16")
    assert seen is not None
    assert seen[0] == train_step(M, gpu("h100-sxm"), Parallel(fsdp=8), step).expected_s


def test_in_a_pipeline_as_many_groups_of_slots_decode_as_there_are_stages() -> None:
    seen = answer(ask(pipeline=4, batch=64))
    assert (seen.turns.microbatches, seen.turns.idle) == (4, 0.0)
    assert answer(ask(pipeline=4, batch=2)).turns.microbatches == 2
    alone = cost_of(ask(batch=16, model=dataclasses.replace(M, num_layers=L // 4)))
    assert seen.cost.flops == 4 * alone.flops


def test_the_cache_of_a_prompt_is_written_once_and_copied_to_each_of_its_slots() -> None:
    layout = Layout(compute_dtype="bfloat16", param_dtype="bfloat16", kv_dtype="bfloat16")
    held = 4 * 64 * L * K * H  # of a prompt of 64 tokens
    alone, copied = (prefill(M, layout, 4, 64, samples) for samples in (0, 32))
    assert copied.hbm_bytes - alone.hbm_bytes == 32 * 2 * held
    eight_bits = prefill(M, dataclasses.replace(layout, kv_dtype="int8"), 4, 64, 0)
    assert alone.hbm_bytes - eight_bits.hbm_bytes == 4 * held / 2
    assert alone.dispatches == 4  # two transfers, the prefill, the copy


def test_a_step_under_load_is_decode_a_share_of_a_prompt_and_the_host() -> None:
    device, sizes = gpu("h100-sxm"), {"batch": 64, "prompt_tokens": 512, "new_tokens": 128}
    seen = serving_step(M, device, **sizes)
    step = decode_step(M, device, batch=64, kv_len=512 + 128 / 2)
    prompt = prefill_step(M, device, rows=1, tokens=512)
    expected = step.expected_s + 64 / 128 * prompt.expected_s + 200e-6
    assert seen.expected_s == pytest.approx(expected)
