"""Where a step's seconds went, how good predictions were, and how spans are drawn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roofline.analyse import interval, phase_rows, spread
from roofline.datasheets import datasheet
from roofline.estimate import QUANTILE_95
from roofline.hardware import Hardware
from roofline.phases import Phase, PhaseCost
from roofline.predict import predict, stretched
from roofline.read_run import Run, Span
from roofline.report.account import TERMS, concurrency, subrows, validation, waterfalls
from roofline.svg import MARK_PX, labels

CARD = dataclasses.replace(
    datasheet("h200"), name="test card", contention=1.5, calibrated=True, held_out={"a": 1.2}
)
TRAIN = PhaseCost(
    phase=Phase.TRAIN, flops=1e12, hbm_bytes=1e10, link_bytes=1e9, launches=100, collectives=10,
    dispatches=2, dtype="bfloat16",
)  # fmt: skip
DECODE = PhaseCost(
    phase=Phase.DECODE, flops=1e10, hbm_bytes=2e10, launches=50, dispatches=1, dtype="bfloat16"
)
STEP_S = 0.1


def call(work: PhaseCost, lane: str, start_s: float, duration_s: float, step: int) -> Span:
    seen = predict(work, CARD)
    return Span(
        phase=work.phase, lane=lane, start_s=start_s, duration_s=duration_s, step=step, cost=work,
        predicted_s=seen.expected_s, lower_s=seen.lower_s, bound=seen.bound,
    )  # fmt: skip


def run_of(spans: Sequence[Span], hardware: Hardware = CARD) -> Run:
    return Run(
        folder=Path("run"), hardware=hardware, spans=tuple(spans), metrics=(), summary={},
        config={}, notes=(),
    )  # fmt: skip


def steady(steps: int = 20) -> Run:
    """Of each step: learner trains 60 %, waits 30 %, publishes 5 %; rollout decodes 40 %."""
    spans = []
    for step in range(steps):
        t = step * STEP_S
        spans += [
            call(TRAIN, "learner", t, 0.6 * STEP_S, step),
            Span(phase=Phase.WAIT_BATCH, lane="learner", start_s=t + 0.6 * STEP_S,
                 duration_s=0.3 * STEP_S, step=step),
            Span(phase=Phase.PUBLISH, lane="learner", start_s=t + 0.9 * STEP_S,
                 duration_s=0.05 * STEP_S, step=step),
            call(DECODE, "rollout", t + 0.3 * STEP_S, 0.4 * STEP_S, step),
        ]  # fmt: skip
    return run_of(spans)


def test_the_terms_of_a_step_are_known_and_add_up_to_it() -> None:
    rollout, learner = waterfalls(steady())
    assert (rollout.lane, learner.lane) == ("rollout", "learner")
    for fall in (rollout, learner):
        assert tuple(fall.terms_s) == TERMS
        assert fall.step_s == pytest.approx(STEP_S)
        assert sum(fall.terms_s.values()) == pytest.approx(STEP_S)
    seen, terms = predict(TRAIN, CARD), learner.terms_s
    latency = TRAIN.collectives * CARD.link_latency_s
    ideal = max(TRAIN.flops / CARD.peak("bfloat16"), TRAIN.hbm_bytes / CARD.hbm_bytes_per_s)
    assert terms["ideal"] == pytest.approx(ideal)
    assert terms["launch"] == pytest.approx(seen.overhead_s - latency)
    assert terms["communication"] == pytest.approx(seen.link_s + latency)
    assert terms["sharing"] == pytest.approx(
        stretched(seen.expected_s, 0.5, CARD.contention) - seen.expected_s
    )  # decode runs during the second half of training
    assert terms["waiting"] == pytest.approx(0.3 * STEP_S)
    assert terms["unpredicted"] == pytest.approx(0.05 * STEP_S)
    assert terms["between"] == pytest.approx(0.05 * STEP_S)
    assert sum(terms[name] for name in TERMS[:7]) == pytest.approx(0.6 * STEP_S)


def test_a_run_that_published_once_has_no_waterfall() -> None:
    assert waterfalls(steady(1)) == []


def test_errors_compare_ours_with_the_baselines_on_the_same_calls() -> None:
    seen = validation(steady())
    assert seen is not None
    errors = {row.phase: row for row in seen.errors}
    assert errors["train"].calls == 20 - 8
    measured, alone = 0.6 * STEP_S, predict(TRAIN, CARD)
    ours = stretched(alone.expected_s, 0.5, CARD.contention)
    assert errors["train"].ours == pytest.approx(abs(ours / measured - 1))
    assert errors["train"].alone == pytest.approx(abs(alone.expected_s / measured - 1))
    assert errors["train"].bound == pytest.approx(abs(alone.lower_s / measured - 1))
    reached = [
        work.flops / CARD.peak("bfloat16") / seconds
        for work, seconds in ((TRAIN, measured), (DECODE, 0.4 * STEP_S))
    ]
    assert seen.mfu == pytest.approx(sum(reached) / 2)  # the median of two equally many
    constant = TRAIN.flops / CARD.peak("bfloat16") / (sum(reached) / 2) / measured
    assert errors["train"].constant_mfu == pytest.approx(abs(constant - 1))
    assert seen.errors[-1].phase == "all"
    assert seen.errors[-1].calls == 24


def test_the_interval_widens_with_what_calibration_missed() -> None:
    missed = dataclasses.replace(CARD, held_out={"a": 1.5, "b": 0.6})
    narrow, wide = spread(CARD), spread(missed)
    assert narrow is not None
    assert wide is not None
    assert wide > narrow
    low, high = interval(2.0, missed)
    assert low is not None
    assert high is not None
    assert math.log(high / 2.0) == pytest.approx(QUANTILE_95 * wide)
    assert low * high == pytest.approx(4.0)


def test_nobody_states_an_interval_for_hardware_that_nobody_calibrated() -> None:
    run = dataclasses.replace(steady(), hardware=dataclasses.replace(CARD, calibrated=False))
    assert spread(run.hardware) is None
    assert all(row.low_s is None and row.high_s is None for row in phase_rows(run))


SPANS = st.lists(
    st.tuples(st.integers(0, 50), st.integers(1, 30)).map(
        lambda pair: Span(
            phase=Phase.REWARD, lane="reward", start_s=float(pair[0]), duration_s=float(pair[1])
        )
    ),
    min_size=1,
    max_size=25,
)


@given(SPANS)
def test_rows_hold_spans_apart_and_are_as_few_as_can_be(spans: list[Span]) -> None:
    rows = subrows(spans)
    for i, first in enumerate(spans):
        for j, other in enumerate(spans[:i]):
            if rows[i] == rows[j]:
                assert first.end_s <= other.start_s or other.end_s <= first.start_s
    assert max(rows) + 1 == max(count for _, count in concurrency(spans))


@given(SPANS)
def test_concurrency_counts_the_spans_under_way(spans: list[Span]) -> None:
    for time_s, count in concurrency(spans):
        assert count == sum(s.start_s <= time_s < s.end_s for s in spans)


@given(SPANS)
def test_no_phase_takes_more_than_the_whole_run(spans: list[Span]) -> None:
    (row,) = phase_rows(run_of(spans))
    seconds = {second for s in spans for second in range(int(s.start_s), int(s.end_s))}
    whole = max(s.end_s for s in spans) - min(s.start_s for s in spans)
    assert row.wall_share == pytest.approx(len(seconds) / whole)
    assert row.wall_share <= 1 + 1e-9


def test_words_beside_close_points_cover_neither_points_nor_each_other() -> None:
    points = [(100.0, 100.0), (104.0, 101.0), (108.0, 99.0)]
    drawn = labels([(x, y, f"name{i}") for i, (x, y) in enumerate(points)], points)
    places = [
        (float(part.split('x="')[1].split('"')[0]), float(part.split('y="')[1].split('"')[0]))
        for part in drawn
        if part.startswith("<text")
    ]
    assert len(places) == 3
    wide, high = 35, 12
    for i, (left, base) in enumerate(places):
        for x, y in points:
            beside = left >= x + MARK_PX or left + wide <= x - MARK_PX
            assert beside or base - high >= y + MARK_PX or base + 2 <= y - MARK_PX
        for other_left, other_base in places[:i]:
            assert abs(left - other_left) >= wide or abs(base - other_base) >= high
