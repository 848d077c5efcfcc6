"""Whole rollouts and whole GRPO steps on one device: jaxrl's engine, buffer, worker, learner, store.

What a run has around them is left out: tokenizer, task, checkpoints, telemetry files. Rewards are a
coin toss that depends on the completion, judged in the rollout thread.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import accumulate

import numpy as np

from benchmarks.gpu.cases import WARM_UPS, Case
from benchmarks.gpu.floors import decode_floor, model_flops, rows_floor
from benchmarks.gpu.measure import Prepared, Result, Span, Stopwatch
from benchmarks.gpu.phases import STOPPING, Bench, submit
from jaxrl.buffer import GroupBuffer
from jaxrl.config import GrpoConfig, TaskConfig
from jaxrl.packing import groups_to_sequences, pack
from jaxrl.rewards.pool import RewardPool
from jaxrl.rollout.engine import SamplingParams
from jaxrl.rollout.worker import RolloutWorker
from jaxrl.tasks.base import Split, stable_hash
from jaxrl.types import Problem, Prompt, Reward, Snapshot
from models.cache import segment_sizes
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
    program = bench.decode_program(shape.samples, shape.length)
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
        executed=lambda: _rollout_work(bench),
        facts=lambda: {"attention": program, "phase_s": _phase_s(spans, 1)},
    )  # fmt: skip


def _needed(bench: Bench) -> list[PhaseCost]:
    """Prefill of each prompt once, and every decode step over the keys that are there by then."""
    shape, model, layout = bench.scale.rollout, bench.model, bench.rollout_layout
    prompts = shape.prompts * shape.prompt_tokens
    flops = model_flops(model, prompts, (shape.prompt_tokens + 1) / 2, headed=0, backward=False)
    keys = shape.prompt_tokens + (shape.new_tokens - 1) / 2
    return [
        rows_floor(model, layout, Phase.PREFILL, flops),
        decode_floor(model, layout, shape.samples, keys, shape.new_tokens),
    ]


def _rollout_work(bench: Bench) -> list[PhaseCost]:
    """What the engine's programs do for one step's rollout: whole chunks, over as many keys as they read."""
    shape, model, chunk = bench.scale.rollout, bench.model, bench.scale.chunk_steps
    layout = bench.rollout_layout
    work = [cost.prefill(model, layout, shape.prompts, shape.prompt_tokens, shape.samples)]
    stops = bench.decode_program(shape.samples, shape.length) in STOPPING
    prefixes = list(accumulate(segment_sizes(shape.length)))
    for done in range(0, shape.new_tokens, chunk):
        longest = shape.prompt_tokens + done + chunk
        read = next((n for n in prefixes if n >= longest), prefixes[-1])
        keys = longest - chunk // 2 if stops else read
        work.append(cost.decode(model, layout, shape.samples, keys, chunk))
    return work


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

    @property
    def flops(self) -> float:
        """Of the model in training on one step's sequences."""
        shape = self.bench.scale.rollout
        total = shape.samples * shape.length
        return model_flops(
            self.bench.model, total, (shape.length + 1) / 2, headed=total, backward=True
        )

    def least(self) -> list[PhaseCost]:
        """What the results of one step need."""
        model, layout = self.bench.model, self.bench.learner_layout
        trained = rows_floor(model, layout, Phase.TRAIN, self.flops)
        return [*_needed(self.bench), trained, *self._after_training()]

    def costs(self) -> list[PhaseCost]:
        """Work of one step: the rollout's, the learner's, the publication's."""
        model, layout = self.bench.model, self.bench.learner_layout
        trained = cost.train(
            model, layout, self.row_tokens, self.rows, self.microbatches, "block",
            self.bench.scale.chunk_tokens,
        )  # fmt: skip
        return [*_rollout_work(self.bench), trained, *self._after_training()]

    def _after_training(self) -> list[PhaseCost]:
        model, layout = self.bench.model, self.bench.learner_layout
        return [
            cost.optimizer(model, layout),
            cost.publish(model, layout, self.bench.rollout_layout, same_devices=True),
        ]

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
    decoded = model_flops(
        bench.model, shape.samples * shape.new_tokens, shape.prompt_tokens + shape.new_tokens / 2,
        headed=shape.samples * shape.new_tokens, backward=False,
    )  # fmt: skip
    return Prepared(
        once=step.once, close=step.close, tokens=shape.samples * shape.new_tokens,
        useful=step.least, executed=step.costs, overlapped=case.max_staleness > 0,
        model_flops=decoded + step.flops, facts=step.facts,
    )  # fmt: skip
