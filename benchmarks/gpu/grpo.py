"""Whole rollouts and whole GRPO steps on one device: jaxrl's engine, buffer, worker, learner, store.

What a run has around them is left out: tokenizer, task, checkpoints, telemetry files. Rewards are a
coin toss that depends on the completion, judged in the rollout thread.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import numpy as np

from benchmarks.gpu.cases import WARM_UPS, Case
from benchmarks.gpu.measure import Prepared, Result, Span, Stopwatch
from benchmarks.gpu.phases import Bench, model_flops, submit
from jaxrl.buffer import GroupBuffer
from jaxrl.config import GrpoConfig, TaskConfig
from jaxrl.packing import groups_to_sequences, pack
from jaxrl.rewards.pool import RewardPool
from jaxrl.rollout.engine import SamplingParams
from jaxrl.rollout.worker import RolloutWorker
from jaxrl.tasks.base import Split, stable_hash
from jaxrl.types import Problem, Prompt, Reward, Snapshot
from roofline import cost
from roofline.phases import Phase, PhaseCost

REWARD_TIMEOUT_S = 10.0


class Numbers:
    """A tokenizer whose text is the ids."""

    name = "numbers"
    bos_id = None
    stop_ids = ()
    pad_id = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        """Ids of space-separated numbers."""
        return [int(word) for word in text.split()]

    def decode(self, ids: Iterable[int], *, continues: bool = False) -> str:
        """The numbers."""
        del continues
        return " ".join(str(int(i)) for i in ids)


class CoinToss:
    """Half of all completions are right; which ones, their text decides."""

    name = "coin toss"
    chance_rate = 0.5
    alphabet = None

    def problems(self, split: Split) -> Sequence[Problem]:
        """None: prompts are drawn by `RandomPrompts`."""
        del split
        return ()

    def verify(self, problem: Problem, completion: str, finished: bool) -> Reward:
        """Toss."""
        del problem, finished
        right = stable_hash(completion) % 2 == 0
        return Reward(total=float(right), correct=right)


def make_coin_toss(config: TaskConfig, seed: int) -> CoinToss:
    """As RewardPool makes its task."""
    del config, seed
    return CoinToss()


class RandomPrompts:
    """An endless stream of prompts of random tokens."""

    def __init__(self, vocab_size: int, tokens: int) -> None:
        self._vocab_size, self._tokens = vocab_size, tokens

    def at(self, index: int) -> Prompt:
        """The prompt at a position."""
        drawn = np.random.default_rng(index).integers(0, self._vocab_size, self._tokens)
        problem = Problem(id=index, prompt="", answer="", solution="")
        return Prompt(index=index, problem=problem, tokens=tuple(map(int, drawn)))


def rollout_case(bench: Bench, case: Case) -> Prepared:
    """P prompts x G samples from submission to the last token, prefill included."""
    shape, watch = bench.scale.rollout, Stopwatch()
    engine = bench.engine(
        slots=shape.samples, prompt_tokens=shape.prompt_tokens, new_tokens=shape.new_tokens,
        observer=watch,
    )  # fmt: skip
    snapshot = Snapshot(version=0, policy=bench.policy(bench.dtype))
    prompts = bench.prompts(shape.prompts, shape.prompt_tokens)
    streams = iter(range(0, 1_000_000 * shape.prompts, shape.prompts))
    spans: list[Span] = []

    def once() -> list[float]:
        began = time.perf_counter()
        submit(engine, prompts, group=shape.group, new=shape.new_tokens, stream=next(streams))
        done = 0
        while not engine.is_idle:
            done += sum(len(completion.tokens) for _, completion in engine.run_chunk(snapshot))
        seconds = time.perf_counter() - began
        assert done == shape.samples * shape.new_tokens, done
        spans[:] = watch.take()
        return [seconds]

    return Prepared(
        once=once, tokens=shape.samples * shape.new_tokens, useful=lambda: _needed(bench),
        executed=lambda: [_cost_of(bench, span) for span in spans],
        facts=lambda: {"phase_s": _phase_s(spans, 1)},
    )  # fmt: skip


def _needed(bench: Bench) -> list[PhaseCost]:
    """Prefill of each prompt once, and every decode step over the keys that are there by then."""
    shape, chunk = bench.scale.rollout, bench.scale.chunk_steps
    costs = [
        cost.prefill(
            bench.model, bench.rollout_layout, shape.prompts, shape.prompt_tokens, shape.samples
        )
    ]
    for done in range(0, shape.new_tokens, chunk):
        steps = min(chunk, shape.new_tokens - done)
        seen = shape.prompt_tokens + done + steps // 2
        costs.append(cost.decode(bench.model, bench.rollout_layout, shape.samples, seen, steps))
    return costs


def _cost_of(bench: Bench, span: Span) -> PhaseCost:
    """Work of a rollout span at the shapes that the engine used."""
    work, layout, shape = span.work, bench.rollout_layout, bench.scale.rollout
    if span.phase == Phase.PREFILL:
        return cost.prefill(bench.model, layout, work["prompts"], work["tokens"], work["samples"])
    return cost.decode(bench.model, layout, shape.samples, work["kv_len"], work["steps"])


def _phase_s(spans: Sequence[Span], steps: int) -> dict[str, float]:
    """Seconds per step of each phase."""
    total: defaultdict[str, float] = defaultdict(float)
    for span in spans:
        total[str(span.phase)] += span.seconds / max(steps, 1)
    return dict(total)


class Step:
    """The learner's loop of `jaxrl.train`, on one device that both lanes share."""

    def __init__(self, bench: Bench, max_staleness: int) -> None:
        shape = bench.scale.rollout
        self.bench, self.steps = bench, 0
        self.watch = Stopwatch()
        self.learner = bench.learner(self.watch, remat=True)
        self.store = bench.store()
        self.store.publish(0, self.learner.state.policy)
        self.buffer = GroupBuffer(
            RandomPrompts(bench.model.vocab_size, shape.prompt_tokens),
            prompts_per_step=shape.prompts, max_staleness=max_staleness,
        )  # fmt: skip
        self._open = ExitStack()
        rewards = self._open.enter_context(
            RewardPool(TaskConfig(), 0, 0, REWARD_TIMEOUT_S, 0.0, make=make_coin_toss)
        )
        engine = bench.engine(
            slots=shape.samples, prompt_tokens=shape.prompt_tokens, new_tokens=shape.new_tokens,
            observer=self.watch,
        )  # fmt: skip
        worker = RolloutWorker(
            engine, self.store, self.buffer, rewards, Numbers(bench.model.vocab_size),
            group_size=shape.group, observer=self.watch,
            params=SamplingParams(max_new_tokens=shape.new_tokens, stop_ids=()),
        )  # fmt: skip
        self._open.enter_context(worker)
        self.grpo = GrpoConfig(
            prompts_per_step=shape.prompts, group_size=shape.group, drop_zero_advantage=False
        )
        self.rows, self.row_tokens = bench.scale.packed[-1]
        self.microbatches = 0
        self.spans: list[list[Span]] = []

    def once(self) -> list[float]:
        """One optimizer step: wait for its groups, train, publish."""
        began = time.perf_counter()
        with self.watch.phase(Phase.WAIT_BATCH):
            groups = self.buffer.take()
        sequences, _ = groups_to_sequences(groups, self.grpo, self.bench.scale.rollout.new_tokens)
        batches, _ = pack(sequences, row_tokens=self.row_tokens, rows_per_microbatch=self.rows)
        self.learner.update(batches)
        self.steps += 1
        with self.watch.publish(self.steps):
            self.store.publish(self.steps, self.learner.state.policy)
        self.buffer.release(self.steps)
        self.microbatches = len(batches)
        self.spans.append(self.watch.take())
        return [time.perf_counter() - began]

    def costs(self) -> list[PhaseCost]:
        """Work of one step: the rollout's, the learner's, the publication's."""
        model, layout = self.bench.model, self.bench.learner_layout
        return [
            *_needed(self.bench),
            cost.train(
                model, layout, self.row_tokens, self.rows, self.microbatches, "block",
                self.bench.scale.chunk_tokens,
            ),
            cost.optimizer(model, layout),
            cost.publish(model, layout, self.bench.rollout_layout, same_devices=True),
        ]  # fmt: skip

    def facts(self) -> Result:
        """Seconds per step of each phase after the warm-up; waits show which lane was idle."""
        measured = self.spans[WARM_UPS:]
        spans = [span for of_step in measured for span in of_step]
        return {
            "samples": self.bench.scale.rollout.samples,
            "microbatches": self.microbatches,
            "phase_s": _phase_s(spans, len(measured)),
        }

    def close(self) -> None:
        """Stop the rollout thread and the verifier."""
        self._open.close()


def grpo_case(bench: Bench, case: Case) -> Prepared:
    """Optimizer steps, synchronous or with the rollout of the next step beside the learner."""
    step, shape = Step(bench, case.max_staleness), bench.scale.rollout
    total = shape.samples * shape.length
    decoded = model_flops(
        bench.model, shape.samples * shape.new_tokens, shape.prompt_tokens + shape.new_tokens / 2,
        headed=shape.samples * shape.new_tokens, backward=False,
    )  # fmt: skip
    trained = model_flops(bench.model, total, (shape.length + 1) / 2, headed=total, backward=True)
    return Prepared(
        once=step.once, close=step.close, tokens=shape.samples * shape.new_tokens,
        useful=step.costs, executed=step.costs, overlapped=case.max_staleness > 0,
        model_flops=decoded + trained, facts=step.facts,
    )  # fmt: skip
