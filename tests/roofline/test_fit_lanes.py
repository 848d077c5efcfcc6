"""What a run's own lanes say of its phases is recovered from their spans."""

from __future__ import annotations

import dataclasses
import random

import pytest

from models.config import ModelConfig
from roofline import cost
from roofline.analyse import overlaps
from roofline.datasheets import datasheet
from roofline.fit import fit_lanes
from roofline.hardware import Efficiency, Hardware
from roofline.kernels import Layout
from roofline.phases import Phase, PhaseCost
from roofline.predict import predict, stretched
from roofline.read_run import Span

MODEL = ModelConfig(
    vocab_size=20, width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_size=16, ffw_size=128
)
START = dataclasses.replace(datasheet("l4"), contention=1.2, calibrated=True)
TRUTH = dataclasses.replace(
    START,
    phase_efficiency={
        "train": Efficiency(compute=0.2, memory=0.3, kernel_s=3e-6, call_s=4e-3),
        "decode": Efficiency(compute=0.5, memory=0.4, kernel_s=1e-6, call_s=1e-3),
    },
    phase_contention={"train": 1.6, "decode": 2.6},
)
NOISE = 0.1  # spread of log(duration): calls of a run on shared cores vary so much
RECOVERED = 0.06  # of medians over dozens of calls with that noise


def work(phase: Phase, size: int) -> PhaseCost:
    if phase is Phase.TRAIN:
        return cost.train(MODEL, Layout(), 64, 64, size)
    return cost.decode(MODEL, Layout(), 256, 32, size)


def spans(truth: Hardware, calls: int = 80) -> list[Span]:
    """Lockstep, then decoding beside training for a half or the whole of it."""
    draw, made, clock = random.Random(0), [], 0.0
    for call in range(calls):
        share = 0.0 if call < calls // 2 else (0.5, 1.0)[call % 2]
        for phase, lane, size in (
            (Phase.TRAIN, "learner", 1 + call % 2), (Phase.DECODE, "rollout", 4),
        ):  # fmt: skip
            alone_s = predict(work(phase, size), truth).expected_s
            slower = truth.contention_of(phase)
            seconds = stretched(alone_s, share, slower) * draw.lognormvariate(0, NOISE)
            made.append(
                Span(
                    phase=phase, lane=lane, start_s=clock, duration_s=seconds,
                    cost=work(phase, size),
                )
            )  # fmt: skip
            other = "rollout" if lane == "learner" else "learner"
            made.append(
                Span(phase=Phase.EVAL, lane=other, start_s=clock, duration_s=share * seconds)
            )
            clock += 2 * seconds
    return made


@pytest.fixture(scope="module")
def fitted() -> Hardware:
    return fit_lanes(spans(TRUTH), START)


@pytest.mark.parametrize("phase", [Phase.TRAIN, Phase.DECODE])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_times_alone_and_beside_the_other_lane_are_recovered(
    fitted: Hardware, phase: Phase, share: float
) -> None:
    for size in (1, 2) if phase is Phase.TRAIN else (4,):
        expected, seen = (
            stretched(predict(work(phase, size), h).expected_s, share, h.contention_of(phase))
            for h in (TRUTH, fitted)
        )
        assert seen == pytest.approx(expected, rel=RECOVERED)


def test_phases_that_the_lanes_did_not_run_keep_what_they_had(fitted: Hardware) -> None:
    publish = cost.publish(MODEL, Layout(), Layout())
    assert predict(publish, fitted) == predict(publish, START)
    assert fitted.contention_of(Phase.PUBLISH) == fitted.contention


def test_the_general_contention_lies_between_the_phases(fitted: Hardware) -> None:
    ends = sorted(fitted.phase_contention.values())
    assert ends[0] <= fitted.contention <= ends[-1]


def test_without_overlap_the_contention_stays() -> None:
    alone = [s for s in spans(TRUTH) if s.phase is not Phase.EVAL]
    assert max(overlaps(alone)) == 0
    assert fit_lanes(alone, START).contention == START.contention
    assert not fit_lanes(alone, START).phase_contention
