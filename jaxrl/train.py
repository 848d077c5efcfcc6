"""`python -m jaxrl.train`: reinforcement learning of one policy, asynchronously. START READING HERE.

    learner thread (this file)                         rollout thread (jaxrl.rollout.worker)
    --------------------------                         -------------------------------------
    take P finished groups, none staler                take tickets (prompts) as long as the
      than max_staleness           <--- buffer ---       staleness bound allows
    advantages, packing                                decode chunk after chunk over fixed slots
    forward, backward, AdamW                           a finished group goes to the verifiers
    publish weights v+1            ---- store --->     pick the newest weights between two chunks
    release P tickets              --- tickets -->
    evaluate, checkpoint, log

The generators never wait for a training step; they wait only when every group that the staleness bound
allows is under way. With max_staleness=0 the same program is the synchronous loop.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from jax.sharding import Mesh

from jaxrl import build
from jaxrl.auto_mesh import resolve, resolved_before
from jaxrl.buffer import GroupBuffer
from jaxrl.checkpoint import Checkpoints
from jaxrl.cli import ParsedArgs, parse_args, user_errors
from jaxrl.collector import settled
from jaxrl.config import Config
from jaxrl.curricula import Curricula, make_curricula, make_rollout, plan_curricula
from jaxrl.devices import make_meshes, start_devices
from jaxrl.errors import UserError
from jaxrl.evaluator import Evaluator
from jaxrl.finish import finish
from jaxrl.interrupt import stop_asked
from jaxrl.learner.learner import Learner
from jaxrl.learner.prepare import Rows, prepare
from jaxrl.plan import Plan, check_divisible, make_plan, make_shapes, plan_rows, workload_of
from jaxrl.policy import check_weights, describe_policy
from jaxrl.presets import listing
from jaxrl.prompts import PromptStream
from jaxrl.record import RunRecord
from jaxrl.refill import take_batch
from jaxrl.rewards.pool import RewardPool
from jaxrl.run_folder import open_run
from jaxrl.start import Starter, existing_checkpoints
from jaxrl.telemetry.metrics import assert_share
from jaxrl.telemetry.run import RunTelemetry
from jaxrl.telemetry.tables import print_plan
from jaxrl.trial import trial_spans
from jaxrl.types import Problem, RolloutGroup, Snapshot
from jaxrl.weights import WeightStore
from models.hf import export_policy
from roofline.calibrate import cached_or_calibrate
from roofline.hardware import Hardware
from roofline.phases import Phase


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    argv = sys.argv[1:] if argv is None else argv
    with user_errors(debug="--debug" in argv):
        run(parse_args(argv), argv)


def run(parsed: ParsedArgs, argv: Sequence[str], *, only_cold_start: bool = False) -> None:
    """One run from its configuration to its summary; resumes where the run folder's checkpoints end."""
    if parsed.list_algorithms:
        print(listing())
        return
    config = parsed.config
    _check_nothing_offline(config)
    start_devices(config.mesh.devices)
    subject = build.make_subject(config)
    check_weights(config.model, subject.model)
    stream = build.make_stream(config, subject)
    if config.mesh.auto:
        config = _with_mesh(config, subject, again=parsed.recalibrate)
    check_divisible(config, make_shapes(config, subject.model))  # before half a minute of measuring
    learner_mesh, rollout_mesh = make_meshes(config.mesh)
    hardware = cached_or_calibrate(
        replace(subject.model, lora=None), workload=workload_of(config), again=parsed.recalibrate,
        lanes=partial(trial_spans, config, subject, (learner_mesh, rollout_mesh)),
    )  # fmt: skip
    plan = make_plan(config, subject.model, hardware)
    more_rows = plan_curricula(config, subject.model, hardware, plan)
    rows = plan_rows(config, plan, hardware, subject.tokenizer)
    print_plan(build.problem_rows(config, subject) + rows + more_rows)
    if config.run.fork_from is not None:
        existing_checkpoints(config.run.fork_from)
    if not parsed.dry_run:
        meshes = learner_mesh, rollout_mesh
        _run(config, subject, stream, meshes, hardware, plan, argv, only_cold_start=only_cold_start)


def _run(
    config: Config, subject: build.Subject, stream: PromptStream, meshes: tuple[Mesh, Mesh],
    hardware: Hardware, plan: Plan, argv: Sequence[str], *, only_cold_start: bool,
) -> None:  # fmt: skip
    """From the run folder to the summary, on what `run` has made and checked."""
    learner_mesh, rollout_mesh = meshes
    with ExitStack() as stack:
        folder = stack.enter_context(closing(open_run(config, argv)))
        hardware.save(folder.hardware)
        describe_policy(config.model, subject.model, subject.tokenizer, folder.path)
        checkpoints = stack.enter_context(
            closing(Checkpoints(folder.checkpoints, keep=config.checkpoint.keep))
        )
        resumed_step = checkpoints.latest()
        telemetry = stack.enter_context(
            closing(RunTelemetry(folder, config, plan, hardware, step=resumed_step or 0))
        )
        rewards = stack.enter_context(build.make_rewards(config))
        store = build.make_store(config, subject.model, learner_mesh, rollout_mesh)
        evaluator = build.make_evaluator(config, subject, rollout_mesh, rewards)
        starter = Starter(
            config=config, subject=subject, mesh=learner_mesh, store=store, evaluator=evaluator,
            checkpoints=checkpoints, telemetry=telemetry,
        )  # fmt: skip
        build.await_verifiers(config, rewards)
        learner, record = starter.begin() if resumed_step is None else starter.resume(resumed_step)
        if only_cold_start:
            return
        curricula = make_curricula(config, stream, plan)
        curricula.restore(record.curricula)
        buffer = build.make_buffer(
            config, curricula.edge or stream, version=record.step, state=record.buffer
        )
        worker = make_rollout(
            config, subject, rollout_mesh, store, buffer, rewards, telemetry, curricula
        )
        loop = Loop(
            config=config, learner=learner, store=store, buffer=buffer, evaluator=evaluator,
            rewards=rewards, problems=build.held_out(config, subject)[0], checkpoints=checkpoints,
            record=record, telemetry=telemetry, folder=folder.path, curricula=curricula,
        )  # fmt: skip
        with settled(), telemetry.watched(buffer), worker, stop_asked() as asked:
            completed = loop.run(asked)
        finish(
            config, subject, folder, learner, store, evaluator, record, telemetry, hardware,
            completed=completed,
        )  # fmt: skip
        if not completed:
            raise KeyboardInterrupt


def _with_mesh(config: Config, subject: build.Subject, *, again: bool) -> Config:
    """The configuration on the split that roofline.plan chooses, or on that of the run it resumes."""
    if (before := resolved_before(config)) is not None:
        return before
    model = replace(subject.model, lora=None)
    hardware = cached_or_calibrate(model, workload=workload_of(config), again=again)
    config, said = resolve(config, subject.model, hardware)
    print("\n".join(said))
    return config


def _check_nothing_offline(config: Config) -> None:
    """Raise UserError for files that another command trains on."""
    for section, path in (("sft", config.sft.path), ("preference", config.preference.path)):
        if path is not None and config.run.fork_from is None:
            raise UserError(
                f"{section}.path={path} is for `python -m jaxrl.{section}`; run that first, then this with "
                f"--run.fork-from=ITS_RUN_FOLDER, or leave {section}.path out"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """The learner's side of the drawing above."""

    config: Config
    learner: Learner
    store: WeightStore
    buffer: GroupBuffer
    evaluator: Evaluator
    rewards: RewardPool
    problems: Sequence[Problem]
    checkpoints: Checkpoints
    record: RunRecord
    telemetry: RunTelemetry
    folder: Path
    curricula: Curricula

    def run(self, asked: threading.Event) -> bool:
        """Optimizer steps until train.steps or the budget; False if `asked` ended it before."""
        last = self.config.train.steps
        began = time.perf_counter() - self.record.wall_s
        if self.record.step >= last:
            self.telemetry.progress.note(
                f"{self.folder} has its {self.record.step} steps; raise --train.steps for more, or name "
                "another --run.dir"
            )
        for step in range(self.record.step + 1, last + 1):
            if self._budget_spent():
                break
            with self.telemetry.observer.phase(Phase.WAIT_BATCH):
                limit = self.curricula.lengths.current.max_new_tokens
                taken = take_batch(self.buffer, self.config.grpo, limit)
            groups = taken.groups
            staleness = self.record.consume(groups, step - 1)
            self.record.generated_tokens += taken.generated_tokens
            metrics = self._learn(groups, step, limit) | taken.curves
            metrics |= self.curricula.observe(taken.sampled, step)
            metrics["perf/generated_tokens"] = float(self._generated_tokens)
            snapshot = self._publish(step)
            self.buffer.release(step)
            self.record.step, self.record.buffer = step, self.buffer.state()
            ends, stops = step == last or self._budget_spent(), asked.is_set()
            if ends or _due(step, self.config.eval.every_steps):
                metrics |= self._evaluate(snapshot)
            metrics |= {f"off_policy/{name}": n for name, n in self.buffer.counts().items()}
            metrics |= self.rewards.stats().metrics()
            self.telemetry.log_step(step, metrics, groups, staleness)
            self.record.wall_s = time.perf_counter() - began
            if ends or stops or _due(step, self.config.checkpoint.every_steps):
                self._save(step)  # after the line of its step, or a kill in between would lose that
            if _due(step, self.config.checkpoint.export_every_steps):
                self._export(step)
            self.record.wall_s = time.perf_counter() - began
            if stops and not ends:
                return False
        return True

    def _budget_spent(self) -> bool:
        most = self.config.train.max_generated_tokens
        return 0 < most <= self._generated_tokens

    @property
    def _generated_tokens(self) -> int:
        return self.record.generated_tokens + self.curricula.probe_tokens

    def _learn(
        self, groups: Sequence[RolloutGroup], step: int, max_new_tokens: int
    ) -> dict[str, float]:
        """The updates on one batch; none if every group was filtered, which is counted."""
        config = self.config
        rows = Rows(
            row_tokens=config.train.row_tokens,
            rows_per_microbatch=config.train.rows_per_microbatch,
            max_new_tokens=max_new_tokens,
            shared=config.train.shared_prompts,
        )
        prepared = prepare(groups, config.grpo, rows, self.learner)
        padding = assert_share("perf/padding_ratio", prepared.padding_ratio, zero_allowed=True)
        metrics = prepared.metrics | {
            "perf/padding_ratio": padding,
            "batch/microbatches": sum(len(batches) for batches in prepared.minibatches),
            "batch/empty": float(not prepared.minibatches),
        }
        if not prepared.minibatches:
            return metrics
        return {**metrics, **self.learner.update_step(prepared.minibatches, step)}

    def _publish(self, step: int) -> Snapshot:
        with self.telemetry.observer.publish(step) as work:
            traced = self.store.trace_count
            snapshot = self.store.publish(step, self.learner.policy)
            work.update(bytes=self.store.published_bytes, compiled=self.store.trace_count - traced)
        return snapshot

    def _evaluate(self, snapshot: Snapshot) -> dict[str, float]:
        with self.telemetry.observer.phase(Phase.EVAL):
            evaluation = self.evaluator.run(snapshot, self.problems, self.config.eval.samples)
        return evaluation.metrics("eval")

    def _save(self, step: int) -> None:
        self.record.nonfinite_steps = self.learner.num_nonfinite_steps
        self.record.curricula = self.curricula.state()
        with self.telemetry.observer.phase(Phase.CHECKPOINT, step=step):
            self.checkpoints.save(step, self.learner.state, self.record.to_json())

    def _export(self, step: int) -> None:
        """The weights as a Hugging Face folder, in bfloat16."""
        with self.telemetry.observer.phase(Phase.CHECKPOINT, step=step):
            out = self.folder / "exports" / f"step_{step}"
            export_policy(self.learner.policy, out, run=self.folder, dtype="bfloat16")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


if __name__ == "__main__":
    main()
