"""Estimators of KL(policy || reference) from the sampled tokens.

Source: John Schulman, "Approximating KL divergence", joschu.net/blog/kl-approx.html. With
d = log policy - log reference of the sampled token. Value, on samples of the policy: k1 and k3 are
unbiased, k3 is never negative and varies less, k2 is biased. Gradient as a LOSS (samples fixed):
k1 gives none in expectation, k2 that of KL(policy || reference), k3 that of the other direction,
KL(reference || policy).
"""

from __future__ import annotations

from typing import Literal, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Estimator = Literal["k1", "k2", "k3", "k3_straight"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped here before exp: e^20 = 5e8 is outside any trust region, and finite."""


def k1(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """d. Any shape; may be negative per token."""
    return logprobs - reference_logprobs


def k2(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """d^2 / 2. Any shape."""
    return 0.5 * jnp.square(logprobs - reference_logprobs)


def k3(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """exp(-d) - 1 + d (arXiv:2402.03300 eq. 4); -d clamped above at 20, without gradient beyond."""
    minus_d = jnp.minimum(reference_logprobs - logprobs, MAX_LOG_RATIO)
    return jnp.expm1(minus_d) - minus_d


def k3_straight(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """The value of k3 with the gradient of k2, that of KL(policy || reference) (verl's k3+)."""
    gradient = k2(logprobs, reference_logprobs)
    return gradient + lax.stop_gradient(k3(logprobs, reference_logprobs) - gradient)


def kl_estimate(
    logprobs: jax.Array, reference_logprobs: jax.Array, estimator: Estimator
) -> jax.Array:
    """Per-token estimate by the named estimator. Any shape."""
    if estimator == "k1":
        return k1(logprobs, reference_logprobs)
    if estimator == "k2":
        return k2(logprobs, reference_logprobs)
    if estimator == "k3":
        return k3(logprobs, reference_logprobs)
    if estimator == "k3_straight":
        return k3_straight(logprobs, reference_logprobs)
    assert_never(estimator)


def host_kl(difference: np.ndarray, estimator: Estimator) -> np.ndarray:
    """The values of the estimators on the host, for a KL that stands in the reward.

    Args:
        difference: d, any shape, float64.
        estimator: k3_straight is k3: a reward has no gradient.
    """
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * np.square(difference)
    if estimator == "k3" or estimator == "k3_straight":
        minus_d = np.minimum(-difference, MAX_LOG_RATIO)
        return np.expm1(minus_d) - minus_d
    assert_never(estimator)


def kl_term(
    logprobs: jax.Array,
    reference_logprobs: jax.Array,
    estimator: Estimator,
    *,
    ratio: jax.Array | None = None,
    bound: float = 0.0,
    max_log_ratio: float = MAX_LOG_RATIO,
) -> jax.Array:
    """What the loss adds per token: the estimate, importance-weighted and bounded if asked for.

    Args:
        logprobs: of the policy being trained. Any shape.
        reference_logprobs: same shape.
        estimator: which one.
        ratio: policy / the policy that sampled, with gradient; multiplies the estimate, so that k3
            gets the gradient ratio * d of KL(policy || reference) (DeepSeek-V3.2, NeMo RL).
        bound: values are kept within +-bound (10 in verl); 0 is off.
        max_log_ratio: differences of log-probabilities are kept within +- this.

    Returns:
        same shape; no gradient at all where something was bounded.
    """
    raw = logprobs - reference_logprobs
    difference = jnp.clip(raw, -max_log_ratio, max_log_ratio)
    value = kl_estimate(reference_logprobs + difference, reference_logprobs, estimator)
    held = jnp.abs(raw) > max_log_ratio
    if bound > 0:
        held |= jnp.abs(value) > bound
        value = jnp.clip(value, -bound, bound)
    weighted = value if ratio is None else ratio * value
    return jnp.where(held, lax.stop_gradient(weighted), weighted)


def adapted_kl_weight(
    weight: float, kl: float, *, target: float, horizon: int, num_samples: int
) -> float:
    """Proportional controller of the KL weight (arXiv:1909.08593 section 2.2).

    weight * (1 + clip(kl / target - 1, -0.2, 0.2) * num_samples / horizon).

    Args:
        weight: in force while the samples were drawn.
        kl: their mean KL [nats, per completion if target is].
        target: wanted KL, > 0.
        horizon: samples.
        num_samples: of the batch.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return weight * (1.0 + error * num_samples / horizon)
