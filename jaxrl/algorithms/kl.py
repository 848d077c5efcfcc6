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


def kl_estimate(
    logprobs: jax.Array, reference_logprobs: jax.Array, estimator: Literal["k1", "k2", "k3"]
) -> jax.Array:
    """Per-token estimate by the named estimator. Any shape."""
    if estimator == "k1":
        return k1(logprobs, reference_logprobs)
    if estimator == "k2":
        return k2(logprobs, reference_logprobs)
    if estimator == "k3":
        return k3(logprobs, reference_logprobs)
    assert_never(estimator)
