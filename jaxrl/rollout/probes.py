"""Probes: idle slots sample problems unsolved so far. Whoever has a ticket takes the slots back at once.

Neither do verifiers let a batch wait: a probe's samples are judged while no others wait, and those that
are sampled or wait for a verdict are never more than the slots allowed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from jaxrl.observe import Observer
from jaxrl.rollout.engine import Request, RolloutEngine, SamplingParams
from jaxrl.types import Completion, Prompt, Reward


class ProbeSource(Protocol):
    """What `jaxrl.curriculum.EdgeStream` is to this file."""

    def next_probe(self) -> Prompt | None:
        """An unsolved problem to probe; None if there is none."""
        ...

    def probed(self, prompt: Prompt, rewards: Sequence[Reward], tokens: int) -> None:
        """A probe is over: its verdicts, and how many tokens they took."""
        ...

    def cancelled(self, samples: int, tokens: int) -> None:
        """Slots were taken back from so many samples, whose tokens are lost."""
        ...


Judge = Callable[[Prompt, Sequence[Completion]], Future[list[Reward]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeSettings:
    """How much may be probed at once."""

    source: ProbeSource
    slots: int
    """Most slots."""
    samples: int
    """Samples of one problem."""


class Probes:
    """The probes of one rollout thread, which makes every call but the verifiers' callback."""

    def __init__(
        self, settings: ProbeSettings, observer: Observer, fail: Callable[[BaseException], None]
    ) -> None:
        """fail: told of an error on the verifiers' thread."""
        self._settings = settings
        self._observer = observer
        self._fail = fail
        self._prompts: dict[int, Prompt] = {}
        self._done: dict[int, list[Completion]] = {}
        self._left = 0  # samples submitted and not finished
        self._verdicts: list[Future[list[Reward]]] = []  # of probes, pending or not

    def __contains__(self, stream: int) -> bool:
        return stream in self._prompts

    def fill(self, engine: RolloutEngine, params: SamplingParams) -> None:
        """Give idle slots to probes, up to the limit."""
        samples = self._settings.samples
        self._verdicts = [verdict for verdict in self._verdicts if not verdict.done()]
        most = self._settings.slots - samples * (1 + len(self._verdicts))
        while engine.num_free_slots >= samples and self._left <= most:
            prompt = self._settings.source.next_probe()
            if prompt is None:
                break
            self._prompts[prompt.index] = prompt
            self._done[prompt.index] = []
            self._left += samples
            engine.submit(
                Request(
                    stream=prompt.index, prompt=prompt.tokens,
                    sample_indices=tuple(range(samples)), params=params,
                )
            )  # fmt: skip

    def cancel(self, engine: RolloutEngine) -> None:
        """Take every slot back; what the probes have sampled is lost, and counted."""
        if not self._prompts:
            return
        samples, tokens = engine.cancel(self._prompts.keys())
        finished = [c for row in self._done.values() for c in row]
        tokens += sum(len(c.tokens) for c in finished)
        self._settings.source.cancelled(samples + len(finished), tokens)
        self._prompts.clear()
        self._done.clear()
        self._left = 0

    def finish(self, request: Request, completion: Completion, judge: Judge) -> None:
        """Collect a sample; a whole probe goes to the verifiers."""
        row = self._done[request.stream]
        row.append(completion)
        self._left -= 1
        if len(row) < self._settings.samples:
            return
        prompt = self._prompts.pop(request.stream)
        row = self._done.pop(request.stream)
        submitted, tokens = time.perf_counter(), sum(len(c.tokens) for c in row)

        def verified(done: Future[list[Reward]]) -> None:
            if done.cancelled():
                return
            try:
                rewards = done.result()
                self._observer.verified(submitted, samples=len(rewards))
                self._settings.source.probed(prompt, rewards, tokens)
            except BaseException as error:
                self._fail(error)

        self._verdicts.append(judge(prompt, row))
        self._verdicts[-1].add_done_callback(verified)
