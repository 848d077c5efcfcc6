"""Advantages: published values, sums, zero groups, scales."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxrl.algorithms.advantages import (
    gae,
    group_advantages,
    high_entropy_mask,
    selected_samples,
    whiten,
    zero_variance,
)

PAPER_ATOL = 1e-3  # the reference values are given to four digits
ROUNDING = 1e-9  # float64 sums of a few rewards of size 100

MAGISTRAL = np.array([[1.0, 0.1, 0.1, 0.1], [1.0, 1.0, 0.1, 0.0]])

rewards_of_groups = arrays(
    np.float64,
    st.tuples(st.integers(1, 5), st.integers(2, 6)),
    elements=st.floats(-100, 100, width=32),
)
deterministic = settings(deadline=None, derandomize=True, max_examples=60)


@pytest.mark.parametrize(
    ("scale", "baseline", "ddof", "expected"),
    [
        ("group_std", "mean", 1, [1.499997, -0.499999, -0.499999, -0.499999]),
        ("group_std", "mean", 0, [1.732047, -0.577349, -0.577349, -0.577349]),
        ("none", "mean", 1, [0.75, -0.25, -0.25, -0.25]),
        ("none", "leave_one_out", 1, [1.0, -1 / 3, -1 / 3, -1 / 3]),
    ],
)
def test_one_success_in_four_gives_the_published_advantages(scale, baseline, ddof, expected):
    got = group_advantages(
        np.array([[1.0, 0, 0, 0]]), baseline=baseline, scale=scale, eps=1e-6, ddof=ddof
    )
    np.testing.assert_allclose(got, [expected], atol=1e-6)


def test_batch_std_gives_magistrals_values():
    got = group_advantages(MAGISTRAL, scale="batch_std", ddof=0, eps=0.0)
    expected = [[1.551, -0.517, -0.517, -0.517], [1.092, 1.092, -0.977, -1.206]]
    np.testing.assert_allclose(got, expected, atol=PAPER_ATOL)


@pytest.mark.parametrize(("ddof", "std"), [(0, 0.435172), (1, 0.465219)])
def test_batch_std_divides_by_the_stated_count(ddof, std):
    plain = group_advantages(MAGISTRAL, scale="none")
    scaled = group_advantages(MAGISTRAL, scale="batch_std", ddof=ddof, eps=0.0)
    np.testing.assert_allclose(plain / scaled, std, atol=1e-6)


def test_groups_without_signal_do_not_enter_the_batch_std():
    padded = np.concatenate([MAGISTRAL, np.ones((5, 4)), np.zeros((3, 4))])
    got = group_advantages(padded, scale="batch_std")
    np.testing.assert_array_equal(got[:2], group_advantages(MAGISTRAL, scale="batch_std"))
    np.testing.assert_array_equal(got[2:], 0.0)


def test_the_rewards_of_all_groups_may_give_the_spread():
    rewards = np.array([[1.0, 0, 0, 0], [1, 1, 1, 1]])
    got = group_advantages(rewards, scale="batch_reward_std", ddof=0, eps=0.0)
    np.testing.assert_allclose(got[0] * rewards.std(), [0.75, -0.25, -0.25, -0.25], atol=1e-12)
    np.testing.assert_array_equal(got[1], 0.0)


@pytest.mark.parametrize("scale", ["group_std", "batch_std", "batch_reward_std", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_equal_rewards_give_exactly_zero(scale, baseline):
    rewards = np.array([[0.1] * 3, [0.7] * 3, [1e8] * 3])  # 0.1 * 3 / 3 != 0.1 in floating point
    got = group_advantages(rewards, baseline=baseline, scale=scale)
    assert (got == 0).all()
    assert zero_variance(rewards).all()


def test_a_group_of_one_carries_no_signal():
    assert (group_advantages(np.array([[3.0], [4.0]]), baseline="leave_one_out") == 0).all()


@pytest.mark.parametrize("scale", ["group_std", "batch_std", "batch_reward_std", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@deterministic
@given(rewards=rewards_of_groups)
def test_advantages_of_a_group_sum_to_zero(rewards, scale, baseline):
    got = group_advantages(rewards, baseline=baseline, scale=scale)
    size = np.abs(got).max(initial=1.0)
    np.testing.assert_allclose(got.sum(axis=1) / size, 0.0, atol=ROUNDING)


@deterministic
@given(rewards=rewards_of_groups)
def test_better_samples_of_a_group_never_get_a_smaller_advantage(rewards):
    got = group_advantages(rewards)
    order = np.argsort(rewards, axis=1)
    assert (np.diff(np.take_along_axis(got, order, axis=1), axis=1) >= 0).all()


@deterministic
@given(rewards=rewards_of_groups)
def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others(rewards):
    size = rewards.shape[1]
    others = (rewards.sum(axis=1, keepdims=True) - rewards) / (size - 1)
    got = group_advantages(rewards, baseline="leave_one_out", scale="none")
    np.testing.assert_allclose(got, rewards - others, atol=ROUNDING * 100)


def test_a_reward_that_is_not_finite_is_refused_with_its_group():
    with pytest.raises(ValueError, match=r"groups \[1\] are not finite"):
        group_advantages(np.array([[0.0, 1.0], [np.nan, 1.0]]))


def test_rewards_without_a_group_dimension_are_refused():
    with pytest.raises(ValueError, match="samples per prompt"):
        group_advantages(np.array([0.0, 1.0]))


def test_without_a_baseline_the_advantage_is_the_reward():
    rewards = np.array([[1.0, 1.0], [0.0, 1.0]])
    got = group_advantages(rewards, baseline="none", scale="none")
    np.testing.assert_array_equal(got, rewards)


def test_the_group_mean_as_scale_makes_rare_successes_weigh_more():
    got = group_advantages(np.array([[1.0, 0, 0, 0], [1.0, 1, 1, 0]]), scale="group_mean")
    np.testing.assert_allclose(got, [[3.0, -1, -1, -1], [1 / 3, 1 / 3, 1 / 3, -1]])


@pytest.mark.parametrize(
    ("gae_lambda", "advantages", "returns"),
    [(1.0, [0.8, 0.5, 0.3], [1.0, 1.0, 1.0]), (0.95, [0.76075, 0.485, 0.3], [0.96075, 0.985, 1.0])],
)
def test_generalised_advantages_are_the_published_ones(gae_lambda, advantages, returns):
    values = np.array([0.2, 0.5, 0.7, 0.0])
    got = gae(np.array([0.0, 0, 1]), values, np.ones(3), gae_lambda)
    np.testing.assert_allclose(got, advantages, rtol=ROUNDING)
    np.testing.assert_allclose(got + values[:-1], returns, rtol=ROUNDING)


def test_whitening_ignores_what_is_masked_out():
    mask = np.array([True, True, False, True])
    got = whiten(np.array([1.0, 2.0, 1e9, 3.0]), mask)
    np.testing.assert_allclose(got[mask], [-1, 0, 1], atol=1e-7)


def test_the_best_sample_of_a_group_is_its_first_best():
    rewards = np.array([[0.0, 1, 1], [0, 0, 0]])
    got = selected_samples(rewards, rewards > 0, "best")
    np.testing.assert_array_equal(got, [[False, True, False], [True, False, False]])
    np.testing.assert_array_equal(selected_samples(rewards, rewards > 0, "correct"), rewards > 0)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 1.0])
def test_the_share_of_high_entropy_tokens_is_kept(share):
    entropy = np.random.default_rng(0).random((10, 100))
    mask = np.arange(100)[None] < np.arange(10, 110, 10)[:, None]
    kept = high_entropy_mask(entropy, mask, share)
    assert not (kept & ~mask).any()
    assert kept.sum() == pytest.approx(share * mask.sum(), abs=1)
    assert entropy[kept].min() >= entropy[mask & ~kept].max(initial=0.0)
