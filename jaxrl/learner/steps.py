"""The jitted parts of an optimizer step. Pure functions; `Learner` holds the state.

Order within one optimizer step: (reference scoring) -> accumulate over micro-batches -> apply.
Gradients of micro-batches are summed: the denominators are in the batch's token weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from jaxrl.algorithms.loss import LossMetrics, merge_metrics, policy_loss, sft_loss
from jaxrl.batch import Batch
from jaxrl.config import GrpoConfig
from models.decoder import Decoder, hidden_states
from models.head import target_logprobs


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """What an optimizer step replaces; donated."""

    policy: Decoder  # float32
    optimizer: Any
    step: Any  # [] int32, optimizer steps taken, skipped ones included


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardSettings:
    """How the learner runs the model."""

    dtype: Any
    temperature: float
    chunk_tokens: int
    remat: bool


def score(policy: Decoder, batch: Batch, settings: ForwardSettings) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities [R, T] of the targets and entropies [R, T] of the next-token distributions."""
    hidden = hidden_states(
        policy, batch.tokens, batch.positions, batch.segment_ids,
        dtype=settings.dtype, remat=settings.remat,
    )  # fmt: skip
    return target_logprobs(
        policy, hidden, batch.targets, temperature=settings.temperature,
        chunk_tokens=settings.chunk_tokens, dtype=settings.dtype,
    )  # fmt: skip


def grpo_loss(
    policy: Decoder, batch: Batch, reference_logprobs: jax.Array | None, *,
    forward: ForwardSettings, grpo: GrpoConfig,
) -> tuple[jax.Array, LossMetrics]:  # fmt: skip
    """This micro-batch's part of the policy loss, and its metrics."""
    logprobs, entropy = score(policy, batch, forward)
    return policy_loss(
        logprobs, entropy, batch, learner_logprobs=None, reference_logprobs=reference_logprobs,
        settings=grpo,
    )  # fmt: skip


def accumulate_grpo(
    policy: Decoder, gradients: Decoder, metrics: LossMetrics, batch: Batch,
    reference_logprobs: jax.Array | None, *, forward: ForwardSettings, grpo: GrpoConfig,
) -> tuple[Decoder, LossMetrics]:  # fmt: skip
    """Add one micro-batch's policy gradient and metrics."""
    new, seen = jax.grad(grpo_loss, has_aux=True)(
        policy, batch, reference_logprobs, forward=forward, grpo=grpo
    )
    return jax.tree.map(jnp.add, gradients, new), merge_metrics(metrics, seen)


def accumulate_sft(
    policy: Decoder, gradients: Decoder, total: jax.Array, batch: Batch, *, forward: ForwardSettings
) -> tuple[Decoder, jax.Array]:
    """Add one micro-batch's cross-entropy gradient and loss."""
    loss, new = jax.value_and_grad(lambda p: sft_loss(score(p, batch, forward)[0], batch))(policy)
    return jax.tree.map(jnp.add, gradients, new), total + loss


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """What the optimizer saw."""

    grad_norm: Any  # [] float32, before clipping
    is_finite: Any  # [] bool; False: the step left weights and optimizer state as they were


def apply_gradients(
    state: TrainState, gradients: Decoder, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Applied]:
    """One optimizer step; a non-finite gradient norm leaves weights and optimizer state untouched."""
    norm = optax.global_norm(gradients)
    finite = jnp.isfinite(norm)

    def take(state: TrainState) -> TrainState:
        policy: Any = state.policy  # a pytree; optax's types know only arrays and containers
        updates, new = optimizer.update(cast("Any", gradients), state.optimizer, policy)
        stepped: Any = optax.apply_updates(policy, updates)
        return TrainState(policy=stepped, optimizer=new, step=state.step + 1)

    def skip(state: TrainState) -> TrainState:
        return TrainState(policy=state.policy, optimizer=state.optimizer, step=state.step + 1)

    return jax.lax.cond(finite, take, skip, state), Applied(grad_norm=norm, is_finite=finite)


def zeros_like(policy: Decoder) -> Decoder:
    """Gradients before the first micro-batch."""
    return jax.tree.map(jnp.zeros_like, policy)
