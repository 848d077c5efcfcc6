"""What a task is, how problems get their identity and split.

A task is a pure description: it reads at most its own file, and verifying needs no problem list, so
that verifier processes build it cheaply. Nothing here loads jax.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, runtime_checkable

from jaxrl.config import TaskConfig
from jaxrl.types import Problem, Reward

Split = Literal["train", "validation", "test"]

_SPLIT_OF_DIGIT: tuple[Split, ...] = ("train",) * 8 + ("validation", "test")


class Task(Protocol):
    """A set of problems with an exact verifier."""

    @property
    def name(self) -> str:
        """The task's name in the configuration."""
        ...

    @property
    def chance_rate(self) -> float:
        """Expected pass@1 of uniform guessing over plausible answers; each task says over which."""
        ...

    @property
    def alphabet(self) -> str | None:
        """Characters that a from-scratch tokenizer needs; None: only a checkpoint's will do."""
        ...

    def problems(self, split: Split) -> Sequence[Problem]:
        """Distinct problems of a split; which ones and in what order, configuration and seed say.

        A problem belongs to the same split under every seed and every size limit.
        """
        ...

    def verify(self, problem: Problem, completion: str, finished: bool) -> Reward:
        """Judge a completion; exact and pure.

        completion: generated text without the prompt and without the stop token.
        finished: a stop token ended it, not the length limit.
        """
        ...


@runtime_checkable
class IsolatedTask(Protocol):
    """A task whose `verify` runs in verifier processes only: it parses model text or foreign code."""

    def load_verifier(self) -> None:
        """Make `verify` ready. Called once in each verifier process, never in the trainer."""
        ...


@runtime_checkable
class ShapedTask(Protocol):
    """A task whose reward is more than its verdict."""

    def shape(self, problem: Problem, completion: str, num_tokens: int, verdict: Reward) -> Reward:
        """The reward of a completion of so many tokens that `verify` has judged."""
        ...


def stable_hash(text: str) -> int:
    """63-bit hash that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def problem_id(text: str, family: str | None = None) -> int:
    """Identity of the problem `text`: a 63-bit hash whose last decimal digit decides the split.

    Problems of one `family` (47+85 and 85+47) share that digit, so that no split holds a problem
    whose twin is in another.
    """
    identity = stable_hash(text)
    return identity - identity % 10 + stable_hash(text if family is None else family) % 10


def split_of(identity: int) -> Split:
    """Split of a problem id: 80 % train, 10 % validation, 10 % test."""
    return _SPLIT_OF_DIGIT[identity % 10]


def most_problems(config: TaskConfig, split: Split) -> int:
    """Most problems that the configuration wants in a split."""
    return config.num_train if split == "train" else config.num_eval


def drawable(space: int, split: Split) -> int:
    """Problems that random draws from `space` equally likely ones find quickly: half of a split."""
    return space * (8 if split == "train" else 1) // 20


def shuffled(problems: Iterable[Problem], seed: int) -> list[Problem]:
    """The problems in an order that depends on the seed and on each problem alone."""
    return sorted(problems, key=lambda problem: stable_hash(f"{seed}/{problem.id}"))


def uniform(rng: random.Random, low: int, high: int) -> int:
    """Integer in low..high, from `random()` alone: Python keeps its stream across versions."""
    return low + int(rng.random() * (high - low + 1))
