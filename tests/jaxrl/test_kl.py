"""KL estimators: values, derivatives, and which direction each one's gradient points in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.algorithms.kl import k1, k2, k3, kl_estimate

DIGITS = 1e-6  # the reference values are given to six digits
FLOAT32 = 2e-6  # sums of five float32 terms of size 1

LOGITS = jnp.array([0.3, -0.5, 1.2, 0.0, -1.0])
REFERENCE = jax.nn.log_softmax(jnp.array([0.1, 0.4, 0.9, -0.7, 0.2]))


@pytest.mark.parametrize(
    ("difference", "values", "k3_derivative"),
    [(0.5, (0.5, 0.125, 0.106531), 0.393469), (-0.5, (-0.5, 0.125, 0.148721), -0.648721)],
)
def test_values_and_derivatives_are_the_published_ones(difference, values, k3_derivative):
    d = jnp.float32(difference)
    got = [float(f(d, jnp.float32(0))) for f in (k1, k2, k3)]
    np.testing.assert_allclose(got, values, atol=DIGITS)
    slopes = [float(jax.grad(f)(d, jnp.float32(0))) for f in (k1, k2, k3)]
    np.testing.assert_allclose(slopes, (1.0, difference, k3_derivative), atol=DIGITS)


def _expected_loss_gradient(estimator) -> jax.Array:
    """Gradient of sum_a p_a estimator_a with the samples' distribution p fixed."""
    p = jax.nn.softmax(LOGITS)
    return jax.grad(
        lambda x: jnp.sum(jax.lax.stop_gradient(p) * estimator(jax.nn.log_softmax(x), REFERENCE))
    )(LOGITS)


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q))


def test_k2_as_a_loss_has_the_gradient_of_the_reverse_kl():
    expected = jax.grad(lambda x: _kl(jax.nn.log_softmax(x), REFERENCE))(LOGITS)
    np.testing.assert_allclose(_expected_loss_gradient(k2), expected, atol=FLOAT32)


def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl():
    expected = jax.grad(lambda x: _kl(REFERENCE, jax.nn.log_softmax(x)))(LOGITS)
    np.testing.assert_allclose(_expected_loss_gradient(k3), expected, atol=FLOAT32)


def test_k1_as_a_loss_has_no_expected_gradient():
    np.testing.assert_allclose(_expected_loss_gradient(k1), 0.0, atol=FLOAT32)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased(estimator):
    log_p = jax.nn.log_softmax(LOGITS)
    got = jnp.sum(jnp.exp(log_p) * estimator(log_p, REFERENCE))
    np.testing.assert_allclose(got, _kl(log_p, REFERENCE), atol=FLOAT32)


def test_k3_is_zero_at_equality_and_never_negative():
    d = jnp.linspace(-3.0, 3.0, 61)
    assert (np.asarray(k3(d, jnp.zeros(61))) >= 0).all()
    np.testing.assert_array_equal(k3(d, d), 0.0)


def test_k3_stays_finite_where_the_policy_gives_the_token_no_probability():
    value, slope = jax.value_and_grad(k3)(jnp.float32(-1e4), jnp.float32(0))
    assert np.isfinite(value)
    assert float(slope) == 0.0


@pytest.mark.parametrize(("name", "function"), [("k1", k1), ("k2", k2), ("k3", k3)])
def test_the_name_selects_the_estimator(name, function):
    got = kl_estimate(LOGITS, REFERENCE, name)
    np.testing.assert_array_equal(got, function(LOGITS, REFERENCE))
