"""Importance weights: bounds, no gradient, effective sample fraction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.algorithms.correction import (
    effective_sample_fraction,
    importance_weights,
    log_weights,
    masked_weights,
    off_policy_keep,
    sequence_keep,
    truncated_weights,
)

FLOAT32 = 1e-6  # relative, a few roundings of exp

LEARNER = jnp.log(jnp.array([[0.1, 0.5, 1.0, 2.0, 3.0]]))
SAMPLER = jnp.zeros((1, 5))

# Two sequences and padding; a token of the first is not the policy's.
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0]])
MASK = jnp.array([[True, False, True, True, True, False]])
DRIFT = jnp.array([[0.2, 9.0, 0.4, -0.1, 0.1, 9.0]])
ZEROS = jnp.zeros((1, 6))


def test_truncated_weights_are_the_ratio_up_to_the_cap():
    weights, outside = truncated_weights(LEARNER, cap=2.5)
    np.testing.assert_allclose(weights, [[0.1, 0.5, 1.0, 2.0, 2.5]], rtol=FLOAT32)
    np.testing.assert_array_equal(outside, [[False, False, False, False, True]])


def test_masked_weights_are_the_ratio_inside_and_zero_outside():
    weights, outside = masked_weights(LEARNER, low=0.4, high=2.5)
    np.testing.assert_allclose(weights, [[0.0, 0.5, 1.0, 2.0, 0.0]], rtol=FLOAT32)
    np.testing.assert_array_equal(outside, [[True, False, False, False, True]])


@pytest.mark.parametrize(
    "weights",
    [
        importance_weights,
        lambda a, b: truncated_weights(a - b, cap=2.0)[0],
        lambda a, b: masked_weights(a - b, low=0.4, high=2.5)[0],
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


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("token", [0.2, 9.0, 0.4, -0.1, 0.1, 9.0]),
        ("sequence", [0.6, 0.6, 0.6, 0.0, 0.0, 0.0]),
        ("geometric", [0.3, 0.3, 0.3, 0.0, 0.0, 0.0]),
    ],
)
def test_a_weight_is_the_tokens_the_completions_or_its_geometric_mean(level, expected):
    got = log_weights(DRIFT, ZEROS, SEGMENTS, MASK, level=level)
    np.testing.assert_allclose(got, [expected], atol=FLOAT32)


@pytest.mark.parametrize(
    ("kind", "high", "kept"),
    [
        ("geometric", 1.30, [False, True]),  # exp(0.3) = 1.35
        ("geometric", 1.40, [True, True]),
        ("product", 1.80, [False, True]),  # exp(0.6) = 1.82
        ("product", 1.85, [True, True]),
        ("outlier", 1.45, [False, True]),  # exp(0.4) = 1.49
        ("outlier", 1.10, [False, False]),  # exp(0.1) = 1.105
        ("outlier", 1.50, [True, True]),
    ],
)
def test_a_sequence_is_kept_or_left_out_as_a_whole(kind, high, kept):
    got = sequence_keep(DRIFT, ZEROS, SEGMENTS, MASK, kind=kind, low=0.5, high=high)
    np.testing.assert_array_equal(got[0, :5], np.repeat(kept, [3, 2]))


@pytest.mark.parametrize(
    ("advantage", "bound", "kept"), [(-1.0, 0.25, False), (-1.0, 0.35, True), (1.0, 0.25, True)]
)
def test_the_off_policy_mask_spares_positive_advantages(advantage, bound, kept):
    got = off_policy_keep(ZEROS, DRIFT, jnp.full((1, 6), advantage), SEGMENTS, MASK, bound=bound)
    np.testing.assert_array_equal(got[0, :5], np.repeat([kept, True], [3, 2]))
