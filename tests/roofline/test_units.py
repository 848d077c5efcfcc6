"""Names carry their units: whatever is described in other units is predicted the same, in those units."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roofline.datasheets import DATASHEETS
from roofline.events import Mode, Pipeline, Simulation, simulate
from roofline.hardware import Efficiency, Hardware
from roofline.lengths import lognormal
from roofline.phases import Phase, PhaseCost
from roofline.predict import Prediction, mbu, mfu, predict

Described = TypeVar("Described", PhaseCost, Efficiency, Hardware, Prediction, Pipeline, Simulation)
SIMULATED = 1e-9
"""Relative: the simulation calls work done below a rounding in seconds."""


@dataclass(frozen=True, kw_only=True)
class Units:
    """New units that one old one is worth: powers of two, which round nothing."""

    second: float = 1.0
    byte: float = 1.0
    operation: float = 1.0

    def of(self, name: str) -> float:
        """By the end of a field's name; 1 for counts and shares."""
        worth = {
            "flops_per_s": self.operation / self.second, "bytes_per_s": self.byte / self.second,
            "_per_s": 1 / self.second, "_s": self.second, "bytes": self.byte, "flops": self.operation,
        }  # fmt: skip
        return next((value for end, value in worth.items() if name.endswith(end)), 1.0)


def converted(value: Described, units: Units) -> Described:
    """A description in other units."""
    names = [field.name for field in dataclasses.fields(value)]
    changed = {name: _field(name, getattr(value, name), units) for name in names}
    return dataclasses.replace(value, **changed)


def _field(name: str, value: object, units: Units) -> object:
    if isinstance(value, Efficiency):
        return converted(value, units)
    if isinstance(value, Mapping):
        return {key: _field(name, one, units) for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(_field(name, one, units) for one in value)
    return (
        value * units.of(name) if isinstance(value, int | float) and units.of(name) != 1 else value
    )


worths = st.integers(-20, 20).map(lambda power: 2.0**power)
units = st.builds(Units, second=worths, byte=worths, operation=worths)
shares = st.floats(0.01, 1)
fixed = st.just(0.0) | st.floats(1e-7, 1)
amounts = st.just(0.0) | st.floats(1, 1e18)
costs = st.builds(
    lambda matrix, streamed, flops, link_bytes, count: PhaseCost(
        phase=Phase.TRAIN, flops=flops, hbm_bytes=matrix + streamed, streamed_bytes=streamed,
        link_bytes=link_bytes, launches=count, collectives=count, dispatches=count,
        dtype="bfloat16",
    ),
    amounts, amounts, amounts, amounts, st.integers(0, 1000),
)  # fmt: skip
machines = st.builds(
    lambda hardware, share: dataclasses.replace(hardware, phase_efficiency={"train": share}),
    st.sampled_from(list(DATASHEETS.values())),
    st.builds(
        Efficiency,
        compute=shares,
        memory=shares,
        link=shares,
        kernel_s=st.none() | fixed,
        call_s=fixed,
    ),
)


@given(costs, machines, units)
def test_a_prediction_in_other_units_is_the_same_prediction(
    work: PhaseCost, hardware: Hardware, units: Units
) -> None:
    seen = predict(work, hardware)
    work_there, hardware_there = converted(work, units), converted(hardware, units)
    there = predict(work_there, hardware_there)
    assert there == converted(seen, units)
    if seen.expected_s:
        for utilisation in (mfu, mbu):
            here = utilisation(work, seen.expected_s, hardware)
            assert utilisation(work_there, there.expected_s, hardware_there) == here


pipelines = st.builds(
    Pipeline,
    mode=st.sampled_from(Mode), prompts_per_step=st.integers(1, 4), group_size=st.integers(2, 4),
    slots=st.integers(1, 32), chunk_steps=st.integers(1, 8), decode_step_s=st.floats(0.001, 0.1),
    admit_s=st.floats(0, 0.1), prompt_s=st.floats(0, 0.1), learner_s=st.floats(0.01, 3),
    publish_s=st.floats(0, 1), verify_s=st.floats(0, 0.1), verifiers=st.integers(0, 3),
    contention=st.sampled_from([1.0, 1.5]),
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(pipelines, st.sampled_from([0.5, 4.0, 64.0]))
def test_a_simulation_in_other_units_is_the_same_simulation(work: Pipeline, second: float) -> None:
    lengths, units = lognormal(12, 0.5, 32), Units(second=second)
    seen = converted(simulate(work, lengths, steps=8), units)
    there = simulate(converted(work, units), lengths, steps=8)
    assert there.staleness == seen.staleness
    for name in ("step_s", "samples_per_s", "rollout_idle", "slot_idle", "learner_idle"):
        assert getattr(there, name) == pytest.approx(
            getattr(seen, name), rel=SIMULATED, abs=SIMULATED
        )
