"""One run's work whatever the devices: its model, its settings, and how long its completions are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from models.config import ModelConfig
from models.first_fit import first_fit_decreasing
from models.rows import samples_per_row
from roofline.kernels import ceil_div
from roofline.lengths import Lengths
from roofline.settings import Settings

PACKED = 512
"""Completions that are packed to count rows: with 1,024 the count changes by 1 % at most."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run's work, whatever the devices."""

    model: ModelConfig
    settings: Settings
    lengths: Lengths

    @cached_property
    def held_steps(self) -> float:
        """Mean decode steps that a completion holds its slot for."""
        return self.lengths.in_chunks(self.settings.rollout.chunk_steps).mean

    @cached_property
    def rows_per_step(self) -> int:
        """Packed rows of one optimizer step, prompts at their limit: as the learner packs PACKED completions
        that stand for all; where prompts are shared, of mean length."""
        train, rollout, grpo = self.settings.train, self.settings.rollout, self.settings.grpo
        samples, limit = self.settings.samples_per_step, rollout.max_new_tokens
        if train.shared_prompts is not None:
            held = samples_per_row(
                train.row_tokens, train.shared_prompts, prompt=rollout.max_prompt_tokens,
                completion=min(limit, self.lengths.mean), group=grpo.group_size,
            )  # fmt: skip
            return ceil_div(samples, held)
        some = np.minimum(self.lengths.evenly(min(samples, PACKED)), limit)
        rows, _ = first_fit_decreasing(some + rollout.max_prompt_tokens, train.row_tokens)
        return ceil_div((int(rows.max()) + 1) * samples, len(some))

    @property
    def verify_s(self) -> float:
        """Time that the verifiers need for a step [s]: one verdict after another in each worker, or
        the latency once where there are no workers."""
        task = self.settings.task
        if not task.reward_workers:
            return task.reward_latency_s
        return task.reward_latency_s * ceil_div(self.settings.samples_per_step, task.reward_workers)
