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
from jaxrl.algorithms.segments import segment_mean

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

    arXiv:1707.06347 eq. 7; separate bounds arXiv:2503.14476 eq. 8; dual bound arXiv:1912.09729,
    which for dual_clip > 1 + clip_high is INTELLECT-2's two-sided clip (arXiv:2505.07291).
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
    ScaleRL and TRL, is clip_high = c - 1 with clip_low = 1; that is also PipelineRL's importance-
    weighted REINFORCE (arXiv:2509.19128 eq. 5). Arguments as in ppo_clip.
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
    return _unclipped(-advantages * logprobs, policy_ratio(logprobs, old_logprobs))


def sapo(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    *,
    tau_positive: float,
    tau_negative: float,
) -> TokenLoss:
    """-A sigmoid(tau (ratio - 1)) 4 / tau: a soft gate in place of clipping.

    SAPO arXiv:2511.20347; slope 1 in the ratio at 1, falling to 0 on both sides, faster for
    negative advantages (tau_negative > tau_positive). Further arguments as in ppo_clip.
    """
    ratio = policy_ratio(logprobs, old_logprobs)
    tau = jnp.where(advantages > 0, tau_positive, tau_negative).astype(ratio.dtype)
    return _unclipped(-advantages * jax.nn.sigmoid(tau * (ratio - 1.0)) * 4.0 / tau, ratio)


def dppo(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, *, delta: float
) -> TokenLoss:
    """-A ratio, 0 for tokens whose probability already moved by more than delta in A's direction.

    DPPO (binary total variation, as in SkyRL and prime-rl): the trust region bounds
    |policy - old| of the token instead of their ratio, so that rare tokens may move by large
    factors. Further arguments as in ppo_clip.
    """
    ratio = policy_ratio(logprobs, old_logprobs)
    moved = lax.stop_gradient(jnp.exp(logprobs) - jnp.exp(old_logprobs))
    clipped_high = (advantages > 0) & (moved > delta)
    clipped_low = (advantages < 0) & (moved < -delta)
    return TokenLoss(
        losses=jnp.where(clipped_low | clipped_high, 0.0, -advantages * ratio),
        ratio=lax.stop_gradient(ratio),
        clipped_low=clipped_low,
        clipped_high=clipped_high,
        clipped_dual=jnp.zeros(ratio.shape, bool),
    )


def _unclipped(losses: jax.Array, ratio: jax.Array) -> TokenLoss:
    never = jnp.zeros(losses.shape, bool)
    return TokenLoss(
        losses=losses,
        ratio=lax.stop_gradient(ratio),
        clipped_low=never,
        clipped_high=never,
        clipped_dual=never,
    )


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
    per_token: bool = False,
) -> TokenLoss:
    """Clipped surrogate of the sequence ratio exp(mean over tokens of the log-ratio).

    GSPO arXiv:2507.18071 section 4.1, written per token: the value of the ratio is the sequence's, the
    gradient flows through the token's own log-probability, and the advantage is the mean over the
    sequence's tokens. per_token is GSPO-token (section 4.3): each token keeps its own advantage, and is
    clipped by it; with equal advantages both are the same. Meant for sequence_mean aggregation. The
    mean log-ratio is clamped to +-10. Further arguments as in ppo_clip and segment_mean.
    """
    size = logprobs.shape[1] if max_segments is None else max_segments
    mean = segment_mean(lax.stop_gradient(logprobs - old_logprobs), segment_ids, mask, size)
    mean = jnp.clip(mean, -MAX_SEQUENCE_LOG_RATIO, MAX_SEQUENCE_LOG_RATIO)
    ratio = jnp.exp(mean + logprobs - lax.stop_gradient(logprobs))
    if not per_token:
        advantages = segment_mean(advantages, segment_ids, mask, size)
    return _clipped_surrogate(ratio, advantages, clip_low, clip_high, 0.0)
