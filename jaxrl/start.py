"""The beginning of a run: from scratch with a cold start, from another run's weights, or where it stopped."""

from __future__ import annotations

import dataclasses
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxrl.build import Subject, held_out, make_learner
from jaxrl.checkpoint import FIRST_STEP, Checkpoints
from jaxrl.config import Config
from jaxrl.errors import UserError
from jaxrl.evaluator import Evaluation, Evaluator
from jaxrl.learner.cold_start import cold_start
from jaxrl.learner.learner import Learner
from jaxrl.policy import first_policy, with_adapter
from jaxrl.record import RunRecord
from jaxrl.telemetry.run import RunTelemetry
from jaxrl.types import Snapshot
from jaxrl.weights import WeightStore
from models.decoder import Decoder, Policy
from models.hf import described_lora
from models.lora import adapter_table
from models.sharding import adapter_shardings, merge_adapter
from roofline.phases import Phase


@dataclass(frozen=True, kw_only=True, slots=True)
class Starter:
    """What the beginning of a run needs."""

    config: Config
    subject: Subject
    mesh: Mesh
    store: WeightStore
    evaluator: Evaluator
    checkpoints: Checkpoints
    telemetry: RunTelemetry

    def begin(self) -> tuple[Learner, RunRecord]:
        """A new run: first weights, cold start, first held-out evaluation, checkpoint 0."""
        began = time.perf_counter()
        config = self.config
        policy = first_policy(config.model, self.subject.model, self.mesh, config.run.seed)
        periodic, _ = held_out(config, self.subject)
        if config.run.fork_from is not None:
            policy = fork(policy, config.run.fork_from)
        policy = with_adapter(policy, self.mesh, config.run.seed)
        if config.run.fork_from is None and config.sft.steps:
            policy = cold_start(
                config, self.subject, self.mesh, policy, self.store, self.evaluator, periodic,
                self.telemetry.progress.note,
            )  # fmt: skip
        learner = self._learner(policy)
        if learner.needs_reference:
            learner.freeze_reference()
        record = RunRecord()
        snapshot = self.store.publish(FIRST_STEP, learner.policy)
        record.before = self._evaluate(snapshot)
        record.wall_s = time.perf_counter() - began
        self.checkpoints.save(FIRST_STEP, learner.state, record.to_json(), learner.frozen)
        return learner, record

    def resume(self, step: int) -> tuple[Learner, RunRecord]:
        """The run as it was after optimizer step `step`. The reference is checkpoint 0."""
        began = time.perf_counter()
        config = self.config
        policy = first_policy(config.model, self.subject.model, self.mesh, config.run.seed)
        learner = self._learner(with_adapter(policy, self.mesh, config.run.seed))
        saved = self.checkpoints.restore_record(step)
        if "kind" in saved:
            raise UserError(
                f"{config.run.dir} holds a run of jaxrl.{saved['kind']}; start this one in a folder of "
                f"its own with --run.dir=ANOTHER_FOLDER --run.fork-from={config.run.dir}"
            )
        learner.restore(self.checkpoints, step, reference=True)
        record = RunRecord.from_json(saved)
        learner.num_nonfinite_steps = record.nonfinite_steps
        self.store.publish(step, learner.policy)
        record.wall_s += time.perf_counter() - began
        return learner, record

    def _learner(self, policy: Policy) -> Learner:
        return make_learner(
            self.config, self.subject.model, self.mesh, policy, self.telemetry.observer
        )

    def _evaluate(self, snapshot: Snapshot) -> dict[str, float]:
        """The first points of the held-out curves; returns those of the test split."""
        periodic, final = held_out(self.config, self.subject)
        settings = self.config.eval
        with self.telemetry.observer.phase(Phase.EVAL):
            evaluation = self.evaluator.run(snapshot, final, settings.final_samples)
            first = self.evaluator.run(snapshot, periodic, settings.samples).metrics("eval")
        curves = evaluation.metrics("test")
        self.telemetry.curves(FIRST_STEP, {**first, **curves})
        self.telemetry.progress.note(f"before: {describe(evaluation)}")
        return curves


def _mesh_of(policy: Decoder) -> Mesh:
    sharding = policy.embedding.sharding
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        raise TypeError(f"the policy lies as {sharding}, not on a mesh of devices")
    return sharding.mesh


def fork(like: Decoder, folder: Path) -> Decoder:
    """The weights of the newest checkpoint of another run, an adapter merged into them.

    like: weights of the shapes, dtypes and shardings wanted.
    """
    with closing(Checkpoints(existing_checkpoints(folder), keep=1)) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise UserError(
                f"run.fork_from={folder} has no checkpoint yet; give a run folder that has one"
            )
        lora = described_lora(folder)
        if lora is None:
            return checkpoints.restore_policy(step, like)
        config = dataclasses.replace(like.config, lora=lora)
        base, table = checkpoints.restore_frozen(like), adapter_table(config)
        places = adapter_shardings(config, _mesh_of(like))
        adapter = checkpoints.restore_policy(
            step,
            {
                name: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=places[name])
                for name, p in table.items()
            },
        )
        return merge_adapter(config, base, adapter)


def existing_checkpoints(folder: Path) -> Path:
    """The checkpoint folder of the run in `folder`. Raises: UserError if there is none."""
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir():
        raise UserError(
            f"{folder} is not a run folder with checkpoints; give the run.dir of an earlier run"
        )
    return checkpoints


def describe(evaluation: Evaluation) -> str:
    """One line: pass@1 with its interval, pass@n."""
    estimate, n = evaluation.pass_at_1, len(evaluation.rollouts[0])
    half = (estimate.high - estimate.low) / 2
    more = f", pass@{n} {evaluation.pass_at(n):.1%}" if n > 1 else ""
    return (
        f"held-out pass@1 {estimate.mean:.1%} +- {half:.1%}{more} "
        f"({len(evaluation.problems)} problems x {n} samples)"
    )
