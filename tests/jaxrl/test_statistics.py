"""pass@k exactly, maj@k, intervals."""

import json
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from jaxrl.statistics import (
    majority_at_k,
    mean_pass_at_k,
    mean_with_bootstrap_interval,
    mean_with_normal_interval,
    pass_at_k,
)

EXACT = 1e-12  # float64 products of at most some hundred factors
SIX_DIGITS = 1e-6  # the reference values are given to six digits
COVERAGE_RUNS = 400


@pytest.fixture(scope="module")
def goldens(shared_data: Path) -> dict:
    return json.loads((shared_data / "goldens" / "passk_rliable.json").read_text())


def test_pass_at_k_is_the_exact_rational(goldens):
    assert len(goldens["estimator_grid"]) == 23
    for case in goldens["estimator_grid"]:
        got = pass_at_k(case["n"], case["c"], case["k"])
        np.testing.assert_allclose(got, float(Fraction(case["exact"])), rtol=EXACT, err_msg=case)


def test_pass_at_k_of_real_rollouts_is_the_published_mean(goldens):
    counts = np.array(list(goldens["real_rollouts"]["per_problem_correct_counts"].values()))
    correct = np.arange(8) < counts[:, None]
    for k, expected in goldens["real_rollouts"]["mean_pass_at_k"].items():
        np.testing.assert_allclose(mean_pass_at_k(correct, int(k)), expected, rtol=EXACT)


def test_the_readme_example_of_human_eval_is_one_half(goldens):
    expected = goldens["humaneval_example"]["expected"]["pass@1"]
    np.testing.assert_allclose(pass_at_k(6, 3, 1), expected, rtol=EXACT)


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(10, 3, 5, 0.916667), (128, 1, 128, 1), (16, 1, 4, 0.25), (4, 4, 2, 1), (4, 0, 2, 0)],
)
def test_pass_at_k_gives_the_published_values(n, c, k, expected):
    np.testing.assert_allclose(pass_at_k(n, c, k), expected, atol=SIX_DIGITS)


def test_pass_at_k_is_the_share_of_subsets_with_a_success():
    for c in range(7):
        hits = [any(i < c for i in subset) for subset in combinations(range(6), 3)]
        np.testing.assert_allclose(pass_at_k(6, c, 3), np.mean(hits), rtol=EXACT)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 2, 0), (4, 5, 2), (4, -1, 2)])
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(ValueError, match=r"pass@|cannot be correct"):
        pass_at_k(n, c, k)


def test_the_majority_of_all_samples_splits_ties():
    assert majority_at_k(["a", "a", "b"], [True, True, False], 3) == 1.0
    assert majority_at_k(["a", "b", "b"], [True, False, False], 3) == 0.0
    assert majority_at_k(["a", "b"], [True, False], 2) == 0.5
    assert majority_at_k(["a", "b", "c", "d"], [True, False, False, False], 4) == 0.25


def test_the_majority_of_one_sample_is_the_accuracy():
    answers, correct = ["a"] * 3 + ["b"] * 7, [True] * 3 + [False] * 7
    got = majority_at_k(answers, correct, 1, rng=np.random.default_rng(0), draws=4000)
    assert got == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / 4000))  # four standard errors


def test_the_majority_of_a_subset_is_drawn_without_replacement():
    answers, correct = ["a", "a", "b"], [True, True, False]
    got = majority_at_k(answers, correct, 2, rng=np.random.default_rng(0), draws=4000)
    expected = 1 / 3 + 2 / 3 * 0.5  # {a, a}, else a tie
    assert got == pytest.approx(expected, abs=4 * 0.25 / np.sqrt(4000))  # four standard errors


def test_a_subset_needs_a_random_stream():
    with pytest.raises(ValueError, match="give rng="):
        majority_at_k(["a", "b"], [True, False], 1)


def test_the_normal_interval_has_the_textbook_width():
    got = mean_with_normal_interval(np.array([0.0, 1.0, 1.0, 0.0]))
    assert got.mean == 0.5
    assert got.count == 4
    assert got.standard_error == pytest.approx(np.sqrt(1 / 3) / 2)
    assert got.high - got.mean == pytest.approx(1.959964 * got.standard_error)
    assert got.mean - got.low == pytest.approx(1.959964 * got.standard_error)


def test_one_value_has_no_spread():
    got = mean_with_normal_interval(np.array([0.7]))
    assert (got.low, got.mean, got.high, got.standard_error) == (0.7, 0.7, 0.7, 0.0)


@pytest.mark.parametrize(
    "interval",
    [
        mean_with_normal_interval,
        lambda v: mean_with_bootstrap_interval(v, rng=np.random.default_rng(1), draws=300),
    ],
    ids=["normal", "bootstrap"],
)
def test_intervals_cover_the_true_mean_about_as_often_as_they_say(interval):
    rng = np.random.default_rng(0)
    estimates = [interval(rng.normal(3.0, 1.0, 40)) for _ in range(COVERAGE_RUNS)]
    covered = np.mean([e.low <= 3.0 <= e.high for e in estimates])
    assert 0.91 < covered < 0.98  # 0.95 less the shortfall of 40 values, +- three standard errors


def test_the_bootstrap_is_reproducible_from_its_stream():
    values = np.random.default_rng(0).random(30)
    a, b = (mean_with_bootstrap_interval(values, rng=np.random.default_rng(4)) for _ in range(2))
    assert a == b


@pytest.mark.parametrize(("values", "confidence"), [([], 0.95), ([[1.0]], 0.95), ([1.0], 1.0)])
def test_unusable_values_are_refused(values, confidence):
    with pytest.raises(ValueError, match=r"values have shape|must lie in"):
        mean_with_normal_interval(np.array(values), confidence=confidence)
