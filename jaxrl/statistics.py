"""Statistics of evaluations: pass@k, maj@k, means with their uncertainty. P problems, n samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k samples is correct.

    1 - C(n - c, k) / C(n, k) (arXiv:2107.03374 eq. 1), computed as the shorter of
    1 - prod_{i = n-c+1..n} (1 - k / i) and 1 - prod_{i = n-k+1..n} (1 - c / i), which are equal.

    Args:
        num_samples: n.
        num_correct: c, 0..n.
        k: 1..n.

    Raises:
        ValueError: k or c is out of range.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(
            f"pass@{k} needs 1 <= k <= samples={num_samples}; draw at least {k} samples"
        )
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"{num_correct} of {num_samples} samples cannot be correct")
    if num_samples - num_correct < k:
        return 1.0
    few, many = sorted((num_correct, k))
    i = np.arange(num_samples - few + 1, num_samples + 1, dtype=np.float64)
    return float(1.0 - np.prod(1.0 - many / i))


def mean_pass_at_k(correct: np.ndarray, k: int) -> float:
    """pass@k averaged over problems, each with the same weight.

    Args:
        correct: [P, n] bool.
        k: 1..n.
    """
    n = correct.shape[1]
    return float(np.mean([pass_at_k(n, int(c), k) for c in correct.sum(axis=1)]))


def majority_at_k(
    answers: Sequence[Hashable],
    correct: Sequence[bool],
    k: int,
    *,
    rng: np.random.Generator | None = None,
    draws: int = 1000,
) -> float:
    """Probability that the most frequent of k answers to one problem is correct; ties are drawn.

    k = n is exact (share of correct answers among the tied ones). k < n averages over random
    subsets of k samples without replacement.

    Args:
        answers: [n] extracted answers, in the form in which equal ones compare equal.
        correct: [n] verdict of each answer; equal answers have equal verdicts.
        k: 1..n.
        rng: needed for k < n.
        draws: subsets for k < n.

    Raises:
        ValueError: k is out of range, or rng is missing.
    """
    n = len(answers)
    if not 1 <= k <= n or len(correct) != n:
        raise ValueError(
            f"maj@{k} needs 1 <= k <= samples={n}, and a verdict ({len(correct)}) each"
        )
    verdict = dict(zip(answers, map(float, correct), strict=True))

    def vote(indices: Sequence[int]) -> float:
        votes = Counter(answers[i] for i in indices)
        top = max(votes.values())
        winners = [verdict[answer] for answer, count in votes.items() if count == top]
        return sum(winners) / len(winners)

    if k == n:
        return vote(range(n))
    if rng is None:
        raise ValueError(
            f"maj@{k} of {n} samples draws subsets: give rng=np.random.default_rng(seed)"
        )
    return float(
        np.mean([vote(rng.choice(n, size=k, replace=False).tolist()) for _ in range(draws)])
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean and how well it is known."""

    mean: float
    low: float
    """Lower end of the confidence interval."""
    high: float
    """Upper end of the confidence interval."""
    standard_error: float
    """Sample standard deviation / sqrt(count); 0 for one value."""
    count: int


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def mean_with_normal_interval(values: np.ndarray, *, confidence: float = 0.95) -> Estimate:
    """Mean +- z * standard error. Honest from some 30 independent values (one per problem) on.

    Args:
        values: [N], N >= 1, independent: average the samples of one problem first.
        confidence: share of intervals that cover the mean, in (0, 1).
    """
    values = _checked(values, confidence)
    error, mean = _standard_error(values), float(values.mean())
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    return Estimate(
        mean=mean,
        low=mean - z * error,
        high=mean + z * error,
        standard_error=error,
        count=len(values),
    )


def mean_with_bootstrap_interval(
    values: np.ndarray, *, rng: np.random.Generator, confidence: float = 0.95, draws: int = 2000
) -> Estimate:
    """Mean with a percentile bootstrap interval over the N values (resampled with replacement).

    Arguments as in mean_with_normal_interval; draws = number of resamples.
    """
    values = _checked(values, confidence)
    means = values[rng.integers(len(values), size=(draws, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Estimate(
        mean=float(values.mean()),
        low=float(low),
        high=float(high),
        standard_error=_standard_error(values),
        count=len(values),
    )


def _checked(values: np.ndarray, confidence: float) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"values have shape {values.shape}; give [N] with at least one value")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie in (0, 1); usual: 0.95")
    return values
