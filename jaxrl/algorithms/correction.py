"""Importance weights learner / sampler on each token; they carry no gradient.

The sampler is another program at another precision, possibly with older weights. The weight
w = learner / sampler multiplies the policy loss after clipping. Only for ratios whose denominator
is the learner: with the sampler in the denominator the ratio already is this weight.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.algorithms.kl import MAX_LOG_RATIO


def importance_weights(learner_logprobs: jax.Array, sampler_logprobs: jax.Array) -> jax.Array:
    """exp(learner - sampler), log-ratio clamped to +-20, without gradient. Any shape."""
    log_weights = jnp.clip(learner_logprobs - sampler_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return lax.stop_gradient(jnp.exp(log_weights))


def truncated_weights(
    learner_logprobs: jax.Array, sampler_logprobs: jax.Array, *, cap: float, floor: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Truncated importance sampling (TIS, fengyao.notion.site/off-policy-rl): w in [floor, cap].

    Returns:
        (weights, where w was outside): same shape as the inputs, float32 and bool.
    """
    weights = importance_weights(learner_logprobs, sampler_logprobs)
    return jnp.clip(weights, floor, cap), (weights > cap) | (weights < floor)


def masked_weights(
    learner_logprobs: jax.Array, sampler_logprobs: jax.Array, *, low: float, high: float
) -> tuple[jax.Array, jax.Array]:
    """Masked importance sampling (MIS, IcePop): w inside [low, high], 0 outside.

    A masked token stays in the denominators of the aggregation.

    Returns:
        (weights, where w was outside): same shape as the inputs, float32 and bool.
    """
    weights = importance_weights(learner_logprobs, sampler_logprobs)
    outside = (weights < low) | (weights > high)
    return jnp.where(outside, 0.0, weights), outside


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
