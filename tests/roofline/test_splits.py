"""A split's numbers worked again from its parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jaxrl.row_layout import lay_out
from roofline import cost
from roofline.closed_form import closed_step_s
from roofline.datasheets import datasheet
from roofline.events import Mode, Pipeline
from roofline.hardware import Hardware
from roofline.job import Job
from roofline.kernels import Layout
from roofline.lengths import Lengths, lognormal
from roofline.model_zoo import ZOO
from roofline.phases import Phase
from roofline.plan import advise
from roofline.predict import LANES, predict
from roofline.read_run import Run, Span
from roofline.report.outlook import faster
from roofline.settings import Settings, read_settings
from roofline.simulate import pipeline_of, pipeline_of_run
from roofline.splits import (
    learner_memory,
    learner_times,
    rollout_memory,
    rollout_times,
    split_of,
)

H200 = datasheet("h200")
MODEL = ZOO["qwen3-0.6b"].config
HALF = {"compute_dtype": "bfloat16", "kv_dtype": "bfloat16"}
LEARNER, GENERATORS = Layout(**HALF), Layout(**HALF, param_dtype="bfloat16", data=3)
WORDS = (
    "--model.dtype=bfloat16", "--train.row_tokens=1024", "--rollout.max_prompt_tokens=128",
    "--rollout.max_new_tokens=512", "--rollout.chunk_steps=16", "--grpo.prompts_per_step=32",
    "--grpo.group_size=8",
)  # fmt: skip


def job_of(*words: str, lengths: Lengths | None = None) -> Job:
    settings: Settings = read_settings("quickstart", [*WORDS, *words])
    return Job(model=MODEL, settings=settings, lengths=lengths or lognormal(256, 0.5, 512))


def test_idle_is_what_neither_lane_s_devices_use() -> None:
    job = job_of()
    learner = learner_times(job, H200, LEARNER, 16)
    rollout = rollout_times(job, H200, GENERATORS, 96)
    seen = split_of(job, H200, learner, rollout, 1, colocated=False)
    learns = sum(s for phase, s in seen.phase_s.items() if phase in LANES["learner"])
    generates = seen.phase_s[Phase.PREFILL] + seen.phase_s[Phase.DECODE]
    assert seen.idle == pytest.approx(1 - (1 * learns + 3 * generates) / (4 * seen.step_s))
    assert seen.idle > 0.05


def test_slots_that_are_used_again_are_filled_chunk_by_chunk() -> None:
    job = job_of()
    seen = rollout_times(job, H200, GENERATORS, 96)
    refills = round(256 / 96 * job.held_steps / 16)
    once = predict(
        cost.prefill(MODEL, GENERATORS, -(-32 // refills), 128, -(-256 // refills)), H200
    )
    assert seen.prefill_s == pytest.approx(refills * once.expected_s)
    full = 256 * job.held_steps / 96 * seen.decode_step_s + seen.prefill_s
    assert seen.steady_s == pytest.approx(full)
    last = (256 - 96) / 96 * job.held_steps + job.lengths.expected_max(96)
    assert seen.lockstep_s == pytest.approx(last * seen.decode_step_s + seen.prefill_s)
    group = job.lengths.expected_max(8) * seen.decode_step_s + seen.prefill_s / 32
    assert seen.latency_s == pytest.approx(group)


def test_verifiers_share_the_samples_of_a_step_and_may_bind_it() -> None:
    job = job_of("--task.reward_workers=4", "--task.reward_latency_s=0.5")
    assert job.verify_s == 256 / 4 * 0.5
    assert job_of("--task.reward_workers=0", "--task.reward_latency_s=0.5").verify_s == 0.5
    assert closed_step_s(1.0, 1.0, 1.0, 4, verify_s=9.0) == 9.0


def test_a_reference_and_two_snapshots_are_held_where_they_are_needed() -> None:
    plain, scored = (
        learner_memory(job_of(*w), LEARNER, 16) for w in ((), ("--grpo.kl_weight=0.1",))
    )
    assert "reference" not in plain
    assert scored["reference"] == scored["parameters"] == 4 * MODEL.num_parameters
    held = rollout_memory(job_of(), GENERATORS, 96)
    assert held["snapshots"] == 2 * 2 * MODEL.num_parameters


def test_devices_that_share_cores_take_turns() -> None:
    shared = dataclasses.replace(H200, devices_share_cores=True)
    alone, together = (rollout_times(job_of(), h, GENERATORS, 96) for h in (H200, shared))
    assert together.decode_step_s == pytest.approx(3 * alone.decode_step_s)
    assert together.prefill_s == pytest.approx(3 * alone.prefill_s)


def test_a_completion_holds_its_slot_to_the_end_of_its_chunk() -> None:
    lengths = Lengths(tokens=np.array([1, 16, 17]), source="three")
    assert lengths.in_chunks(16).tokens.tolist() == [16, 16, 32]


def test_the_optimum_gives_each_lane_devices_by_its_work_and_regret_is_counted_from_it() -> None:
    generous = lognormal(500, 0.1, 512)
    seen = advise(job_of("--train.row_tokens=4096", lengths=generous), H200, 4)
    short = advise(job_of(lengths=lognormal(2, 0.1, 512)), H200, 4)
    assert seen.optimum_generators > 2 > short.optimum_generators
    assert seen.regret == pytest.approx(seen.best.step_s / seen.optimum_s - 1)
    assert seen.speedup == seen.synchronous.step_s / seen.asynchronous.step_s


@pytest.mark.parametrize(("colocated", "contention"), [(True, 2.0), (False, 1.0)])
def test_lanes_on_the_same_devices_are_simulated_taking_turns(
    colocated: bool, contention: float
) -> None:
    job = job_of()
    layout = dataclasses.replace(GENERATORS, data=1)
    rollout, learner = rollout_times(job, H200, layout, 64), learner_times(job, H200, LEARNER, 16)
    split = split_of(job, H200, learner, rollout, 1, colocated=colocated)
    seen = pipeline_of(job, split, H200, Mode.IN_FLIGHT)
    assert seen.contention == contention
    assert seen.learner_s == pytest.approx(learner.seconds)
    assert seen.publish_s == split.phase_s[Phase.PUBLISH]


def test_a_replayed_phase_is_freed_of_what_the_other_lane_took(tmp_path: Path) -> None:
    """Decode of 10 ms, half of it beside training, which makes it 1.5 times slower while it lasts."""
    (tmp_path / "config.yaml").write_text("{}")
    hardware: Hardware = dataclasses.replace(H200, contention=1.5)
    spans = [
        Span(phase=Phase.DECODE, lane="rollout", start_s=0.0, duration_s=0.010, work={"steps": 1}),
        Span(phase=Phase.TRAIN, lane="learner", start_s=0.005, duration_s=0.010),
        Span(phase=Phase.PREFILL, lane="rollout", start_s=0.020, duration_s=0.001),
        *(Span(phase=Phase.PUBLISH, lane="learner", start_s=0.03 + k / 100, duration_s=0.001)
          for k in range(3)),
    ]  # fmt: skip
    run = Run(
        folder=tmp_path, hardware=hardware, spans=tuple(spans), metrics=(), summary={}, config={},
        notes=(),
    )  # fmt: skip
    assert pipeline_of_run(run).decode_step_s == pytest.approx(0.005 + 0.005 / 1.5)


def test_a_faster_lane_does_all_its_work_faster_and_the_other_none() -> None:
    base = Pipeline(
        prompts_per_step=8, group_size=4, slots=32, chunk_steps=8, decode_step_s=0.01, admit_s=0.02,
        prompt_s=0.03, learner_s=0.5, publish_s=0.06,
    )  # fmt: skip
    learner, generators = faster(base, learner=2.0), faster(base, generators=2.0)
    halved = dataclasses.replace(base, learner_s=0.25, publish_s=0.03)
    assert learner == halved
    halved = dataclasses.replace(base, decode_step_s=0.005, admit_s=0.01, prompt_s=0.015)
    assert generators == halved


@pytest.mark.parametrize(("mean", "prompt"), [(600, 128), (1944, 2048), (1024, 1024), (3072, 256)])
def test_a_step_has_as_many_rows_as_the_learner_packs(mean: int, prompt: int) -> None:
    """Random completions need a row in fifty more than evenly spread ones."""
    lengths = lognormal(mean, 0.6, 4096)
    job = job_of(
        "--train.row_tokens=6144", f"--rollout.max_prompt_tokens={prompt}",
        "--rollout.max_new_tokens=4096", "--grpo.group_size=32", lengths=lengths,
    )  # fmt: skip
    drawn = lengths.draw(np.random.default_rng(0), 1024) + prompt
    tokens = [np.zeros(n, np.int32) for n in drawn]
    packed = lay_out(tokens, np.full(1024, prompt), 6144, None).num_rows
    assert job.rows_per_step == pytest.approx(packed, rel=0.03)


def test_completions_at_their_limit_fill_rows_by_whole_samples() -> None:
    job = job_of("--train.row_tokens=1500", lengths=lognormal(512, 0, 512))
    assert job.rows_per_step == 256 / 2
