"""Importance weights learner / sampler and what they mask; they carry no gradient.

The sampler is another program at another precision, possibly with older weights. The weight
w = learner / sampler multiplies the policy loss after clipping. Only for ratios whose denominator
is the learner: with the sampler in the denominator the ratio already is this weight. Whatever is
masked stays in the denominators of the aggregation, unless correction_denominator=kept takes it out
before they are made (jaxrl.learner.prepare). R rows, T tokens.
"""

from __future__ import annotations

from typing import Literal, assert_never

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.algorithms.kl import MAX_LOG_RATIO
from jaxrl.algorithms.segments import segment_mean, segment_sum

Level = Literal["token", "sequence", "geometric"]
SequenceMask = Literal["geometric", "product", "outlier"]


def importance_weights(learner_logprobs: jax.Array, sampler_logprobs: jax.Array) -> jax.Array:
    """exp(learner - sampler), log-ratio clamped to +-20, without gradient. Any shape."""
    return _exp(learner_logprobs - sampler_logprobs)


def _exp(log_weights: jax.Array) -> jax.Array:
    return lax.stop_gradient(jnp.exp(jnp.clip(log_weights, -MAX_LOG_RATIO, MAX_LOG_RATIO)))


def log_weights(
    learner_logprobs: jax.Array,
    sampler_logprobs: jax.Array,
    segment_ids: jax.Array,
    mask: jax.Array,
    *,
    level: Level,
) -> jax.Array:
    """Logarithm of the weight of every token: its own, its sequence's, or that one per token.

    token: low variance, a bias that grows with length squared; sequence: the product over the
    completion, unbiased, whose variance explodes with length (a drift of 1 % per token is a factor
    of 20,000 after 1000); geometric: exp of the mean, to mask by rather than to weight by.

    Args:
        learner_logprobs: [R, T].
        sampler_logprobs: [R, T].
        segment_ids: [R, T] int32.
        mask: [R, T] bool, tokens that count.
        level: which weight.

    Returns:
        [R, T], the same on all tokens of a sequence unless level is token.
    """
    difference = learner_logprobs - sampler_logprobs
    if level == "token":
        return difference
    if level == "sequence":
        return segment_sum(difference, segment_ids, mask, difference.shape[1])
    if level == "geometric":
        return segment_mean(difference, segment_ids, mask, difference.shape[1])
    assert_never(level)


def truncated_weights(
    log_weights: jax.Array, *, cap: float, floor: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Truncated importance sampling (TIS, fengyao.notion.site/off-policy-rl): w in [floor, cap].

    Returns:
        (weights, where w was outside): shape of log_weights, float32 and bool.
    """
    weights = _exp(log_weights)
    return jnp.clip(weights, floor, cap), (weights > cap) | (weights < floor)


def masked_weights(
    log_weights: jax.Array, *, low: float, high: float
) -> tuple[jax.Array, jax.Array]:
    """Masked importance sampling (MIS, IcePop): w inside [low, high], 0 outside.

    Returns:
        (weights, where w was outside): shape of log_weights, float32 and bool.
    """
    weights = _exp(log_weights)
    outside = (weights < low) | (weights > high)
    return jnp.where(outside, 0.0, weights), outside


def sequence_keep(
    learner_logprobs: jax.Array,
    sampler_logprobs: jax.Array,
    segment_ids: jax.Array,
    mask: jax.Array,
    *,
    kind: SequenceMask,
    low: float,
    high: float,
) -> jax.Array:
    """Sequences whose learner / sampler lies within [low, high]; the others get no policy gradient.

    geometric: the geometric mean over the completion's tokens (verl, bounds 0.999 and 1.001);
    product: the product over them (verl, TRL); outlier: every single token's ratio (SkyRL, bounds
    1e-4 and 100). Arguments as in `log_weights`.

    Returns:
        [R, T] bool, the same on all tokens of a sequence.
    """
    difference = learner_logprobs - sampler_logprobs
    if kind == "outlier":
        weights = _exp(difference)
        outside = ((weights < low) | (weights > high)).astype(difference.dtype)
        return segment_sum(outside, segment_ids, mask, outside.shape[1]) == 0
    level: Level = "geometric" if kind == "geometric" else "sequence"
    weights = _exp(log_weights(learner_logprobs, sampler_logprobs, segment_ids, mask, level=level))
    return (weights >= low) & (weights <= high)


def off_policy_keep(
    logprobs: jax.Array,
    sampler_logprobs: jax.Array,
    advantages: jax.Array,
    segment_ids: jax.Array,
    mask: jax.Array,
    *,
    bound: float,
) -> jax.Array:
    """False on sequences with A < 0 that the present policy would hardly sample (DeepSeek-V3.2).

    Those with mean over tokens of log sampler - log policy above `bound`; a sequence's advantage is
    its tokens' mean. All [R, T].

    Returns:
        [R, T] bool, the same on all tokens of a sequence.
    """
    size = logprobs.shape[1]
    away = segment_mean(lax.stop_gradient(sampler_logprobs - logprobs), segment_ids, mask, size)
    return ~((segment_mean(advantages, segment_ids, mask, size) < 0) & (away > bound))


def effective_sample_fraction(total: float, total_of_squares: float, count: float) -> float:
    """(sum w)^2 / (N sum w^2): 1 if the N weights are equal, 1/N if one of them is all.

    Args:
        total: sum of the weights.
        total_of_squares: sum of their squares.
        count: N.

    Returns:
        in [0, 1]; 0 if there is no weight.
    """
    denominator = count * total_of_squares
    return min(1.0, total * total / denominator) if denominator > 0 else 0.0
