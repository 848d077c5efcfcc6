"""The rollout thread: tickets in, finished groups out. It never waits for the learner while it has work.

loop:  take tickets for slots that would stand empty     (waits only when there is nothing to decode)
       give slots that stay empty to probes              (if the curriculum has any; a ticket takes them back)
       decode one chunk with the newest weights          (a swap happens here, between two chunks)
       a finished group goes to the verifiers            (worker processes; overlaps decoding)
verifiers done -> buffer.put(group)                      (on the verifier pool's thread)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jaxrl.buffer import BufferClosed, GroupBuffer, Ticket
from jaxrl.length_curriculum import LengthCurriculum, Stage
from jaxrl.observe import Observer
from jaxrl.rewards.pool import RewardPool
from jaxrl.rollout.engine import Request, RolloutEngine, SamplingParams
from jaxrl.rollout.probes import Probes, ProbeSettings
from jaxrl.types import Completion, Finish, Prompt, Reward, Rollout, RolloutGroup
from jaxrl.weights import WeightStore

if TYPE_CHECKING:  # it loads sentencepiece, which sampling does not need
    from jaxrl.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """The length curriculum, and how its engines are made; there is one at a time."""

    lengths: LengthCurriculum
    make_engine: Callable[[Stage], RolloutEngine]


class RolloutWorker:
    """Use as a context manager: the thread starts on entry, and is stopped and joined on exit."""

    def __init__(
        self, engine: RolloutEngine, store: WeightStore, buffer: GroupBuffer, rewards: RewardPool,
        tokenizer: Tokenizer, *, group_size: int, params: SamplingParams, observer: Observer,
        stages: Stages | None = None, probes: ProbeSettings | None = None,
    ) -> None:  # fmt: skip
        """stages: later engines, where the length curriculum has several stages; `engine` and `params`
        are those of the present one. probes: what idle slots may sample.
        """
        self._engine = engine
        self._stages = stages
        self._stage = None if stages is None else stages.lengths.current
        self._probes = None if probes is None else Probes(probes, observer, buffer.fail)
        self._store = store
        self._buffer = buffer
        self._rewards = rewards
        self._tokenizer = tokenizer
        self._group_size = group_size
        self._params = params
        self._observer = observer
        self._tickets: dict[int, Ticket] = {}
        self._completions: dict[int, list[Completion]] = {}
        self._thread = threading.Thread(target=self._run, name="rollout", daemon=True)

    def __enter__(self) -> RolloutWorker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._buffer.close()
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                if self._on_stage():
                    self._take_tickets()
                more_waits = self._buffer.has_tickets
                finished = self._engine.run_chunk(self._store.current(), more_waits=more_waits)
                for request, completion in finished:
                    self._finish(request, completion)
        except BufferClosed:
            return
        except BaseException as error:
            self._buffer.fail(error)

    def _on_stage(self) -> bool:
        """Whether the engine is the present stage's; if not, what is under way ends before it is made."""
        if self._stages is None or (stage := self._stages.lengths.current) == self._stage:
            return True
        if self._probes is not None:
            self._probes.cancel(self._engine)
        if not self._engine.is_idle:
            self._buffer.raise_if_over()
            return False
        self._engine.free()
        self._engine, self._stage = self._stages.make_engine(stage), stage
        self._params = replace(self._params, max_new_tokens=stage.max_new_tokens)
        return True

    def _take_tickets(self) -> None:
        if self._probes is not None and self._buffer.has_tickets:
            self._probes.cancel(self._engine)
        most = -(-self._engine.num_free_slots // self._group_size)
        if most == 0 and not self._engine.is_idle:
            self._buffer.raise_if_over()
            return
        start = time.perf_counter()
        if self._probes is not None and not self._buffer.has_tickets:
            self._probes.fill(self._engine, self._params)
        try:
            tickets = self._buffer.draw(max(most, 1), wait=self._engine.is_idle)
        finally:  # also of a wait that the end of the run ends
            self._observer.waited_for_learner(start)
        if tickets and self._probes is not None:
            self._probes.cancel(self._engine)
        self._on_stage()  # it may have changed while we waited with an idle engine
        for ticket in tickets:
            prompt = ticket.prompt
            self._tickets[prompt.index] = ticket
            self._completions[prompt.index] = []
            self._engine.submit(
                Request(
                    stream=prompt.index,
                    prompt=prompt.tokens,
                    sample_indices=tuple(range(self._group_size)),
                    params=self._params,
                )
            )

    def _finish(self, request: Request, completion: Completion) -> None:
        """Collect a completion; when its group is complete, have it verified."""
        if self._probes is not None and request.stream in self._probes:
            self._probes.finish(request, completion, self._judge_probe)
            return
        completions = self._completions[request.stream]
        completions.append(completion)
        if len(completions) < self._group_size:
            return
        del self._completions[request.stream]
        ticket = self._tickets.pop(request.stream)
        completions.sort(key=lambda c: c.sample_index)
        texts = [completion_text(self._tokenizer, c) for c in completions]
        submitted = time.perf_counter()
        future = self._judge(ticket.prompt, completions, texts)
        future.add_done_callback(
            lambda done: self._verified(ticket, completions, texts, submitted, done)
        )

    def _judge(
        self, prompt: Prompt, completions: Sequence[Completion], texts: Sequence[str], *,
        urgent: bool = True,
    ) -> Future[list[Reward]]:  # fmt: skip
        return self._rewards.submit_many(
            [
                (prompt.problem, text, c.finish is Finish.STOP, len(c.tokens))
                for text, c in zip(texts, completions, strict=True)
            ],
            urgent=urgent,
        )

    def _judge_probe(
        self, prompt: Prompt, completions: Sequence[Completion]
    ) -> Future[list[Reward]]:
        texts = [completion_text(self._tokenizer, c) for c in completions]
        return self._judge(prompt, completions, texts, urgent=False)

    def _verified(
        self, ticket: Ticket, completions: list[Completion], texts: list[str], submitted: float,
        done: Future[list[Reward]],
    ) -> None:  # fmt: skip
        """Runs on the verifier pool's thread."""
        if done.cancelled():
            return
        try:
            rewards = done.result()
            self._observer.verified(submitted, samples=len(rewards))
            self._buffer.put(
                RolloutGroup(
                    prompt=ticket.prompt,
                    birth_version=ticket.birth_version,
                    rollouts=tuple(
                        Rollout(completion=completion, text=text, reward=reward)
                        for completion, text, reward in zip(
                            completions, texts, rewards, strict=True
                        )
                    ),
                )
            )
        except BaseException as error:
            self._buffer.fail(error)


def completion_text(tokenizer: Tokenizer, completion: Completion) -> str:
    """The completion as text, without its stop token."""
    tokens = completion.tokens
    shown = tokens[:-1] if completion.finish is Finish.STOP else tokens
    return tokenizer.decode(shown.tolist(), continues=True)
