"""What a run's curricula are to its loop: which problems, how long, and what a checkpoint must remember."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxrl import build
from jaxrl.buffer import GroupBuffer
from jaxrl.build import Subject
from jaxrl.config import Config
from jaxrl.curriculum import EdgeStream
from jaxrl.length_curriculum import LengthCurriculum, Stage, at_stage, stages_of
from jaxrl.plan import Plan, make_plan, make_shapes
from jaxrl.prompts import PromptStream
from jaxrl.rewards.pool import RewardPool
from jaxrl.rollout.engine import RolloutEngine
from jaxrl.rollout.probes import ProbeSettings
from jaxrl.rollout.worker import RolloutWorker, Stages
from jaxrl.telemetry.run import RunTelemetry
from jaxrl.types import Finish, RolloutGroup
from jaxrl.weights import WeightStore
from models.config import ModelConfig
from roofline.hardware import Hardware
from roofline.phases import Phase


@dataclass(frozen=True, kw_only=True, slots=True)
class Curricula:
    """The curriculum over problems, where there is one, and the one over lengths (of one stage or more)."""

    edge: EdgeStream | None
    lengths: LengthCurriculum
    num_stages: int
    probe_slots: int
    """Most slots that sample unsolved problems."""

    def observe(self, sampled: Sequence[RolloutGroup], step: int) -> dict[str, float]:
        """Learn from all groups of optimizer step `step`, before its tickets are released; the curves."""
        curves: dict[str, float] = {}
        if self.edge is not None:
            self.edge.observe(sampled, step)
            curves |= self.edge.curves()
        if self.num_stages > 1:
            cut = [r.completion.finish is Finish.LENGTH for g in sampled for r in g.rollouts]
            curves |= self.lengths.curves()
            self.lengths.observe(float(np.mean(cut)), step)
        return curves

    @property
    def probe_tokens(self) -> int:
        """Completion tokens of all probes so far."""
        return 0 if self.edge is None else self.edge.probe_tokens

    def state(self) -> dict[str, Any]:
        """JSON-able; taken after the buffer's."""
        edge = None if self.edge is None else self.edge.state()
        return {"edge": edge, "lengths": self.lengths.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; nothing in it, nothing to do."""
        if self.edge is not None and state.get("edge"):
            self.edge.restore(state["edge"])
        if state.get("lengths"):
            self.lengths.restore(state["lengths"])


def make_curricula(config: Config, stream: PromptStream, plan: Plan) -> Curricula:
    """The curricula that the configuration asks for."""
    stages = stages_of(config)
    return Curricula(
        edge=EdgeStream(stream, config.curriculum) if config.curriculum.edge else None,
        lengths=LengthCurriculum(stages, config.curriculum), num_stages=len(stages),
        probe_slots=probe_slots(config, plan),
    )  # fmt: skip


def make_rollout(
    config: Config, subject: Subject, mesh: Mesh, store: WeightStore, buffer: GroupBuffer,
    rewards: RewardPool, telemetry: RunTelemetry, curricula: Curricula,
) -> RolloutWorker:  # fmt: skip
    """The rollout thread with the engines of all stages, and its probes."""

    def make_engine(stage: Stage) -> RolloutEngine:
        staged = at_stage(config, stage)
        observer = telemetry.observer_of(make_shapes(staged, subject.model))
        return build.make_engine(staged, subject, mesh, observer)

    probes = None
    if curricula.edge is not None and curricula.probe_slots > 0:
        probes = ProbeSettings(
            source=curricula.edge, slots=curricula.probe_slots,
            samples=config.curriculum.probe_samples,
        )  # fmt: skip
    return build.make_worker(
        config, subject, mesh, store, buffer, rewards, telemetry.observer,
        stages=Stages(lengths=curricula.lengths, make_engine=make_engine), probes=probes,
    )  # fmt: skip


def plan_curricula(
    config: Config, model: ModelConfig, hardware: Hardware, plan: Plan
) -> list[tuple[str, str, str]]:
    """Rows of the printed plan: slots that could probe, and each stage of several.

    Raises: UserError for a stage that does not fit the devices.
    """
    stages = stages_of(config)
    rows = [_probe_row(config, plan)] if config.curriculum.edge else []
    if len(stages) == 1:
        return rows
    plans: list[Plan] = [make_plan(at_stage(config, stage), model, hardware) for stage in stages]
    return rows + [
        (
            f"stage {stage.number}",
            f"{stage.slots} slots",
            f"up to {stage.max_new_tokens} new tokens; rollout memory "
            f"{sum(plan.rollout_bytes.values()) / 2**20:.1f} MiB",
        )
        for stage, plan in zip(stages, plans, strict=True)
    ]


def probe_slots(config: Config, plan: Plan) -> int:
    """Most slots for probes: as configured, or (-1) those that the roofline predicts idle.

    Those are all of them if decoding stands still for as long as a completion of the longest kind takes,
    and else the slots that no sample within the staleness bound can ever fill; whole probes only.
    """
    settings = config.curriculum
    if settings.probe_slots >= 0:
        return settings.probe_slots
    slots, spare = config.rollout.slots, _spare_slots(config, plan)
    idle_s = _idle_share(config, plan) * _step_s(config, plan)
    completion_s = plan.phase_s[Phase.DECODE] / -(-plan.samples // slots)
    free = slots if idle_s >= completion_s else spare
    return free - free % settings.probe_samples


def _spare_slots(config: Config, plan: Plan) -> int:
    return max(0, config.rollout.slots - (config.rollout.max_staleness + 1) * plan.samples)


def _step_s(config: Config, plan: Plan) -> float:
    return plan.overlapped_s if config.rollout.max_staleness else plan.lockstep_s


def _idle_share(config: Config, plan: Plan) -> float:
    """Predicted share of a step in which nothing is decoded."""
    return max(0.0, 1.0 - plan.phase_s[Phase.DECODE] / _step_s(config, plan))


def _probe_row(config: Config, plan: Plan) -> tuple[str, str, str]:
    """Slots for probes, and what is predicted idle."""
    return (
        "slots for probes",
        f"{probe_slots(config, plan)}",
        f"{_spare_slots(config, plan)} are never taken by at most "
        f"{(config.rollout.max_staleness + 1) * plan.samples} samples under way; all are predicted idle "
        f"{_idle_share(config, plan):.0%} of a step",
    )
