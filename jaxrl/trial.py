"""The run's own lanes for some seconds on made-up rewards: what calibration measures this run's phases with.

    lockstep    rollout, verifiers and learner one after another: what each phase takes alone
    overlapped  the same beside each other, within the staleness bound: how they slow each other

Programs of their own, run back to back, are quicker than the same programs in a run, whose caches are cold
and whose threads share cores and interpreter. So the parts are the run's (engine, verifiers, learner,
weight store, telemetry), the shapes too; only the layers are fewer, the weights random, long completions cut
short, and rewards are coins, since all samples of random weights fail and groups without signal are dropped.
The learning rate is 0: a policy that learns its coins soon answers alike, and then no group has a signal.
"""

from __future__ import annotations

import dataclasses
import io
import os
import tempfile
import time
import zlib
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from jaxrl import build
from jaxrl.buffer import GroupBuffer
from jaxrl.build import Subject
from jaxrl.collector import settled
from jaxrl.config import Config, TaskConfig
from jaxrl.learner.learner import Learner
from jaxrl.learner.prepare import Rows, prepare
from jaxrl.plan import make_plan
from jaxrl.prompts import PromptStream
from jaxrl.record import RunRecord
from jaxrl.refill import take_batch
from jaxrl.rewards.pool import RewardPool
from jaxrl.rollout.engine import RolloutEngine
from jaxrl.run_folder import RunFolder
from jaxrl.tasks import Task, make_task
from jaxrl.tasks.base import IsolatedTask, Split
from jaxrl.telemetry.progress import RunProgress
from jaxrl.telemetry.run import RunTelemetry
from jaxrl.types import Problem, Reward, RolloutGroup
from jaxrl.weights import WeightStore
from models.sharding import init_sharded
from roofline.calibrate import shallow
from roofline.hardware import Hardware
from roofline.phases import Phase
from roofline.read_run import Span, read_spans

MOST_CHUNKS = 4
"""Completions are cut to so many decode chunks."""
PARTS = (1, 2, 4, 8)
"""Steps in turn learn from a whole batch of groups, a half, a quarter, an eighth, as in runs whose groups
without signal are dropped: that tells a call's fixed time from its micro-batches', and shifts what of the
other lane each phase meets."""
FEWEST_STEPS = len(PARTS)
"""Optimizer steps of each mode, whatever the time."""
LOCKSTEP_SHARE = 0.33
"""Of the time, for lockstep."""
TURNS = 4
"""Of each mode, where FEWEST_STEPS steps fit into one."""


def trial_spans(
    config: Config, subject: Subject, meshes: tuple[Mesh, Mesh], hardware: Hardware, budget_s: float
) -> tuple[Span, ...]:
    """Spans of the lanes, lockstep first; a run whose staleness bound is 0 never overlaps them.

    The modes take turns, so that a machine that grows faster or slower meanwhile does so for both: else its
    drift would count as what the lanes do to each other.
    budget_s: time for both modes [s], after the first steps, which compile; FEWEST_STEPS steps of each
        are made whatever they take.
    Raises:
        UserError: the run would not fit the devices.
    """
    model = dataclasses.replace(shallow(subject.model), lora=None)
    subject = dataclasses.replace(subject, model=model)
    config = _shortened(config)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxrl-trial-")))
        parts = _make(config, subject, meshes, hardware, folder, stack)
        parts.play(0, 0.0)
        stack.enter_context(settled())
        turn_s, until_s = budget_s / TURNS, time.perf_counter() + budget_s
        while True:
            parts.play(0, LOCKSTEP_SHARE * turn_s)
            if config.rollout.max_staleness:
                parts.play(config.rollout.max_staleness, (1 - LOCKSTEP_SHARE) * turn_s)
            if time.perf_counter() >= until_s:
                break
        parts.telemetry.close()
        return read_spans(folder / "spans.jsonl", config.model.dtype)


@dataclass(kw_only=True, slots=True, eq=False)
class _Parts:
    """What a run is made of, without evaluation and checkpoints."""

    config: Config
    subject: Subject
    stream: PromptStream
    learner: Learner
    store: WeightStore
    engine: RolloutEngine
    rewards: RewardPool
    telemetry: RunTelemetry
    record: RunRecord

    def play(self, max_staleness: int, seconds: float) -> None:
        """Optimizer steps for so many seconds; lockstep where the bound is 0. The learner's lane waits, and
        says so, while what was under way ends."""
        buffer = GroupBuffer(
            self.stream, prompts_per_step=self.config.grpo.prompts_per_step,
            max_staleness=max_staleness, version=self.record.step,
        )  # fmt: skip
        worker = build.make_worker_on(
            self.config, self.subject, self.engine, self.store, buffer, self.rewards,
            self.telemetry.observer,
        )  # fmt: skip
        done, until_s = 0, time.perf_counter() + seconds
        with ExitStack() as resting:
            with worker:
                while done < FEWEST_STEPS or time.perf_counter() < until_s:
                    self._step(buffer, PARTS[done % len(PARTS)])
                    done += 1
                resting.enter_context(self.telemetry.observer.phase(Phase.WAIT_BATCH))
            while not self.engine.is_idle:  # what was under way belongs to no later buffer
                self.engine.run_chunk(self.store.current())

    def _step(self, buffer: GroupBuffer, part: int) -> None:
        """One optimizer step, learning from one `part`-th of its groups."""
        config, step = self.config, self.record.step + 1
        observer = self.telemetry.observer
        with observer.phase(Phase.WAIT_BATCH):
            taken = take_batch(buffer, config.grpo, config.rollout.max_new_tokens)
        staleness = self.record.consume(taken.groups, step - 1)
        metrics = self._learn(taken.groups[: max(1, len(taken.groups) // part)], step)
        with observer.publish(step) as work:
            traced = self.store.trace_count
            self.store.publish(step, self.learner.state.policy)
            work["compiled"] = self.store.trace_count - traced
        buffer.release(step)
        self.record.step = step
        metrics |= self.rewards.stats().metrics()
        self.telemetry.log_step(step, metrics, taken.groups, staleness)

    def _learn(self, groups: Sequence[RolloutGroup], step: int) -> dict[str, float]:
        config = self.config
        rows = Rows(
            row_tokens=config.train.row_tokens,
            rows_per_microbatch=config.train.rows_per_microbatch,
            max_new_tokens=config.rollout.max_new_tokens,
            shared=config.train.shared_prompts,
        )
        prepared = prepare(groups, config.grpo, rows, self.learner)
        if not prepared.minibatches:
            return prepared.metrics
        return prepared.metrics | self.learner.update_step(prepared.minibatches, step)


def _make(
    config: Config, subject: Subject, meshes: tuple[Mesh, Mesh], hardware: Hardware, folder: Path,
    stack: ExitStack,
) -> _Parts:  # fmt: skip
    learner_mesh, rollout_mesh = meshes
    plan = make_plan(config, subject.model, hardware)
    lock = stack.enter_context(closing(io.FileIO(os.open(os.devnull, os.O_RDWR), "r+")))
    telemetry = RunTelemetry(
        RunFolder(path=folder, resumed=False, lock=lock), config, plan, hardware, step=0
    )
    stack.enter_context(closing(telemetry))
    telemetry.progress = RunProgress(config.train.steps, console=Console(quiet=True))
    task = config.task
    rewards = stack.enter_context(
        RewardPool(
            task, config.run.seed, task.reward_workers, task.reward_timeout_s,
            task.reward_latency_s, coin_task,
        )
    )  # fmt: skip
    store = build.make_store(config, subject.model, learner_mesh, rollout_mesh)
    policy = init_sharded(subject.model, jax.random.key(config.run.seed), learner_mesh, jnp.float32)
    learner = build.make_learner(config, subject.model, learner_mesh, policy, telemetry.observer)
    if learner.needs_reference:
        learner.freeze_reference()
    store.publish(0, learner.state.policy)
    engine = build.make_engine(config, subject, rollout_mesh, telemetry.observer)
    rewards.wait_ready()
    return _Parts(
        config=config, subject=subject, stream=build.make_stream(config, subject), learner=learner,
        store=store, engine=engine, rewards=rewards, telemetry=telemetry, record=RunRecord(),
    )  # fmt: skip


def _shortened(config: Config) -> Config:
    """No cold start, no adapter, no learning, and completions of at most MOST_CHUNKS chunks."""
    rollout = config.rollout
    tokens = min(rollout.max_new_tokens, MOST_CHUNKS * rollout.chunk_steps)
    return dataclasses.replace(
        config,
        rollout=dataclasses.replace(rollout, max_new_tokens=tokens),
        train=dataclasses.replace(config.train, learning_rate=0.0),
        sft=dataclasses.replace(config.sft, steps=0),
        lora=dataclasses.replace(config.lora, rank=0),
    )


class _CoinTask:
    """A task whose verifier runs, and whose verdict is then replaced by a coin."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.name, self.alphabet = task.name, task.alphabet
        self.chance_rate = 0.5

    def problems(self, split: Split) -> Sequence[Problem]:
        """The task's own."""
        return self._task.problems(split)

    def verify(self, problem: Problem, completion: str, finished: bool) -> Reward:
        """0 or 1 by the completion's checksum."""
        self._task.verify(problem, completion, finished)
        won = bool(zlib.crc32(completion.encode()) & 1)
        return Reward(total=float(won), correct=won)


class _IsolatedCoinTask(_CoinTask):
    def load_verifier(self) -> None:
        """The task's own."""
        assert isinstance(self._task, IsolatedTask)
        self._task.load_verifier()


def coin_task(config: TaskConfig, seed: int) -> Task:
    """The configured task with coins for verdicts; a function that a verifier process can import."""
    task = make_task(config, seed)
    return _IsolatedCoinTask(task) if isinstance(task, IsolatedTask) else _CoinTask(task)
