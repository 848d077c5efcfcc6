"""The loss of one micro-batch of packed rows, composed from four choices, and its metrics.

loss = sum over tokens of token_weights * (w * policy loss + kl_weight * KL - entropy_weight * H)

w is the off-policy correction. token_weights hold the aggregation and its denominator over the
whole optimizer batch, so losses, gradients and metrics of micro-batches are added.
R rows, T tokens.
"""

from __future__ import annotations

from typing import assert_never

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.algorithms.config import GrpoConfig
from jaxrl.algorithms.correction import (
    log_weights,
    masked_weights,
    off_policy_keep,
    sequence_keep,
    truncated_weights,
)
from jaxrl.algorithms.kl import k3, kl_estimate, kl_term
from jaxrl.algorithms.loss_metrics import (
    LossMetrics,
    covariance_curves,
    importance_curves,
    keep,
    mismatch_curves,
    ratio_curves,
    reduce_curves,
)
from jaxrl.algorithms.ratios import (
    TokenLoss,
    cispo,
    dppo,
    gspo,
    policy_ratio,
    ppo_clip,
    reinforce,
    sapo,
)
from jaxrl.batch import Batch


def policy_loss(
    logprobs: jax.Array,
    entropy: jax.Array,
    batch: Batch,
    *,
    learner_logprobs: jax.Array | None,
    reference_logprobs: jax.Array | None,
    settings: GrpoConfig,
) -> tuple[jax.Array, LossMetrics]:
    """This micro-batch's part of the loss, and its metrics.

    Temperature has already been applied to everything below. Gradient flows through logprobs and
    entropy only. Positions outside batch.loss_mask have no influence, whatever they hold.

    Args:
        logprobs: [R, T] float32, of the targets under the policy being trained.
        entropy: [R, T] float32, of the policy's next-token distribution [nats].
        batch: packed rows.
        learner_logprobs: [R, T] float32, of the policy at the start of the optimizer batch; None
            if this is the first step on the batch, where they equal logprobs.
        reference_logprobs: [R, T] float32, of the reference; needed if the loss has a KL term.
        settings: the four choices.

    Returns:
        (scalar loss, metrics), to be added and merged over the optimizer batch's micro-batches.

    Raises:
        ValueError: kl_weight is set with kl_in=loss and reference_logprobs is None.
    """
    in_loss = settings.kl_weight != 0 and settings.kl_in == "loss"
    if in_loss and reference_logprobs is None:
        raise ValueError(f"kl_weight={settings.kl_weight} needs reference_logprobs; got None")
    mask = batch.loss_mask
    logprobs, entropy = keep(logprobs, mask), keep(entropy, mask)
    sampler = _constant(batch.sampler_logprobs, mask)
    learner = _constant(logprobs if learner_logprobs is None else learner_logprobs, mask)
    reference = None if reference_logprobs is None else _constant(reference_logprobs, mask)
    old = sampler if settings.ratio_from == "sampler" else learner
    advantages = _shaped(batch, entropy, settings)

    token_loss = _ratio_loss(logprobs, old, advantages, batch, settings)
    correction, curves = _correction(learner, sampler, batch, settings)
    kept, masked = _sequence_mask(logprobs, learner, sampler, advantages, batch, settings)
    losses = correction * token_loss.losses
    if kept is not None:
        losses = keep(losses, kept)
    loss, parts = _aggregate(losses, logprobs, old, entropy, reference, batch, settings)
    curves |= masked
    curves |= ratio_curves(logprobs, old, token_loss) | {"actor/entropy": entropy}
    curves |= mismatch_curves(learner, sampler) | importance_curves(logprobs, sampler)
    curves |= covariance_curves(logprobs, advantages)
    if reference is not None:
        curves["reference/kl_mean"] = k3(logprobs, reference)
        curves["reference/logprob_mean"] = reference
    return loss, lax.stop_gradient(reduce_curves(parts, curves, mask))


def kept_tokens(learner_logprobs: jax.Array, batch: Batch, settings: GrpoConfig) -> jax.Array:
    """Loss tokens that the correction leaves in: verl's response mask after rejection sampling.

    Each mask looks at the whole completion (verl's rollout_corr_helper), and the learner is that of
    learner_logprobs, the start of the step, so that the masks hold for every update.

    Args:
        learner_logprobs: [R, T] float32.
        batch: packed rows.
        settings: correction and sequence_mask, not off_policy.

    Returns:
        [R, T] bool.
    """
    mask = batch.loss_mask
    learner, sampler = _constant(learner_logprobs, mask), _constant(batch.sampler_logprobs, mask)
    weights, _ = _correction(learner, sampler, batch, settings)
    kept, _ = _sequence_mask(learner, learner, sampler, batch.advantages, batch, settings)
    inside = mask & (weights > 0)
    return inside if kept is None else inside & kept


def sft_loss(logprobs: jax.Array, batch: Batch) -> jax.Array:
    """Cross-entropy -sum(token_weights * logprobs) of one micro-batch; add over micro-batches.

    Args:
        logprobs: [R, T] float32, of the targets.
        batch: packed rows of solutions.

    Returns:
        scalar.
    """
    return -jnp.sum(lax.stop_gradient(batch.token_weights) * keep(logprobs, batch.loss_mask))


def value_loss(values: jax.Array, batch: Batch, *, clip: float) -> tuple[jax.Array, jax.Array]:
    """This micro-batch's part of sum(token_weights * 0.5 max((V - R)^2, (V' - R)^2)).

    V' is V kept within +-clip of the values at the start of the batch (PPO as implemented,
    arXiv:2005.12729; verl). Aggregated as the policy loss is.

    Args:
        values: [R, T] float32 of the critic being trained; position t holds the value before the
            target of t is sampled.
        batch: packed rows with `values` and `returns`.
        clip: 0 leaves the values unbounded.

    Returns:
        (scalar loss, share of loss tokens whose bounded value was in force summed over tokens).
    """
    mask = batch.loss_mask
    values, returns = keep(values, mask), _constant(batch.returns, mask)
    start = _constant(batch.values, mask)
    errors = jnp.square(values - returns)
    bounded = jnp.square(start + jnp.clip(values - start, -clip, clip) - returns)
    in_force = mask & (bounded > errors) if clip > 0 else jnp.zeros(mask.shape, bool)
    loss = 0.5 * jnp.sum(
        lax.stop_gradient(batch.token_weights) * jnp.where(in_force, bounded, errors)
    )
    return loss, jnp.sum(in_force, dtype=jnp.float32)


def shaped_advantages(
    advantages: jax.Array, entropy: jax.Array, *, alpha: float, kappa: float
) -> jax.Array:
    """A + min(alpha H, |A| / kappa), without gradient (arXiv:2506.14758 eq. 5).

    With kappa > 1 no advantage changes its sign. Any shape.
    """
    bonus = jnp.minimum(alpha * entropy, jnp.abs(advantages) / kappa)
    return lax.stop_gradient(advantages + bonus)


def _constant(values: jax.Array, mask: jax.Array) -> jax.Array:
    return lax.stop_gradient(keep(values, mask))


def _shaped(batch: Batch, entropy: jax.Array, settings: GrpoConfig) -> jax.Array:
    """Advantages [R, T]; the entropy that shapes them is that at the start of the batch."""
    if settings.entropy_shaping == 0:
        return lax.stop_gradient(batch.advantages)
    if batch.learner_entropy is not None:
        entropy = keep(batch.learner_entropy, batch.loss_mask)
    return shaped_advantages(
        batch.advantages, entropy,
        alpha=settings.entropy_shaping, kappa=settings.entropy_shaping_bound,
    )  # fmt: skip


def _ratio_loss(
    logprobs: jax.Array, old: jax.Array, advantages: jax.Array, batch: Batch, settings: GrpoConfig
) -> TokenLoss:
    low, high = settings.relative_bounds
    tokens = (logprobs, old, advantages)
    if settings.ratio == "ppo":
        return ppo_clip(*tokens, clip_low=low, clip_high=high, dual_clip=settings.dual_clip)
    if settings.ratio == "cispo":
        return cispo(*tokens, clip_low=low, clip_high=high)
    if settings.ratio == "reinforce":
        return reinforce(*tokens)
    if settings.ratio == "gspo" or settings.ratio == "gspo_token":
        return gspo(
            *tokens, batch.segment_ids, batch.loss_mask, clip_low=low, clip_high=high,
            per_token=settings.ratio == "gspo_token",
        )  # fmt: skip
    if settings.ratio == "sapo":
        return sapo(
            *tokens, tau_positive=settings.sapo_tau_positive,
            tau_negative=settings.sapo_tau_negative,
        )  # fmt: skip
    if settings.ratio == "dppo":
        return dppo(*tokens, delta=settings.dppo_delta)
    assert_never(settings.ratio)


def _correction(
    learner: jax.Array, sampler: jax.Array, batch: Batch, settings: GrpoConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weight of each token [R, T], and its curves."""
    cap, floor = settings.correction_cap, settings.correction_floor
    if settings.correction == "none":
        return jnp.ones_like(learner), {}
    ratios = log_weights(
        learner, sampler, batch.segment_ids, batch.loss_mask, level=settings.correction_level
    )
    if settings.correction == "truncated":
        weights, outside = truncated_weights(ratios, cap=cap, floor=floor)
    elif settings.correction == "masked":
        weights, outside = masked_weights(ratios, low=floor or 1.0 / cap, high=cap)
    else:
        assert_never(settings.correction)
    return weights, {
        "tis/weight_mean": weights,
        "tis/frac_clipped": outside.astype(jnp.float32),
    }


def _sequence_mask(
    logprobs: jax.Array, learner: jax.Array, sampler: jax.Array, advantages: jax.Array,
    batch: Batch, settings: GrpoConfig,
) -> tuple[jax.Array | None, dict[str, jax.Array]]:  # fmt: skip
    """Tokens [R, T] of sequences with a policy gradient (None: all), and the curve of the others."""
    kind, where = settings.sequence_mask, (batch.segment_ids, batch.loss_mask)
    if kind == "none":
        return None, {}
    if kind == "off_policy":
        kept = off_policy_keep(
            logprobs, sampler, advantages, *where, bound=settings.off_policy_bound
        )
    else:
        kept = sequence_keep(
            learner, sampler, *where, kind=kind, low=settings.mask_low, high=settings.mask_high
        )
    return kept, {"tis/frac_masked": (~kept).astype(jnp.float32)}


def _aggregate(
    losses: jax.Array, logprobs: jax.Array, old: jax.Array, entropy: jax.Array,
    reference: jax.Array | None, batch: Batch, settings: GrpoConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """The loss and its parts, all scalars."""
    weights = lax.stop_gradient(batch.token_weights)
    loss = jnp.sum(weights * losses)
    parts = {"actor/pg_loss": loss}
    if reference is not None:
        parts["actor/kl_loss"] = jnp.sum(weights * _kl(logprobs, old, reference, settings))
        if settings.kl_weight != 0 and settings.kl_in == "loss":
            loss = loss + settings.kl_weight * parts["actor/kl_loss"]
    if settings.entropy_weight != 0:
        loss = loss - settings.entropy_weight * jnp.sum(weights * entropy)
    return loss, parts | {"actor/loss": loss}


def _kl(
    logprobs: jax.Array, old: jax.Array, reference: jax.Array, settings: GrpoConfig
) -> jax.Array:
    """KL to the reference of each token [R, T]."""
    if not settings.kl_importance and settings.kl_bound == 0:
        return kl_estimate(logprobs, reference, settings.kl_estimator)
    ratio = policy_ratio(logprobs, old) if settings.kl_importance else None
    return kl_term(logprobs, reference, settings.kl_estimator, ratio=ratio, bound=settings.kl_bound)
