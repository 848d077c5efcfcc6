"""Importance weights: bounds, no gradient, effective sample fraction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.algorithms.correction import (
    effective_sample_fraction,
    importance_weights,
    masked_weights,
    truncated_weights,
)

FLOAT32 = 1e-6  # relative, a few roundings of exp

LEARNER = jnp.log(jnp.array([[0.1, 0.5, 1.0, 2.0, 3.0]]))
SAMPLER = jnp.zeros((1, 5))


def test_truncated_weights_are_the_ratio_up_to_the_cap():
    weights, outside = truncated_weights(LEARNER, SAMPLER, cap=2.5)
    np.testing.assert_allclose(weights, [[0.1, 0.5, 1.0, 2.0, 2.5]], rtol=FLOAT32)
    np.testing.assert_array_equal(outside, [[False, False, False, False, True]])


def test_masked_weights_are_the_ratio_inside_and_zero_outside():
    weights, outside = masked_weights(LEARNER, SAMPLER, low=0.4, high=2.5)
    np.testing.assert_allclose(weights, [[0.0, 0.5, 1.0, 2.0, 0.0]], rtol=FLOAT32)
    np.testing.assert_array_equal(outside, [[True, False, False, False, True]])


@pytest.mark.parametrize(
    "weights",
    [
        importance_weights,
        lambda a, b: truncated_weights(a, b, cap=2.0)[0],
        lambda a, b: masked_weights(a, b, low=0.4, high=2.5)[0],
    ],
)
def test_weights_carry_no_gradient(weights):
    gradients = jax.grad(lambda a, b: jnp.sum(weights(a, b)), argnums=(0, 1))(LEARNER, SAMPLER)
    assert not np.any(gradients[0])
    assert not np.any(gradients[1])


def test_weights_are_finite_however_far_apart_the_programs_are():
    weights = importance_weights(jnp.array([0.0, -1e4]), jnp.array([-1e4, 0.0]))
    assert np.isfinite(weights).all()


def test_effective_sample_fraction_is_one_for_equal_weights_and_one_nth_for_a_single_one():
    assert effective_sample_fraction(8 * 3.0, 8 * 9.0, 8) == 1.0
    assert effective_sample_fraction(3.0, 9.0, 8) == 1 / 8
    assert effective_sample_fraction(0.0, 0.0, 0) == 0.0
