"""The simulated pipeline against closed forms, and against its own invariants."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roofline.datasheets import datasheet
from roofline.events import Mode, Pipeline, simulate
from roofline.lengths import Lengths, lognormal, measured
from roofline.phases import Phase
from roofline.read_run import Run, Span
from roofline.simulate import expected_flat_share, main, pipeline_of_run

EXACT = 1e-9  # deterministic cases: only sums of floats in another order
SAMPLING = 0.03  # means over about 40 steps of random lengths
EVEN = lognormal(64, 0.0, 64)  # every completion 64 tokens
SPREAD = lognormal(64, 0.7, 256)
GENERATION_S = 64 * 0.01


def pipeline(**changes: object) -> Pipeline:
    base = Pipeline(
        prompts_per_step=8, group_size=4, slots=32, chunk_steps=8, decode_step_s=0.01,
        learner_s=0.5, publish_s=0.02,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


# -- closed forms ----------------------------------------------------------------------------------


def test_a_synchronous_step_is_the_sum_of_its_phases() -> None:
    seen = simulate(pipeline(mode=Mode.SYNCHRONOUS, admit_s=0.05, prompt_s=0.01), EVEN)
    assert seen.step_s == pytest.approx(0.05 + 8 * 0.01 + GENERATION_S + 0.5 + 0.02, rel=EXACT)
    assert set(seen.staleness) == {0}


def test_one_step_off_goes_on_after_a_publication_that_takes_no_time() -> None:
    short = pipeline(
        mode=Mode.ONE_STEP_OFF, prompts_per_step=1, group_size=2, slots=1, publish_s=0.0
    )
    instant = simulate(short, EVEN)
    soon = simulate(dataclasses.replace(short, publish_s=1e-9), EVEN)
    assert instant.step_s == pytest.approx(soon.step_s, abs=1e-8)


@pytest.mark.parametrize("learner_s", [0.1, 2.0])
def test_one_step_off_takes_the_longer_lane_and_the_publication(learner_s: float) -> None:
    seen = simulate(pipeline(mode=Mode.ONE_STEP_OFF, learner_s=learner_s), EVEN)
    assert seen.step_s == pytest.approx(max(GENERATION_S, learner_s) + 0.02, rel=EXACT)
    assert seen.staleness == {0: 32, 1: 32 * 29}


@pytest.mark.parametrize("mode", [Mode.ASYNCHRONOUS, Mode.IN_FLIGHT])
@pytest.mark.parametrize("learner_s", [0.1, 2.0])
def test_with_even_lengths_an_overlapped_step_is_the_longer_lane(
    mode: Mode, learner_s: float
) -> None:
    seen = simulate(pipeline(mode=mode, learner_s=learner_s), EVEN)
    assert seen.step_s == pytest.approx(max(GENERATION_S, learner_s + 0.02), rel=EXACT)


@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
def test_slots_for_every_ticket_leave_the_latency_over_the_versions_under_way(
    staleness: int,
) -> None:
    """T = max(learner, (generation + learner) / (S + 1)), up to one chunk of waiting."""
    changes = {"slots": 32 * (staleness + 1), "max_staleness": staleness, "chunk_steps": 1}
    whole_cycles = staleness + 2 + 12 * (staleness + 1)
    seen = simulate(pipeline(**changes), EVEN, steps=whole_cycles)
    learner_s = 0.5 + 0.02
    closed = max(learner_s, (GENERATION_S + learner_s) / (staleness + 1))
    assert closed * (1 - EXACT) <= seen.step_s <= closed + 0.01 * (1 + EXACT)


def test_a_lockstep_step_waits_for_the_longest_completion() -> None:
    seen = simulate(pipeline(mode=Mode.SYNCHRONOUS, chunk_steps=1), SPREAD, steps=400)
    expected = SPREAD.expected_max(32) * 0.01 + 0.52
    assert seen.step_s == pytest.approx(expected, rel=SAMPLING)


def test_where_generation_binds_the_slots_are_always_full() -> None:
    """Little's law: slots / (rounded length * step time) completions per second."""
    seen = simulate(pipeline(max_staleness=16, learner_s=0.05), SPREAD, steps=80)
    expected = 32 * SPREAD.in_chunks(8).mean * 0.01 / 32
    assert seen.step_s == pytest.approx(expected, rel=SAMPLING)
    assert seen.slot_idle < SAMPLING
    assert seen.learner_idle == pytest.approx(1 - 0.07 / seen.step_s, rel=SAMPLING)


def test_mean_staleness_is_latency_and_training_over_the_step() -> None:
    """A group is consumed at the first batch after its end; the publications in between number
    (latency + training) / T on average."""
    seen = simulate(
        pipeline(max_staleness=16, slots=64, chunk_steps=1, learner_s=0.05), SPREAD, steps=300
    )
    latency_s = SPREAD.expected_max(4) * 0.01
    assert seen.mean_staleness == pytest.approx((latency_s + 0.07) / seen.step_s, rel=0.1)


def test_where_the_learner_binds_every_sample_is_as_stale_as_allowed() -> None:
    seen = simulate(pipeline(max_staleness=3, learner_s=5.0), SPREAD, steps=40)
    assert seen.step_s == pytest.approx(5.02, rel=EXACT)
    assert seen.learner_idle == pytest.approx(0, abs=EXACT)
    late = seen.staleness[3] / sum(seen.staleness.values())
    assert late == pytest.approx(1 - 3 / 40, rel=SAMPLING)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_where_generation_binds_a_step_with_refills_generates_for_the_groups_it_leaves_out(
    share: float,
) -> None:
    """P / (1 - share) groups for P of use, a round's share of them flat again; the learner adds nothing."""
    work = pipeline(learner_s=0.01, publish_s=0.0, prompts_per_step=64, slots=64)
    plain = simulate(work, EVEN, steps=60)
    refilled = simulate(
        dataclasses.replace(work, flat_share=share, refill_rounds=30), EVEN, steps=60
    )
    assert refilled.step_s / plain.step_s == pytest.approx(1 / (1 - share), rel=0.1)


def test_after_its_rounds_a_step_goes_on_with_groups_without_signal() -> None:
    work = dataclasses.replace(pipeline(), flat_share=1.0, refill_rounds=2)
    seen = simulate(work, EVEN, steps=30)
    assert sum(seen.staleness.values()) == 30 * work.samples_per_step


def test_the_expected_share_of_flat_groups_is_the_mean_over_solve_rates() -> None:
    rates = (np.arange(10_000) + 0.5) / 10_000
    assert expected_flat_share(8) == pytest.approx(
        float((rates**8 + (1 - rates) ** 8).mean()), rel=1e-4
    )


def test_one_verifier_bounds_the_rate() -> None:
    for verifiers in (1, 4):
        seen = simulate(pipeline(max_staleness=3, verify_s=0.1, verifiers=verifiers), EVEN)
        assert seen.step_s == pytest.approx(32 * 0.1 / verifiers, rel=SAMPLING)


def test_without_verifiers_verification_holds_up_decoding() -> None:
    seen = simulate(pipeline(mode=Mode.SYNCHRONOUS, verify_s=0.01), EVEN)
    assert seen.step_s == pytest.approx(GENERATION_S + 32 * 0.01 + 0.52, rel=EXACT)


def test_on_one_set_of_cores_overlap_gains_nothing() -> None:
    seen = simulate(pipeline(contention=2.0), EVEN)
    assert seen.step_s == pytest.approx(GENERATION_S + 0.52, rel=SAMPLING)


# -- invariants ------------------------------------------------------------------------------------

pipelines = st.builds(
    pipeline,
    mode=st.sampled_from(Mode),
    prompts_per_step=st.integers(1, 6),
    group_size=st.integers(2, 4),
    max_staleness=st.integers(0, 3),
    slots=st.integers(1, 40),
    chunk_steps=st.integers(1, 16),
    learner_s=st.floats(0.01, 3),
    verify_s=st.sampled_from([0.0, 0.01]),
    verifiers=st.integers(0, 3),
    contention=st.sampled_from([1.0, 1.5, 2.0]),
)


@settings(max_examples=60, deadline=None)
@given(pipelines)
def test_no_sample_is_staler_than_its_bound_and_all_are_counted(work: Pipeline) -> None:
    seen = simulate(work, SPREAD, steps=12)
    bound = {Mode.SYNCHRONOUS: 0, Mode.ONE_STEP_OFF: 1}.get(work.mode, work.max_staleness)
    assert 0 <= min(seen.staleness) <= max(seen.staleness) <= bound
    consumed = sum(seen.staleness.values()) / work.samples_per_step
    assert consumed in (12, 13)  # the last take may have met its publication already
    assert seen.step_s >= work.learner_s + work.publish_s - EXACT
    assert -EXACT <= seen.rollout_idle <= seen.slot_idle + EXACT <= 1 + EXACT
    assert -EXACT <= seen.learner_idle <= 1


def test_swapping_in_flight_is_never_slower_than_running_dry() -> None:
    dry, swapping = (
        simulate(pipeline(mode=mode, max_staleness=2, learner_s=0.3), SPREAD, steps=60)
        for mode in (Mode.ASYNCHRONOUS, Mode.IN_FLIGHT)
    )
    assert swapping.step_s < dry.step_s
    assert swapping.slot_idle < dry.slot_idle


def test_the_same_seed_gives_the_same_run_and_another_does_not() -> None:
    first, again, other = (simulate(pipeline(), SPREAD, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.published_s != other.published_s


def test_ten_thousand_gpus_take_seconds() -> None:
    """1,250 nodes of 8: 1.28 million samples per step, half of the GPUs decode 64 each."""
    work = pipeline(
        prompts_per_step=160_000, group_size=8, slots=5000 * 64, chunk_steps=16, learner_s=200.0,
        verify_s=0.5, verifiers=10_000,
    )  # fmt: skip
    start = time.process_time()
    seen = simulate(work, lognormal(2048, 0.6, 4096), steps=6)
    assert time.process_time() - start < 10
    assert sum(seen.staleness.values()) >= 6 * 1_280_000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slots": 0}, "slots=0"),
        ({"learner_s": 0.0}, "learner_s"),
        ({"verify_s": -1.0}, "verify_s"),
        ({"contention": 0.5}, "contention"),
    ],
)
def test_impossible_sizes_are_refused_by_name(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pipeline(**changes)


def test_too_few_steps_for_a_steady_state_are_refused() -> None:
    with pytest.raises(ValueError, match=r"steps=3.*warm-up of 3"):
        simulate(pipeline(), EVEN, steps=3)


# -- lengths ---------------------------------------------------------------------------------------


def test_a_lognormal_keeps_its_mean_and_its_limit() -> None:
    lengths = lognormal(100, 0.5, 10000)
    assert lengths.mean == pytest.approx(100, rel=0.01)
    assert lognormal(100, 0.5, 120).tokens.max() == 120


def test_the_expected_longest_of_many_is_the_mean_of_drawn_maxima() -> None:
    drawn = SPREAD.draw(np.random.default_rng(0), 32 * 4000).reshape(4000, 32).max(axis=1)
    assert SPREAD.expected_max(32) == pytest.approx(drawn.mean(), rel=0.01)
    assert SPREAD.expected_max(1) == pytest.approx(SPREAD.mean)


def test_lengths_of_a_run_are_read_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    rows = [json.dumps({"tokens": tokens}) for tokens in (5, 3)]
    (tmp_path / "samples.jsonl").write_text("\n".join(rows) + '\n{"tok')
    assert measured(tmp_path).tokens.tolist() == [3, 5]
    with pytest.raises(ValueError, match=r"samples\.jsonl is missing"):
        measured(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="at least one"):
        Lengths(tokens=np.zeros(0, np.int64), source="nothing")


def test_a_simulation_without_devices_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--config", "quickstart", "--hardware", "h200", "--devices", "0"])
    assert ended.value.code == 2
    assert "--devices=0 must be at least 1" in capsys.readouterr().err


def test_every_update_of_a_step_counts_as_the_learner_s_time(tmp_path: Path) -> None:
    """Of each step: scoring 10 ms, two updates of 20 ms and 1 ms, a publication of 2 ms, 5 ms in no span."""
    (tmp_path / "config.yaml").write_text("grpo: {minibatches: 2}\n")
    spans, now_s = [], 0.0
    for step in range(6):
        for phase, seconds in (
            (Phase.REFERENCE, 0.010), (Phase.TRAIN, 0.020), (Phase.OPTIMIZER, 0.001),
            (Phase.TRAIN, 0.020), (Phase.OPTIMIZER, 0.001), (Phase.PUBLISH, 0.002),
        ):  # fmt: skip
            spans.append(
                Span(phase=phase, lane="learner", start_s=now_s, duration_s=seconds, step=step)
            )
            now_s += seconds
        now_s += 0.005
    for phase in (Phase.PREFILL, Phase.DECODE):
        spans.append(
            Span(phase=phase, lane="rollout", start_s=now_s, duration_s=0.004, work={"steps": 8})
        )
    run = Run(
        folder=tmp_path, hardware=datasheet("h200"), spans=tuple(spans), metrics=(), summary={},
        config={}, notes=(),
    )  # fmt: skip
    seen = pipeline_of_run(run)
    assert seen.learner_s == pytest.approx(0.010 + 2 * 0.021 + 0.005)
    assert seen.publish_s == pytest.approx(0.002)
    assert seen.decode_step_s == pytest.approx(0.004 / 8)


def test_a_run_too_short_to_replay_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    run = Run(
        folder=tmp_path, hardware=datasheet("h200"), spans=(), metrics=(), summary={}, config={},
        notes=(),
    )  # fmt: skip
    with pytest.raises(ValueError, match="0 publish spans outside compilation, of 3"):
        pipeline_of_run(run)


def test_a_replay_takes_groups_without_signal_from_the_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "grpo: {prompts_per_step: 4, group_size: 2, refill_rounds: 3}\n"
    )
    made = [(Phase.TRAIN, "learner", 0.0, 0.02)]
    made += [(Phase.PUBLISH, "learner", 0.02 + 0.1 * n, 0.002) for n in range(3)]
    made += [(Phase.PREFILL, "rollout", 0.0, 0.004), (Phase.DECODE, "rollout", 0.004, 0.004)]
    spans = tuple(
        Span(phase=phase, lane=lane, start_s=start_s, duration_s=seconds, work={"steps": 8})
        for phase, lane, start_s, seconds in made
    )
    lines = [
        {"filter/refilled_groups": 4.0, "filter/frac_reward_zero_std": share}
        for share in (0.0, 0.5, 1.0)
    ]
    run = Run(
        folder=tmp_path, hardware=datasheet("h200"), spans=spans, metrics=tuple(lines), summary={},
        config={}, notes=(),
    )  # fmt: skip
    seen = pipeline_of_run(run)
    assert seen.flat_share == pytest.approx((4 + 2) / (4 + 4))
    assert seen.refill_rounds == 3
