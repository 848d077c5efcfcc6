"""KL estimators: values, derivatives, and which direction each one's gradient points in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.algorithms.kl import adapted_kl_weight, k1, k2, k3, k3_straight, kl_estimate, kl_term

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


@pytest.mark.parametrize(
    ("name", "function"), [("k1", k1), ("k2", k2), ("k3", k3), ("k3_straight", k3_straight)]
)
def test_the_name_selects_the_estimator(name, function):
    got = kl_estimate(LOGITS, REFERENCE, name)
    np.testing.assert_array_equal(got, function(LOGITS, REFERENCE))


def test_k3_straight_has_the_value_of_k3_and_the_gradient_of_k2():
    np.testing.assert_allclose(k3_straight(LOGITS, REFERENCE), k3(LOGITS, REFERENCE), atol=FLOAT32)
    got = jax.grad(lambda x: k3_straight(x, REFERENCE).sum())(LOGITS)
    np.testing.assert_array_equal(got, jax.grad(lambda x: k2(x, REFERENCE).sum())(LOGITS))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_importance_weighting_makes_the_gradient_that_of_the_reverse_kl(estimator):
    """Samples of another policy q, ratio p / q: the expected gradient is that of KL(p || reference)."""
    q = jax.nn.softmax(jnp.array([0.1, 0.2, -0.3, 0.4, 0.0]))

    def loss(x):
        log_p = jax.nn.log_softmax(x)
        ratio = jnp.exp(log_p) / q
        return jnp.sum(q * kl_term(log_p, REFERENCE, estimator, ratio=ratio))

    expected = jax.grad(lambda x: _kl(jax.nn.log_softmax(x), REFERENCE))(LOGITS)
    np.testing.assert_allclose(jax.grad(loss)(LOGITS), expected, atol=FLOAT32)


def test_a_bounded_value_has_no_gradient():
    value, slope = jax.value_and_grad(
        lambda x: kl_term(x, jnp.float32(0), "k1", ratio=jnp.exp(x), bound=2.0)
    )(jnp.float32(3.0))
    np.testing.assert_allclose(value, 2.0 * np.exp(3.0), rtol=FLOAT32)
    assert float(slope) == 0.0


def test_the_controller_moves_the_weight_towards_the_target_by_at_most_a_fifth():
    def adapted(kl):
        return adapted_kl_weight(0.1, kl, target=2.0, horizon=100, num_samples=100)

    assert adapted(2.0) == pytest.approx(0.1)
    assert adapted(2.2) == pytest.approx(0.11)
    assert adapted(50.0) == pytest.approx(0.12)
    assert adapted(-1.0) == pytest.approx(0.08)
