"""Longer completions in fewer slots as the policy learns (Magistral, arXiv:2506.10910 section 3.3).

Stage by stage the longest completion grows, and with it a sequence's cache, so the slots become fewer
(16k, 24k, 32k tokens with 8k, 4k, 2k sequences there). A stage begins at its step, or once so many
completions are cut off that the limit holds the policy back. The rollout thread lets what it samples end
before it changes over; each stage is a set of programs of its own, compiled once.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass
from typing import Any

from jaxrl.config import Config
from jaxrl.sections import CurriculumConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What the sampling engine is made for."""

    number: int
    max_new_tokens: int
    """Longest completion [tokens]."""
    slots: int


def stages_of(config: Config) -> tuple[Stage, ...]:
    """The stages of a run, at least one."""
    settings, rollout = config.curriculum, config.rollout
    lengths = settings.lengths or (rollout.max_new_tokens,)
    slots = settings.slots or (rollout.slots,) * len(lengths)
    return tuple(
        Stage(number=n, max_new_tokens=length, slots=wide)
        for n, (length, wide) in enumerate(zip(lengths, slots, strict=True))
    )


def at_stage(config: Config, stage: Stage) -> Config:
    """The configuration of a run that stays in `stage`."""
    rollout = dataclasses.replace(
        config.rollout, max_new_tokens=stage.max_new_tokens, slots=stage.slots
    )
    return dataclasses.replace(config, rollout=rollout, curriculum=CurriculumConfig())


class LengthCurriculum:
    """Which stage a run is in. The learner's thread moves it, the rollout's reads it."""

    def __init__(self, stages: tuple[Stage, ...], settings: CurriculumConfig) -> None:
        self._stages = stages
        self._settings = settings
        self._at = 0
        self._recent: deque[float] = deque(maxlen=settings.stage_window)

    @property
    def current(self) -> Stage:
        """The present stage."""
        return self._stages[self._at]

    def observe(self, truncated_share: float, step: int) -> None:
        """Optimizer step `step` is over; this share of its completions was cut off."""
        self._recent.append(truncated_share)
        if self._at + 1 == len(self._stages):
            return
        if self._settings.stage_steps:
            due = step >= self._settings.stage_steps[self._at]
        else:
            full = len(self._recent) == self._settings.stage_window
            share = sum(self._recent) / len(self._recent)
            due = full and share >= self._settings.truncated_share
        if due:
            self._at += 1
            self._recent.clear()

    def curves(self) -> dict[str, float]:
        """The stage and what it allows."""
        stage = self.current
        return {
            "curriculum/stage": float(stage.number),
            "curriculum/max_new_tokens": float(stage.max_new_tokens),
            "curriculum/slots": float(stage.slots),
        }

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"stage": self._at, "recent": [*self._recent]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._at = state["stage"]
        self._recent.extend(state["recent"])
