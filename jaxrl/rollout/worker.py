"""The rollout thread: tickets in, finished groups out. It never waits for the learner while it has work.

loop:  take tickets for slots that would stand empty     (waits only when there is nothing to decode)
       decode one chunk with the newest weights          (a swap happens here, between two chunks)
       a finished group goes to the verifiers            (worker processes; overlaps decoding)
verifiers done -> buffer.put(group)                      (on the verifier pool's thread)
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

from jaxrl.buffer import BufferClosed, GroupBuffer, Ticket
from jaxrl.observe import Observer
from jaxrl.rewards.pool import RewardPool
from jaxrl.rollout.engine import Request, RolloutEngine, SamplingParams
from jaxrl.types import Completion, Finish, Reward, Rollout, RolloutGroup
from jaxrl.weights import WeightStore

if TYPE_CHECKING:  # it loads sentencepiece, which sampling does not need
    from jaxrl.tokenizer import Tokenizer


class RolloutWorker:
    """Use as a context manager: the thread starts on entry, and is stopped and joined on exit."""

    def __init__(
        self, engine: RolloutEngine, store: WeightStore, buffer: GroupBuffer, rewards: RewardPool,
        tokenizer: Tokenizer, *, group_size: int, params: SamplingParams, observer: Observer,
    ) -> None:  # fmt: skip
        self._engine = engine
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
                self._take_tickets()
                more_waits = self._buffer.has_tickets
                finished = self._engine.run_chunk(self._store.current(), more_waits=more_waits)
                for request, completion in finished:
                    self._finish(request, completion)
        except BufferClosed:
            return
        except BaseException as error:
            self._buffer.fail(error)

    def _take_tickets(self) -> None:
        most = -(-self._engine.num_free_slots // self._group_size)
        if most == 0 and not self._engine.is_idle:
            self._buffer.raise_if_over()
            return
        start = time.perf_counter()
        tickets = self._buffer.draw(max(most, 1), wait=self._engine.is_idle)
        self._observer.waited_for_learner(start)
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
        completions = self._completions[request.stream]
        completions.append(completion)
        if len(completions) < self._group_size:
            return
        del self._completions[request.stream]
        ticket = self._tickets.pop(request.stream)
        completions.sort(key=lambda c: c.sample_index)
        texts = [completion_text(self._tokenizer, c) for c in completions]
        submitted = time.perf_counter()
        problem = ticket.prompt.problem
        future = self._rewards.submit_many(
            [
                (problem, text, completion.finish is Finish.STOP)
                for text, completion in zip(texts, completions, strict=True)
            ]
        )
        future.add_done_callback(
            lambda done: self._verified(ticket, completions, texts, submitted, done)
        )

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
