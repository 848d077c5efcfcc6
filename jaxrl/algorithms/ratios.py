"""How the policy ratio enters the loss: one loss per token, and what the trust region held back.

ratio = exp(logprobs - old_logprobs), log-ratio clamped to +-20 (no gradient beyond); "old" is
whichever log-probability the caller puts into the denominator. The objective is maximised, so a
loss is its negative. R rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.algorithms.kl import MAX_LOG_RATIO

MAX_SEQUENCE_LOG_RATIO = 10.0
"""Clamp of GSPO's mean log-ratio per token, as in verl; far outside its clip range of 1e-3."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLoss:
    """Loss of each token and what was held back. All [R, T]."""

    losses: jax.Array  # float32
    ratio: jax.Array  # float32, without gradient
    clipped_low: jax.Array  # bool, the lower bound was in force
    clipped_high: jax.Array  # bool, the upper bound was in force
    clipped_dual: jax.Array  # bool, the dual bound was in force


def policy_ratio(logprobs: jax.Array, old_logprobs: jax.Array) -> jax.Array:
    """exp(logprobs - old_logprobs), the difference clamped to +-20. Any shape; carries gradient."""
    return jnp.exp(jnp.clip(logprobs - old_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def _clipped_surrogate(
    ratio: jax.Array,
    advantages: jax.Array,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> TokenLoss:
    """max(-A ratio, -A clip(ratio)), for A < 0 at most -A dual_clip; no gradient where bounded."""
    low, high = 1.0 - clip_low, 1.0 + clip_high
    clipped_low = (advantages < 0) & (ratio < low)
    clipped_high = (advantages > 0) & (ratio > high)
    clipped_dual = jnp.zeros(ratio.shape, bool)
    if dual_clip > 0:
        clipped_dual = (advantages < 0) & (ratio > dual_clip)
    bounded = jnp.where(clipped_low, low, jnp.where(clipped_high, high, ratio))
    bounded = jnp.where(clipped_dual, dual_clip, bounded)
    return TokenLoss(
        losses=-advantages * bounded,
        ratio=lax.stop_gradient(ratio),
        clipped_low=clipped_low,
        clipped_high=clipped_high,
        clipped_dual=clipped_dual,
    )


def ppo_clip(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> TokenLoss:
    """PPO's clipped surrogate, with separate bounds and a dual bound.

    arXiv:1707.06347 eq. 7; separate bounds arXiv:2503.14476 eq. 8; dual bound arXiv:1912.09729.
    No gradient where A > 0 and ratio > 1 + clip_high, A < 0 and ratio < 1 - clip_low, or A < 0 and
    ratio > dual_clip (0: off). At ratio 1 it is -A and its gradient is that of -A logprobs.

    Args:
        logprobs: [R, T] of the policy being trained.
        old_logprobs: [R, T], the ratio's denominator.
        advantages: [R, T].
        clip_low: the ratio is bounded below at 1 - clip_low.
        clip_high: the ratio is bounded above at 1 + clip_high.
        dual_clip: for A < 0 the loss is at most dual_clip |A|; 0 is off.
    """
    ratio = policy_ratio(logprobs, old_logprobs)
    return _clipped_surrogate(ratio, advantages, clip_low, clip_high, dual_clip)


def cispo(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
) -> TokenLoss:
    """-stop_gradient(clip(ratio, 1 - clip_low, 1 + clip_high)) A logprobs.

    MiniMax-M1 arXiv:2506.13585 section 3.1. Every token keeps a gradient. An absolute cap c, as in
    ScaleRL, is clip_high = c - 1 with clip_low = 1. Arguments as in ppo_clip.
    """
    ratio = lax.stop_gradient(policy_ratio(logprobs, old_logprobs))
    weights = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return TokenLoss(
        losses=-weights * advantages * logprobs,
        ratio=ratio,
        clipped_low=ratio < 1.0 - clip_low,
        clipped_high=ratio > 1.0 + clip_high,
        clipped_dual=jnp.zeros(ratio.shape, bool),
    )


def reinforce(logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array) -> TokenLoss:
    """-A logprobs: no ratio in the loss, only in the curves. Arguments as in ppo_clip."""
    never = jnp.zeros(logprobs.shape, bool)
    return TokenLoss(
        losses=-advantages * logprobs,
        ratio=lax.stop_gradient(policy_ratio(logprobs, old_logprobs)),
        clipped_low=never,
        clipped_high=never,
        clipped_dual=never,
    )


def segment_mean(
    values: jax.Array, segment_ids: jax.Array, mask: jax.Array, max_segments: int
) -> jax.Array:
    """Mean over each packed sequence's masked-in tokens, at every token of that sequence.

    Args:
        values: [R, T] float32.
        segment_ids: [R, T] int32, 0 padding, 1.. per sequence within its row.
        mask: [R, T] bool, tokens that count.
        max_segments: upper bound of segment_ids; T always suffices.

    Returns:
        [R, T]; 0 for a sequence without a masked-in token.
    """

    def row_sums(row: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(row, ids, num_segments=max_segments + 1)

    totals = jax.vmap(row_sums)(jnp.where(mask, values, 0.0), segment_ids)
    counts = jax.vmap(row_sums)(mask.astype(values.dtype), segment_ids)
    means = totals / jnp.maximum(counts, 1.0)
    return jnp.take_along_axis(means, segment_ids, axis=1)


def gspo(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    segment_ids: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    max_segments: int | None = None,
) -> TokenLoss:
    """Clipped surrogate of the sequence ratio exp(mean over tokens of the log-ratio).

    GSPO arXiv:2507.18071 section 4.1, written per token (GSPO-token, section 4.3): the value of the
    ratio is the sequence's, the gradient flows through the token's own log-probability; summed over
    a sequence with equal advantages both are the same. Meant for sequence_mean aggregation. The
    mean log-ratio is clamped to +-10. Further arguments as in ppo_clip and segment_mean.
    """
    size = logprobs.shape[1] if max_segments is None else max_segments
    mean = segment_mean(lax.stop_gradient(logprobs - old_logprobs), segment_ids, mask, size)
    mean = jnp.clip(mean, -MAX_SEQUENCE_LOG_RATIO, MAX_SEQUENCE_LOG_RATIO)
    ratio = jnp.exp(mean + logprobs - lax.stop_gradient(logprobs))
    return _clipped_surrogate(ratio, advantages, clip_low, clip_high, 0.0)
