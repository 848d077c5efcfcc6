"""AdamW with warm-up, decay schedule, global-norm clipping and decay on matrices only."""

from __future__ import annotations

from typing import Any

import optax

from models.config import ModelConfig
from models.lora import adapter_table
from models.sharding import decay_mask

FINAL_SHARE = 0.1
"""Share of the peak learning rate at which linear and cosine schedules end."""


def learning_rate(*, peak: float, warmup_steps: int, steps: int, schedule: str) -> optax.Schedule:
    """Learning rate of optimizer step 0, 1, ...: linear from 0 over `warmup_steps`, then the schedule.

    The first step uses peak / warmup_steps, so no step is wasted at 0. linear and cosine reach
    FINAL_SHARE of the peak at the last of `steps`.
    """
    rest = max(steps - warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, FINAL_SHARE * peak, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=FINAL_SHARE),
    }[schedule]
    if warmup_steps == 0:
        return after
    warmup = optax.linear_schedule(peak / warmup_steps, peak, warmup_steps - 1)
    return optax.join_schedules([warmup, after], [warmup_steps])


def adamw(
    config: ModelConfig, rate: optax.Schedule, *, beta1: float, beta2: float, eps: float,
    weight_decay: float, max_grad_norm: float,
) -> optax.GradientTransformation:  # fmt: skip
    """Clip the global norm to `max_grad_norm` (0: do not), then AdamW (arXiv:1711.05101).

    Of an adapter every array is a matrix and decays.
    """
    mask: Any = decay_mask(config)
    if config.lora is not None:
        mask = dict.fromkeys(adapter_table(config), True)
    clip = optax.clip_by_global_norm(max_grad_norm) if max_grad_norm > 0 else optax.identity()
    return optax.chain(
        clip,
        optax.adamw(rate, b1=beta1, b2=beta2, eps=eps, weight_decay=weight_decay, mask=mask),
    )
