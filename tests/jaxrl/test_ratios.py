"""Token losses: published values, where the gradient is zero, sequence ratios."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.algorithms.ratios import cispo, dppo, gspo, policy_ratio, ppo_clip, reinforce, sapo
from jaxrl.algorithms.segments import segment_mean

FLOAT32 = 3e-6  # relative, a few roundings of exp and log
DIGITS = 1e-5  # the reference values are given to five or six digits

RNG = np.random.default_rng(0)
LOGPROBS = jnp.asarray(-RNG.random((3, 7)), jnp.float32)
OLD = jnp.asarray(LOGPROBS + RNG.normal(0, 0.5, (3, 7)), jnp.float32)
ADVANTAGES = jnp.asarray(RNG.normal(0, 1, (3, 7)), jnp.float32)


def _row(values) -> jax.Array:
    return jnp.asarray([values], jnp.float32)


@pytest.mark.parametrize(
    ("advantage", "ratios", "expected"),
    [
        (1.0, [0.5, 1.0, 1.5, 4.0], [-0.5, -1.0, -1.28, -1.28]),
        (-1.0, [0.5, 1.0, 1.5, 4.0, 20.0], [0.8, 1.0, 1.5, 3.0, 3.0]),
    ],
)
def test_ppo_clip_gives_the_published_losses(advantage, ratios, expected):
    logprobs = jnp.log(_row(ratios))
    got = ppo_clip(
        logprobs,
        jnp.zeros(logprobs.shape),
        jnp.full(logprobs.shape, advantage),
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=3.0,
    )
    np.testing.assert_allclose(got.losses, [expected], rtol=FLOAT32)


@pytest.mark.parametrize(
    ("advantage", "ratio", "has_gradient", "flag"),
    [
        (1.0, 0.5, True, None),
        (1.0, 1.27, True, None),
        (1.0, 1.29, False, "clipped_high"),
        (-1.0, 0.79, False, "clipped_low"),
        (-1.0, 0.81, True, None),
        (-1.0, 2.9, True, None),
        (-1.0, 3.1, False, "clipped_dual"),
    ],
)
def test_ppo_clip_stops_the_gradient_exactly_where_it_says(advantage, ratio, has_gradient, flag):
    logprobs = jnp.log(_row([ratio]))

    def run(x):
        return ppo_clip(
            x, _row([0.0]), _row([advantage]), clip_low=0.2, clip_high=0.28, dual_clip=3.0
        )

    slope = float(jax.grad(lambda x: run(x).losses.sum())(logprobs)[0, 0])
    np.testing.assert_allclose(slope, -advantage * ratio * has_gradient, rtol=FLOAT32)
    for name in ("clipped_low", "clipped_high", "clipped_dual"):
        assert bool(getattr(run(logprobs), name)[0, 0]) == (name == flag)


@pytest.mark.parametrize("bound", [0.0, 0.2])
def test_ppo_clip_is_inactive_at_ratio_one(bound):
    def loss(x):
        return ppo_clip(x, LOGPROBS, ADVANTAGES, clip_low=bound, clip_high=bound, dual_clip=3.0)

    got = jax.grad(lambda x: loss(x).losses.sum())(LOGPROBS)
    expected = jax.grad(lambda x: reinforce(x, LOGPROBS, ADVANTAGES).losses.sum())(LOGPROBS)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(loss(LOGPROBS).losses, -ADVANTAGES)


def test_cispo_without_bounds_is_importance_weighted_reinforce():
    got = jax.grad(
        lambda x: cispo(x, OLD, ADVANTAGES, clip_low=1.0, clip_high=np.inf).losses.sum()
    )(LOGPROBS)
    weights = np.exp(np.asarray(LOGPROBS) - np.asarray(OLD))
    plain = jax.grad(lambda x: reinforce(x, OLD, ADVANTAGES).losses.sum())(LOGPROBS)
    np.testing.assert_allclose(got, weights * np.asarray(plain), rtol=FLOAT32)


def test_cispo_keeps_a_gradient_of_bounded_weight_on_every_token():
    got = jax.grad(lambda x: cispo(x, OLD, ADVANTAGES, clip_low=0.2, clip_high=0.2).losses.sum())(
        LOGPROBS
    )
    weights = np.clip(np.exp(np.asarray(LOGPROBS) - np.asarray(OLD)), 0.8, 1.2)
    np.testing.assert_allclose(got, -weights * np.asarray(ADVANTAGES), rtol=FLOAT32)
    assert (weights == np.float32(1.2)).any()


def test_gspo_has_the_published_sequence_ratio():
    logprobs, old = _row([-1.0, -2.0, -0.5]), _row([-1.2, -1.9, -0.5])
    ones = jnp.ones((1, 3), jnp.int32)
    got = gspo(logprobs, old, _row([1.0] * 3), ones, ones > 0, clip_low=0.2, clip_high=0.2)
    np.testing.assert_allclose(got.ratio, np.full((1, 3), 1.033895), atol=DIGITS)


def test_gspo_has_the_gradient_of_the_sequence_objective():
    """Two packed sequences and padding, against mean over sequences of min(s A, clip(s) A)."""
    segments = jnp.array([[1, 1, 1, 2, 2, 0]])
    mask = jnp.array([[False, True, True, True, True, False]])
    old = LOGPROBS[:1, :6] + 0.02
    advantages = _row([0.7, 0.7, 0.7, -0.4, -0.4, 0.0])
    weights = _row([0, 1 / 4, 1 / 4, 1 / 4, 1 / 4, 0])

    def ours(x):
        token = gspo(x, old, advantages, segments, mask, clip_low=0.1, clip_high=0.1)
        return jnp.sum(weights * token.losses)

    def paper(x):
        objective = 0.0
        for positions, advantage in ((slice(1, 3), 0.7), (slice(3, 5), -0.4)):
            s = jnp.exp(jnp.mean(x[0, positions] - old[0, positions]))
            objective += jnp.minimum(s * advantage, jnp.clip(s, 0.9, 1.1) * advantage) / 2
        return -objective

    x = LOGPROBS[:1, :6]
    np.testing.assert_allclose(ours(x), paper(x), rtol=FLOAT32)
    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(paper)(x), rtol=FLOAT32, atol=1e-8)


def test_segment_mean_sees_only_masked_in_tokens_of_its_own_sequence_and_row():
    values = jnp.array([[1.0, 2.0, 9.0, 4.0, jnp.nan], [10.0, 20.0, 30.0, 0.0, 0.0]])
    segments = jnp.array([[1, 1, 1, 2, 0], [1, 1, 2, 3, 0]])
    mask = jnp.array([[True, True, False, True, False], [True, True, True, False, False]])
    got = segment_mean(values, segments, mask, 5)
    np.testing.assert_allclose(got, [[1.5, 1.5, 1.5, 4.0, 0.0], [15.0, 15.0, 30.0, 0.0, 0.0]])


@pytest.mark.parametrize("difference", [1e3, -1e3])
def test_absurd_ratios_are_finite_and_without_gradient(difference):
    value, slope = jax.value_and_grad(lambda x: policy_ratio(x, jnp.float32(0)))(
        jnp.float32(difference)
    )
    assert np.isfinite(value)
    assert float(slope) == 0.0


def test_the_dual_clip_is_the_two_sided_clip():
    """INTELLECT-2: the unclipped branch has min(ratio, delta), delta > 1 + clip_high."""
    ratio = np.exp(np.asarray(LOGPROBS) - np.asarray(OLD)) * 2
    old = jnp.asarray(np.asarray(LOGPROBS) - np.log(ratio))
    a = np.asarray(ADVANTAGES)
    expected = -np.minimum(np.minimum(ratio, 2.0) * a, np.clip(ratio, 0.8, 1.2) * a)
    got = ppo_clip(LOGPROBS, old, ADVANTAGES, clip_low=0.2, clip_high=0.2, dual_clip=2.0)
    assert np.asarray(got.clipped_dual).any()
    np.testing.assert_allclose(got.losses, expected, rtol=FLOAT32)


def test_sapo_has_slope_one_at_ratio_one_and_fades_on_both_sides():
    def slope(x, advantage):
        return jax.grad(
            lambda y: sapo(
                y, _row([0.0]), _row([advantage]), tau_positive=1.0, tau_negative=2.0
            ).losses.sum()
        )(_row([x]))

    assert float(slope(0.0, 1.0)[0, 0]) == pytest.approx(-1.0)
    assert float(slope(0.0, -1.0)[0, 0]) == pytest.approx(1.0)
    assert abs(float(slope(2.5, 1.0)[0, 0])) < 0.1
    assert abs(float(slope(2.5, -1.0)[0, 0])) < abs(float(slope(2.5, 1.0)[0, 0]))


@pytest.mark.parametrize(
    ("advantage", "logprob", "held"),
    [
        (1.0, -0.3, True),
        (1.0, -2.0, False),
        (-1.0, -2.0, True),
        (-1.0, -0.3, False),
        (1.0, -0.9, False),
    ],
)
def test_dppo_holds_a_token_that_moved_far_in_the_direction_of_its_advantage(
    advantage, logprob, held
):
    got = dppo(_row([logprob]), _row([-1.0]), _row([advantage]), delta=0.2)
    assert bool((got.clipped_low | got.clipped_high)[0, 0]) == held
    expected = 0.0 if held else -advantage * np.exp(logprob + 1.0)
    np.testing.assert_allclose(got.losses, [[expected]], rtol=FLOAT32)


def test_gspo_takes_the_mean_advantage_of_the_sequence_and_gspo_token_each_tokens_own():
    segments = jnp.array([[1, 1, 1, 2, 2, 0]])
    mask = jnp.array([[False, True, True, True, True, False]])
    advantages = _row([9.0, 1.0, 0.0, -1.0, -3.0, 9.0])
    x, old = LOGPROBS[:1, :6], OLD[:1, :6]
    arguments = {"clip_low": 1.0, "clip_high": 9.0}
    whole = gspo(x, old, advantages, segments, mask, **arguments)
    own = gspo(x, old, advantages, segments, mask, per_token=True, **arguments)
    np.testing.assert_allclose(whole.losses / whole.ratio, -_row([0.5] * 3 + [-2.0] * 2 + [0.0]))
    np.testing.assert_allclose(own.losses / own.ratio, -advantages, rtol=FLOAT32)
