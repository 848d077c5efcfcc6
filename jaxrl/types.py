"""Every record that crosses a file boundary, except the device batch (jaxrl.batch). Loads no jax.

One producer per field; log-probabilities are named by producer.

step = optimizer step; version = weights after that step (0: as loaded); staleness = difference of versions
when a sample is consumed. Letters: P prompts, G samples per prompt, T tokens, R packed rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np


class Finish(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """A stop token was sampled; it is part of the completion and of the loss."""
    LENGTH = "length"
    """The token limit was reached first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One verifiable problem as a task makes it, before tokenisation."""

    id: int
    """Stable 63-bit hash of the problem itself; decides its split and its random stream."""
    prompt: str
    answer: str
    """What the verifier compares against; its form is the task's own."""
    solution: str
    """A worked solution that the verifier accepts; what the cold start learns from."""
    row: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The record that the problem was made from, for verifiers that read more than the answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A problem on its way through the pipeline."""

    index: int
    """Position in the stream of prompts of this run, counted from 0."""
    problem: Problem
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reward:
    """Verdict on one completion."""

    total: float
    parts: Mapping[str, float] = field(default_factory=dict)
    """Summands or factors by name, for the curves."""
    correct: bool
    """Correctness before any shaping; filters and pass@k use this."""
    answer: str = ""
    """The final answer as the verifier reads it, in one spelling; empty: none. Votes count these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What the sampler produced for sample `sample_index` of one prompt, T generated tokens."""

    tokens: np.ndarray  # [T] int32, the stop token included
    sampler_logprobs: np.ndarray  # [T] float32, of the distribution actually sampled from
    versions: np.ndarray  # [T] int32, weight version that produced each token; never falls
    finish: Finish
    sample_index: int

    @property
    def oldest_version(self) -> int:
        """Weights that sampled its first token."""
        return int(self.versions[0])

    @property
    def newest_version(self) -> int:
        """Weights that sampled its last token."""
        return int(self.versions[-1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """A completion with its verdict."""

    completion: Completion
    text: str
    reward: Reward


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutGroup:
    """All G samples of one prompt: the unit of the buffer."""

    prompt: Prompt
    birth_version: int
    """Version current when the group's ticket was taken; no token of it is older."""
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """Weights as the rollout uses them. Immutable; owns its buffers, so the learner may donate its own."""

    version: int
    policy: Any  # models.decoder.Policy in compute dtype and rollout sharding
