"""The loss of one micro-batch of packed rows, composed from four choices, and its metrics.

loss = sum over tokens of token_weights * (w * policy loss + kl_weight * KL - entropy_weight * H)

w is the off-policy correction. token_weights hold the aggregation and its denominator over the
whole optimizer batch, so losses, gradients and metrics of micro-batches are added.
R rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.algorithms.correction import (
    effective_sample_fraction,
    importance_weights,
    masked_weights,
    truncated_weights,
)
from jaxrl.algorithms.kl import k3, kl_estimate
from jaxrl.algorithms.ratios import TokenLoss, cispo, gspo, ppo_clip, reinforce
from jaxrl.batch import Batch
from jaxrl.config import GrpoConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class LossMetrics:
    """What `finish_metrics` needs, mergeable over micro-batches. float32 scalars by curve name."""

    num_loss_tokens: jax.Array
    """Loss tokens seen: the denominator of `sums`."""
    weighted: dict[str, jax.Array]
    """Sums of token_weights * value: parts of the loss, aggregated as the loss is."""
    sums: dict[str, jax.Array]
    """Sums over loss tokens."""
    maxima: dict[str, jax.Array]
    """Maxima over loss tokens of values >= 0; 0 without loss tokens."""


def zero_metrics(like: LossMetrics) -> LossMetrics:
    """The neutral element of `merge_metrics`; `like` may hold arrays or jax.ShapeDtypeStruct."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def merge_metrics(a: LossMetrics, b: LossMetrics) -> LossMetrics:
    """Metrics of two micro-batches of one optimizer batch together."""
    return LossMetrics(
        num_loss_tokens=a.num_loss_tokens + b.num_loss_tokens,
        weighted=jax.tree.map(jnp.add, a.weighted, b.weighted),
        sums=jax.tree.map(jnp.add, a.sums, b.sums),
        maxima=jax.tree.map(jnp.maximum, a.maxima, b.maxima),
    )


def finish_metrics(metrics: LossMetrics) -> dict[str, float]:
    """Curves of one optimizer step from the merged metrics of its micro-batches; waits for them.

    `sums` are divided by the number of loss tokens; rl/ess is the effective sample fraction of the
    ratio policy / sampler, in (0, 1]. Without loss tokens every value is 0.
    """
    host = jax.device_get(metrics)
    tokens = float(host.num_loss_tokens)
    sums = {name: float(value) for name, value in host.sums.items()}
    squares = sums.pop("rl/importance_square")
    ess = effective_sample_fraction(sums["rl/importance_mean"], squares, tokens)
    return {
        **{name: float(value) for name, value in host.weighted.items()},
        **{name: value / max(tokens, 1.0) for name, value in sums.items()},
        **{name: float(value) for name, value in host.maxima.items()},
        "rl/ess": ess,
        "batch/loss_tokens": tokens,
    }


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
        reference_logprobs: [R, T] float32, of the frozen reference; needed if kl_weight is not 0.
        settings: the four choices.

    Returns:
        (scalar loss, metrics), to be added and merged over the optimizer batch's micro-batches.

    Raises:
        ValueError: kl_weight is set and reference_logprobs is None.
    """
    if settings.kl_weight != 0 and reference_logprobs is None:
        raise ValueError(f"kl_weight={settings.kl_weight} needs reference_logprobs; got None")
    mask = batch.loss_mask
    logprobs, entropy = _keep(logprobs, mask), _keep(entropy, mask)
    sampler = _constant(batch.sampler_logprobs, mask)
    learner = _constant(logprobs if learner_logprobs is None else learner_logprobs, mask)
    reference = None if reference_logprobs is None else _constant(reference_logprobs, mask)
    old = sampler if settings.ratio_from == "sampler" else learner

    token_loss = _ratio_loss(logprobs, old, batch, settings)
    correction, curves = _correction(learner, sampler, settings)
    losses = correction * token_loss.losses
    loss, parts = _aggregate(losses, logprobs, entropy, reference, batch, settings)
    curves |= _ratio_curves(logprobs, old, token_loss) | {"actor/entropy": entropy}
    curves |= _mismatch_curves(learner, sampler) | _importance_curves(logprobs, sampler)
    if reference is not None:
        curves["reference/kl_mean"] = k3(logprobs, reference)
        curves["reference/logprob_mean"] = reference
    return loss, lax.stop_gradient(_reduce(parts, curves, mask))


def sft_loss(logprobs: jax.Array, batch: Batch) -> jax.Array:
    """Cross-entropy -sum(token_weights * logprobs) of one micro-batch; add over micro-batches.

    Args:
        logprobs: [R, T] float32, of the targets.
        batch: packed rows of solutions.

    Returns:
        scalar.
    """
    return -jnp.sum(lax.stop_gradient(batch.token_weights) * _keep(logprobs, batch.loss_mask))


def _keep(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Values of loss tokens, 0 elsewhere, so that nothing (not even a NaN) leaks from padding."""
    return jnp.where(mask, values, jnp.zeros((), values.dtype))


def _constant(values: jax.Array, mask: jax.Array) -> jax.Array:
    return lax.stop_gradient(_keep(values, mask))


def _ratio_loss(
    logprobs: jax.Array, old: jax.Array, batch: Batch, settings: GrpoConfig
) -> TokenLoss:
    advantages = lax.stop_gradient(batch.advantages)
    low, high, dual = settings.clip_low, settings.clip_high, settings.dual_clip
    if settings.ratio == "ppo":
        return ppo_clip(logprobs, old, advantages, clip_low=low, clip_high=high, dual_clip=dual)
    if settings.ratio == "cispo":
        return cispo(logprobs, old, advantages, clip_low=low, clip_high=high)
    if settings.ratio == "reinforce":
        return reinforce(logprobs, old, advantages)
    if settings.ratio == "gspo":
        segments, mask = batch.segment_ids, batch.loss_mask
        return gspo(logprobs, old, advantages, segments, mask, clip_low=low, clip_high=high)
    assert_never(settings.ratio)


def _correction(
    learner: jax.Array, sampler: jax.Array, settings: GrpoConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weight of each token [R, T], and its curves."""
    cap = settings.correction_cap
    if settings.correction == "none":
        return jnp.ones_like(learner), {}
    if settings.correction == "truncated":
        weights, outside = truncated_weights(learner, sampler, cap=cap)
    elif settings.correction == "masked":
        weights, outside = masked_weights(learner, sampler, low=1.0 / cap, high=cap)
    else:
        assert_never(settings.correction)
    return weights, {
        "tis/weight_mean": weights,
        "tis/frac_clipped": outside.astype(jnp.float32),
    }


def _aggregate(
    losses: jax.Array,
    logprobs: jax.Array,
    entropy: jax.Array,
    reference: jax.Array | None,
    batch: Batch,
    settings: GrpoConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss and its parts, all scalars."""
    weights = lax.stop_gradient(batch.token_weights)
    loss = jnp.sum(weights * losses)
    parts = {"actor/pg_loss": loss}
    if reference is not None:
        kl = kl_estimate(logprobs, reference, settings.kl_estimator)
        parts["actor/kl_loss"] = jnp.sum(weights * kl)
        if settings.kl_weight != 0:
            loss = loss + settings.kl_weight * parts["actor/kl_loss"]
    if settings.entropy_weight != 0:
        loss = loss - settings.entropy_weight * jnp.sum(weights * entropy)
    return loss, parts | {"actor/loss": loss}


def _ratio_curves(
    logprobs: jax.Array, old: jax.Array, token_loss: TokenLoss
) -> dict[str, jax.Array]:
    """Values to average over loss tokens, by curve name. All [R, T].

    pg_clipfrac counts tokens at a clip bound (PPO, GSPO: no policy gradient; CISPO: a clipped
    weight), pg_clipfrac_lower those at the dual bound; both names as in verl.
    """
    low, high, dual = token_loss.clipped_low, token_loss.clipped_high, token_loss.clipped_dual
    return {
        "actor/logprob_mean": logprobs,
        "actor/ppo_kl": old - logprobs,
        "actor/ratio_mean": token_loss.ratio,
        "actor/pg_clipfrac": (low | high).astype(jnp.float32),
        "actor/pg_clipfrac_low": low.astype(jnp.float32),
        "actor/pg_clipfrac_high": high.astype(jnp.float32),
        "actor/pg_clipfrac_lower": dual.astype(jnp.float32),
    }


def _mismatch_curves(learner: jax.Array, sampler: jax.Array) -> dict[str, jax.Array]:
    """Learner against sampler on the tokens that the sampler drew. All [R, T].

    kl_mean (k1, may be negative) and k3_mean (never negative) both estimate KL(sampler || learner).
    """
    return {
        "mismatch/kl_mean": sampler - learner,
        "mismatch/k3_mean": k3(sampler, learner),
        "mismatch/logp_abs_diff_mean": jnp.abs(learner - sampler),
        "mismatch/prob_abs_diff_mean": jnp.abs(jnp.exp(learner) - jnp.exp(sampler)),
    }


def _importance_curves(logprobs: jax.Array, sampler: jax.Array) -> dict[str, jax.Array]:
    """Ratio policy / sampler and its square, from which the effective sample fraction follows."""
    weights = importance_weights(logprobs, sampler)
    return {"rl/importance_mean": weights, "rl/importance_square": jnp.square(weights)}


_MAXIMA = {
    "actor/ratio_mean": "actor/ratio_max",
    "mismatch/logp_abs_diff_mean": "mismatch/logp_abs_diff_max",
    "rl/importance_mean": "rl/importance_max",
}
"""Curves >= 0 whose maximum is kept as well, and that one's name."""


def _reduce(
    parts: dict[str, jax.Array], curves: dict[str, jax.Array], mask: jax.Array
) -> LossMetrics:
    return LossMetrics(
        num_loss_tokens=jnp.sum(mask, dtype=jnp.float32),
        weighted=parts,
        sums={name: jnp.sum(_keep(value, mask)) for name, value in curves.items()},
        maxima={new: jnp.max(_keep(curves[name], mask)) for name, new in _MAXIMA.items()},
    )
