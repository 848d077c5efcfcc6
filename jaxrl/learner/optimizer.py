"""AdamW with warm-up, decay schedule, global-norm clipping and decay on matrices only."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
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
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """Clip the global norm to `max_grad_norm` (0: do not), then AdamW (arXiv:1711.05101).

    update takes the gradients' norm, as `clip_to` does.
    Of an adapter every array is a matrix and decays.
    """
    mask: Any = decay_mask(config)
    if config.lora is not None:
        mask = dict.fromkeys(adapter_table(config), True)
    return optax.chain(
        clip_to(max_grad_norm),
        optax.adamw(rate, b1=beta1, b2=beta2, eps=eps, weight_decay=weight_decay, mask=mask),
    )


def clip_to(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Gradients times min(1, max_norm / norm) (0: as they are); `update` takes their global norm as `norm`.

    arXiv:1211.5063 section 3.2. One factor for all, so that each reader of a gradient multiplies for itself:
    optax's own divides each element, which on a CPU leaves a copy of all gradients, and takes the norm again.
    """

    def update(
        gradients: Any, state: optax.EmptyState, params: Any = None, *, norm: jax.Array
    ) -> tuple[Any, optax.EmptyState]:
        if max_norm <= 0:
            return gradients, state
        factor = jnp.minimum(1.0, max_norm / norm)
        return jax.tree.map(lambda gradient: gradient * factor, gradients), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, cast("Any", update))
