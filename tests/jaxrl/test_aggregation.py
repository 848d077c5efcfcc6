"""Token weights: denominators by hand, invariants."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.algorithms.aggregation import token_weights

MODES = ["token_mean", "sequence_mean", "prompt_mean", "constant", "constant_sum", "sequence_sum"]
COUNTS = np.array([2, 4, 0, 6, 3])
GROUPS = np.array([7, 7, 7, 3, 3])
ROUNDING = 1e-12  # float64

batches = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=8)
deterministic = settings(deadline=None, derandomize=True, max_examples=60)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_mean", [1 / 15, 1 / 15, 0, 1 / 15, 1 / 15]),
        ("sequence_mean", [1 / 8, 1 / 16, 0, 1 / 24, 1 / 12]),
        ("prompt_mean", [1 / 12, 1 / 12, 0, 1 / 18, 1 / 18]),
        ("constant", [1 / 40, 1 / 40, 0, 1 / 40, 1 / 40]),
        ("constant_sum", [1 / 10, 1 / 10, 0, 1 / 10, 1 / 10]),
        ("sequence_sum", [1 / 4, 1 / 4, 0, 1 / 4, 1 / 4]),
    ],
)
def test_weights_are_the_stated_denominators(mode, expected):
    got = token_weights(COUNTS, GROUPS, mode=mode, constant=10)
    np.testing.assert_allclose(got, expected, rtol=ROUNDING)


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean", "prompt_mean"])
@deterministic
@given(batch=batches)
def test_means_have_weights_that_sum_to_one(mode, batch):
    counts, groups = np.array(batch).T
    total = (token_weights(counts, groups, mode=mode) * counts).sum()
    np.testing.assert_allclose(total, float(counts.any()), rtol=ROUNDING)


@pytest.mark.parametrize("mode", MODES)
@deterministic
@given(batch=batches, seed=st.integers(0, 99))
def test_weights_follow_their_sequence_through_a_permutation(mode, batch, seed):
    counts, groups = np.array(batch).T
    order = np.random.default_rng(seed).permutation(len(counts))
    expected = token_weights(counts, groups, mode=mode)[order]
    got = token_weights(counts[order], groups[order], mode=mode)
    np.testing.assert_allclose(got, expected, rtol=ROUNDING)


@pytest.mark.parametrize("mode", ["sequence_mean", "prompt_mean"])
def test_equal_lengths_make_every_mean_the_token_mean(mode):
    counts, groups = np.full(6, 5), np.array([0, 0, 1, 1, 2, 2])
    expected = token_weights(counts, groups, mode="token_mean")
    got = token_weights(counts, groups, mode=mode)
    np.testing.assert_allclose(got, expected, rtol=ROUNDING)


def test_equal_lengths_of_the_constant_make_constant_the_token_mean():
    counts, groups = np.full(6, 5), np.zeros(6)
    expected = token_weights(counts, groups, mode="token_mean")
    got = token_weights(counts, groups, mode="constant", constant=5)
    np.testing.assert_allclose(got, expected, rtol=ROUNDING)


@pytest.mark.parametrize("mode", MODES)
def test_sequences_without_loss_leave_the_others_as_they_were(mode):
    counts, groups = np.array([3, 1, 2]), np.array([0, 0, 1])
    alone = token_weights(counts, groups, mode=mode, constant=4)
    beside = token_weights(
        np.append(counts, [0, 0]), np.append(groups, [1, 9]), mode=mode, constant=4
    )
    np.testing.assert_array_equal(beside, np.append(alone, [0, 0]))


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_loss_tokens_has_zero_weights(mode):
    assert (token_weights(np.zeros(3), np.arange(3), mode=mode) == 0).all()


@pytest.mark.parametrize(
    ("mode", "expected"), [("sequence_mean", 1 / 10), ("prompt_mean", 1 / 12), ("constant", 1 / 50)]
)
def test_empty_sequences_may_count_in_the_denominator(mode, expected):
    """Five sequences, one of them empty."""
    got = token_weights(COUNTS, GROUPS, mode=mode, constant=10, count_empty=True)
    np.testing.assert_allclose(got[0], expected, rtol=ROUNDING)
    assert got[2] == 0


def test_a_constant_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="constant=0 must be positive"):
        token_weights(COUNTS, GROUPS, mode="constant", constant=0)


def test_a_group_per_sequence_is_required():
    with pytest.raises(ValueError, match="must be"):
        token_weights(COUNTS, GROUPS[:2], mode="prompt_mean")
