"""A sample in a slot, chunk by chunk, and the completion that it becomes. No device."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from jaxrl.rollout.admission import Request
from jaxrl.types import Completion, Finish


@dataclass(slots=True)
class Live:
    """A sample in a slot, with what it has generated so far."""

    request: Request
    sample_index: int
    length: int  # prompt and generated tokens
    start: int  # of these, the ones before the slot's own cache
    tokens: list[np.ndarray] = field(default_factory=list)  # of each chunk
    logprobs: list[np.ndarray] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @property
    def steps_left(self) -> int:
        """Tokens that it may still take."""
        return len(self.request.prompt) + self.request.params.max_new_tokens - self.length

    def add(self, tokens: np.ndarray, logprobs: np.ndarray, version: int) -> None:
        """What a chunk under weights `version` sampled."""
        self.tokens.append(tokens)
        self.logprobs.append(logprobs)
        self.versions.append(version)
        self.length += len(tokens)

    def completion(self) -> Completion:
        """The ended sample."""
        tokens = np.concatenate(self.tokens)
        stopped = int(tokens[-1]) in self.request.params.stop_ids
        counts = [len(part) for part in self.tokens]
        return Completion(
            tokens=tokens,
            sampler_logprobs=np.concatenate(self.logprobs),
            versions=np.repeat(np.array(self.versions, np.int32), counts),
            finish=Finish.STOP if stopped else Finish.LENGTH,
            sample_index=self.sample_index,
        )
