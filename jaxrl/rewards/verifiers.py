"""Verifiers by name: what judges (prompt, completion, row) in the verifier processes.

    exact     the stripped completion is row["answer"]
    math      its final answer equals row["answer"] mathematically      jaxrl.rewards.math
    code      its program passes the tests in the row                   jaxrl.rewards.code
    similarity  how much its edit resembles the row's             jaxrl.rewards.similarity
    FILE.py:function, package.module:function      your own             jaxrl.rewards.custom

The trainer makes a `Verifier` to check the name; only verifier processes `load` it, so neither sympy nor
the user's module, nor model text that they parse, is ever in the trainer.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrl.config import TaskConfig
from jaxrl.errors import UserError
from jaxrl.rewards.custom import check_custom, limit_allocations, load_custom
from jaxrl.rewards.similarity import score_similarity
from jaxrl.types import Problem, Reward

Score = Callable[[str, str, Mapping[str, Any]], Reward]
"""prompt, completion, row -> reward."""

_BUILT_IN = ("exact", "math", "code", "similarity")


class Verifier:
    """A verifier by name."""

    def __init__(
        self, name: str, *, code_wall_s: float = 10.0, code_adaptive: bool = False,
        memory_gib: float = 8.0,
    ) -> None:  # fmt: skip
        """code_wall_s, code_adaptive, memory_gib (reward_memory_gib): see TaskConfig.

        Raises: UserError if there is none of that name; what it needs is imported by `load`.
        """
        if name not in _BUILT_IN:
            check_custom(name)
        self._name = name
        self._code_limits = (code_wall_s, code_adaptive)
        self._memory_gib = memory_gib
        self._score: Score | None = None

    def load(self) -> None:
        """Import what it needs. Once in each verifier process, never in the trainer.

        Raises: UserError for a function that is not there, or what its module raises.
        """
        if self._name == "code":
            module = importlib.import_module("jaxrl.rewards.code")
            self._score = module.make_score(*self._code_limits)
        elif self._name not in _BUILT_IN:
            limit_allocations(self._memory_gib)
            self._score = load_custom(self._name)
        else:
            self._score = _load(self._name)

    def __call__(self, prompt: str, completion: str, row: Mapping[str, Any]) -> Reward:
        """The reward. Raises: RuntimeError before `load`, and what the verifier raises."""
        if self._score is None:
            raise RuntimeError(
                f"verifier {self._name} is not loaded; it runs in verifier processes"
            )
        return self._score(prompt, completion, row)


def score_exact(prompt: str, completion: str, row: Mapping[str, Any]) -> Reward:
    """1 if the completion, stripped of white space at both ends, is row["answer"]. Part: `correct`."""
    said = completion.strip()
    correct = said == row["answer"].strip()
    parts = {"correct": float(correct)}
    return Reward(total=float(correct), parts=parts, correct=correct, answer=said)


def _load(name: str) -> Score:
    if name == "exact":
        return score_exact
    if name == "similarity":
        return score_similarity
    # gmpy2, where installed, ends the process instead of raising MemoryError.
    os.environ.update(SYMPY_GROUND_TYPES="python", MPMATH_NOGMPY="1")
    module = importlib.import_module("jaxrl.rewards.math")
    module.limit_memory()
    return module.score_math


def configured(config: TaskConfig, name: str) -> Verifier:
    """The verifier `name` with the limits of the configuration."""
    return Verifier(
        name, code_wall_s=config.code_wall_s, code_adaptive=config.code_adaptive,
        memory_gib=config.reward_memory_gib,
    )  # fmt: skip


class VerifierTask:
    """A task of no problems: judges any row with `config.verifier`. For jaxrl.score."""

    name = "score"
    chance_rate = 0.0
    alphabet = None

    def __init__(self, config: TaskConfig, seed: int) -> None:
        """Raises: UserError if the configuration names no verifier that exists."""
        if config.verifier is None:
            raise UserError("task.verifier is not set; write math, code, exact or FILE.py:function")
        self._verifier = configured(config, config.verifier)

    def problems(self, split: str) -> Sequence[Problem]:
        """None."""
        return ()

    def load_verifier(self) -> None:
        """Make `verify` ready; see jaxrl.tasks.base.IsolatedTask."""
        self._verifier.load()

    def verify(self, problem: Problem, completion: str, finished: bool) -> Reward:
        """Judge with the verifier; whether a stop token ended the text does not matter."""
        return self._verifier(problem.prompt, completion, problem.row)
