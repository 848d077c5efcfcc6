"""Worker: jaxrl. Rollout through RolloutEngine, train step through packing and Learner.update, one device.
Prompts stand once for their samples, in the cache and in the rows.

Tail: each sample is a request with its own limit, through fewer slots than samples.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import peak_bytes
from benchmarks.systems.protocol import GREEDY_PROMPTS, GREEDY_TOKENS, Answer, Conversation
from benchmarks.workload import Workload
from jaxrl.config import Config, GrpoConfig, RolloutConfig, TrainConfig
from jaxrl.devices import give_back_after_compiling
from jaxrl.observe import Observer
from jaxrl.packing import groups_to_sequences, pack
from jaxrl.rollout.engine import Request, RolloutEngine, SamplingParams
from jaxrl.types import Completion, Problem, Prompt, Reward, Rollout, RolloutGroup, Snapshot
from models.hf import load_fused, load_policy, read_config
from models.rows import PrefixRows
from models.sharding import fused_shardings, make_mesh, policy_shardings
from roofline.machine import keep_freed_memory, prefer_wide_vectors

if TYPE_CHECKING:
    from jaxrl.learner.learner import Learner

CHUNK_STEPS, REFILL_COST_STEPS = 16, 0.5
PEAK_SIZE, PEAK_REPEATS = 2048, 3


class System:
    """Everything the worker holds."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        prefer_wide_vectors()
        keep_freed_memory()
        give_back_after_compiling()
        self.model = read_config(workload.checkpoint)
        self.mesh = make_mesh(jax.devices()[:1])
        self.config = Config(
            train=TrainConfig(
                learning_rate=1e-4, warmup_steps=0, shared_prompt_tokens=workload.prompt_tokens - 1,
                row_parts=workload.group_size,
                row_tokens=workload.prompt_tokens - 1 + workload.group_size * workload.new_tokens,
                rows_per_microbatch=workload.jaxrl_microbatch // workload.group_size,
            ),
            rollout=RolloutConfig(
                max_prompt_tokens=workload.prompt_tokens, max_new_tokens=workload.new_tokens
            ),
            grpo=GrpoConfig(
                prompts_per_step=len(workload.prompts), group_size=workload.group_size,
                drop_zero_advantage=False,  # the others train on every group
            ),
        )  # fmt: skip
        rows = PrefixRows(
            rows=len(workload.prompts), lanes=workload.group_size, tokens=workload.prompt_tokens
        )
        self.engine = self._engine(workload.samples, workload.new_tokens, rows)
        self.tail_engine = self._engine(workload.tail_slots, workload.max_tail_length)
        weights = load_fused(
            workload.checkpoint, self.model, dtype=jnp.float32,
            shardings=fused_shardings(self.model, self.mesh),
        )  # fmt: skip
        self.snapshot = Snapshot(version=0, policy=weights)
        self.streams = itertools.count()

    @cached_property
    def learner(self) -> Learner:
        """Made and imported at the first training: memory before it is that of a system that only rolls out."""
        from jaxrl.build import make_learner  # noqa: PLC0415

        policy = load_policy(
            self.workload.checkpoint, self.model, shardings=policy_shardings(self.model, self.mesh)
        )
        return make_learner(self.config, self.model, self.mesh, policy, Observer())

    def step(self) -> Answer:
        """One rollout and one optimizer step on it; with the first, the most memory that rolling out took."""
        work, began = self.workload, time.perf_counter()
        finished = rollout(
            self.engine, self.snapshot, self._requests(work.prompts, work.new_tokens)
        )
        rolled = time.perf_counter()
        before = (
            {} if "learner" in self.__dict__ else {"rollout_peak_bytes": peak_bytes(os.getpid())}
        )
        groups = self._groups(finished)
        scored = time.perf_counter()
        sequences, _ = groups_to_sequences(groups, self.config.grpo, work.new_tokens)
        train = self.config.train
        batches, _ = pack(
            sequences, row_tokens=train.row_tokens, rows_per_microbatch=train.rows_per_microbatch,
            shared=train.shared_prompts,
        )  # fmt: skip
        self.learner.update(batches)
        jax.block_until_ready(self.learner.state)
        return {
            "rollout_s": rolled - began,
            "rollout_tokens": _tokens(finished),
            "train_s": time.perf_counter() - scored,
            "train_tokens": sum(len(sequence.tokens) for sequence in sequences),
            **before,
        }

    def tail(self) -> Answer:
        """All samples of the tail scenario, each to its own limit."""
        work, requests = self.workload, []
        lengths = iter(work.tail_lengths)
        for prompt in work.tail_prompts:
            stream = next(self.streams)
            requests += [
                Request(
                    stream=stream, prompt=tuple(prompt), sample_indices=(i,),
                    params=SamplingParams(max_new_tokens=next(lengths), stop_ids=()),
                )
                for i in range(work.group_size)
            ]  # fmt: skip
        began = time.perf_counter()
        finished = rollout(self.tail_engine, self.snapshot, requests)
        return {"rollout_s": time.perf_counter() - began, "rollout_tokens": _tokens(finished)}

    def greedy(self) -> Answer:
        """Greedy completions of the first prompts."""
        finished = rollout(
            self.engine, self.snapshot,
            self._requests(self.workload.prompts[:GREEDY_PROMPTS], GREEDY_TOKENS, 1, 0.0),
        )  # fmt: skip
        finished.sort(key=lambda pair: pair[0].stream)
        return {"tokens": [completion.tokens.tolist() for _, completion in finished]}

    def peak(self) -> Answer:
        """FLOP/s of a large float32 product in XLA."""
        x = jnp.full((PEAK_SIZE, PEAK_SIZE), PEAK_SIZE**-1.0)
        product = jax.jit(jnp.dot)
        product(x, x).block_until_ready()
        times = []
        for _ in range(PEAK_REPEATS):
            began = time.perf_counter()
            product(x, x).block_until_ready()
            times.append(time.perf_counter() - began)
        return {"flops_per_s": 2.0 * PEAK_SIZE**3 / min(times)}

    def _engine(
        self, slots: int, new_tokens: int, prefixes: PrefixRows | None = None
    ) -> RolloutEngine:
        return RolloutEngine(
            self.model, self.mesh, num_slots=slots, max_prompt_tokens=self.workload.prompt_tokens,
            max_new_tokens=new_tokens, chunk_steps=CHUNK_STEPS, refill_cost_steps=REFILL_COST_STEPS,
            num_stop_ids=1, dtype=jnp.float32, seed=0, observer=Observer(), prefixes=prefixes,
        )  # fmt: skip

    def _requests(
        self, prompts: Iterable[Sequence[int]], new_tokens: int, samples: int | None = None,
        temperature: float = 1.0,
    ) -> list[Request]:  # fmt: skip
        params = SamplingParams(temperature=temperature, max_new_tokens=new_tokens, stop_ids=())
        indices = tuple(range(samples or self.workload.group_size))
        return [
            Request(
                stream=next(self.streams), prompt=tuple(prompt), sample_indices=indices,
                params=params,
            )
            for prompt in prompts
        ]  # fmt: skip

    def _groups(self, finished: list[tuple[Request, Completion]]) -> list[RolloutGroup]:
        """Reward: the share of even tokens."""
        by_stream: defaultdict[int, list[tuple[Request, Completion]]] = defaultdict(list)
        for request, completion in finished:
            by_stream[request.stream].append((request, completion))
        return [
            RolloutGroup(
                prompt=Prompt(
                    index=stream,
                    problem=Problem(id=stream, prompt="", answer="", solution=""),
                    tokens=pairs[0][0].prompt,
                ),
                birth_version=0,
                rollouts=tuple(
                    Rollout(
                        completion=completion, text="",
                        reward=Reward(total=float(np.mean(completion.tokens % 2 == 0)), correct=False),
                    )
                    for _, completion in pairs
                ),
            )
            for stream, pairs in by_stream.items()
        ]  # fmt: skip


def rollout(
    engine: RolloutEngine, snapshot: Snapshot, requests: Iterable[Request]
) -> list[tuple[Request, Completion]]:
    """Submit everything, decode until nothing is left."""
    for request in requests:
        engine.submit(request)
    finished = []
    while not engine.is_idle:
        finished += engine.run_chunk(snapshot)
    return finished


def _tokens(finished: list[tuple[Request, Completion]]) -> int:
    return sum(len(completion.tokens) for _, completion in finished)


def main() -> None:
    """Serve."""
    conversation = Conversation()
    system = System(conversation.workload)
    conversation.ready({"jax": jax.__version__}, parameters=system.model.num_parameters)
    conversation.serve(
        {"step": system.step, "tail": system.tail, "greedy": system.greedy, "peak": system.peak}
    )


if __name__ == "__main__":
    main()
