"""A step's seconds as a sum of named parts, and what a few measured steps of a stack say about them.
Standard library only.

The same kernels take different times under different frameworks, so a stack (a framework, its
kernels, its launch overheads) is described by a few factors on the parts of the operator sum. Eight
measured steps do not determine them alone: each factor keeps to 1, the operator tables' own answer,
by a normal prior on its logarithm:

    minimise  sum over steps  huber(log(sum_p f_p part_p) - log(measured)) / s^2
            + sum over factors  (log f / spread_f)^2

by Gauss-Newton (iteratively reweighted: single steps that ran into something unmodelled, such as
the memory limit, do not bend the rest).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

RESIDUAL = 0.08
"""Log error that a calibrated step is expected to keep, s above."""
HUBER = 1.5
"""Residuals beyond so many s count linearly."""
ITERATIONS, LARGEST_STEP, CONVERGED = 60, 0.5, 1e-7
QUANTILE_95 = 1.6449
"""Standard normal: 5 and 95 % of the mass lie below -QUANTILE_95 and +QUANTILE_95."""
SPREAD_PRIOR_STEPS, SPREAD_PRIOR = 4, 0.10
"""The spread after calibration counts as if so many more steps had shown that log error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Seconds of one step: the operator sum by part, and the book's two bounds."""

    parts: Mapping[str, float]
    """Seconds by name; they add up."""
    lower_s: float
    """Datasheet peaks, everything overlaps: max(flops / C, bytes / W, link / Wl)."""
    upper_s: float
    """Datasheet peaks, nothing overlaps: their sum. Real steps exceed it by fixed times."""
    flops: float
    """Model flops of one device: no recomputation, causal attention counted half."""
    math_s: float
    """`flops` at the dense peak."""
    spread: float
    """Standard deviation of log(measured / expected)."""

    @property
    def expected_s(self) -> float:
        """Sum of the parts [s]."""
        return sum(self.parts.values())

    @property
    def interval_s(self) -> tuple[float, float]:
        """Between these lie nine of ten measured steps, if log errors are normal [s]."""
        factor = math.exp(QUANTILE_95 * self.spread)
        return self.expected_s / factor, self.expected_s * factor

    @property
    def bound(self) -> str:
        """Name of the largest part."""
        return max(self.parts, key=lambda name: self.parts[name])


@dataclass(frozen=True, kw_only=True, slots=True)
class Factor:
    """One unknown of a stack: what it multiplies and how far from 1 it may be."""

    name: str
    parts: frozenset[str]
    spread: float
    """Standard deviation of its logarithm before any measurement."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StackFit:
    """Factors of one stack, from measured steps of it."""

    factors: Mapping[str, float]
    """By name of the `Factor`; 1 is the operator tables' answer."""
    part_factors: Mapping[str, float]
    """Product of the factors that apply, by part."""
    spread: float
    steps: int
    """How many measured steps it rests on."""

    def apply(self, estimate: Estimate) -> Estimate:
        """The estimate under this stack; the bounds stay, and nothing is predicted below lower."""
        parts = {name: s * self.part_factors.get(name, 1.0) for name, s in estimate.parts.items()}
        return replace(estimate, parts=parts, spread=self.spread)


def fit_stack(
    estimates: Sequence[Estimate], measured_s: Sequence[float], factors: Sequence[Factor]
) -> StackFit:
    """Factors that explain the measured steps, starting from and held to 1.

    Raises:
        ValueError: no steps, or as many times as estimates are not given.
    """
    if not estimates or len(estimates) != len(measured_s):
        raise ValueError(
            f"{len(estimates)} estimates and {len(measured_s)} measured times; give one time for "
            "each estimate and at least one"
        )
    logs = [0.0] * len(factors)
    for _ in range(ITERATIONS):
        change = _gauss_newton(logs, estimates, measured_s, factors)
        logs = [
            x + max(-LARGEST_STEP, min(LARGEST_STEP, d)) for x, d in zip(logs, change, strict=True)
        ]
        if max(abs(d) for d in change) < CONVERGED:
            break
    by_part = _part_factors(logs, factors)
    errors = [
        math.log(_total(estimate, by_part) / seconds)
        for estimate, seconds in zip(estimates, measured_s, strict=True)
    ]
    known = sum(e * e for e in errors) + SPREAD_PRIOR_STEPS * SPREAD_PRIOR**2
    return StackFit(
        factors={f.name: math.exp(x) for f, x in zip(factors, logs, strict=True)},
        part_factors=by_part,
        spread=math.sqrt(known / (len(errors) + SPREAD_PRIOR_STEPS)),
        steps=len(errors),
    )


def _part_factors(logs: Sequence[float], factors: Sequence[Factor]) -> dict[str, float]:
    by_part: dict[str, float] = {}
    for factor, log in zip(factors, logs, strict=True):
        for part in factor.parts:
            by_part[part] = by_part.get(part, 1.0) * math.exp(log)
    return by_part


def _total(estimate: Estimate, by_part: Mapping[str, float]) -> float:
    return sum(seconds * by_part.get(name, 1.0) for name, seconds in estimate.parts.items())


def _gauss_newton(
    logs: Sequence[float],
    estimates: Sequence[Estimate],
    measured_s: Sequence[float],
    factors: Sequence[Factor],
) -> list[float]:
    """Step towards the minimum: (J'WJ + P) d = -(J'Wr + P x)."""
    count = len(factors)
    matrix = [[0.0] * count for _ in range(count)]
    right = [0.0] * count
    by_part = _part_factors(logs, factors)
    for estimate, seconds in zip(estimates, measured_s, strict=True):
        total = _total(estimate, by_part)
        error = math.log(total / seconds)
        weight = min(1.0, HUBER * RESIDUAL / max(abs(error), 1e-12)) / RESIDUAL**2
        slopes = [
            sum(estimate.parts.get(part, 0.0) * by_part[part] for part in f.parts) / total
            for f in factors
        ]
        for i in range(count):
            right[i] -= weight * slopes[i] * error
            for j in range(count):
                matrix[i][j] += weight * slopes[i] * slopes[j]
    for i, factor in enumerate(factors):
        matrix[i][i] += 1 / factor.spread**2
        right[i] -= logs[i] / factor.spread**2
    return _solve(matrix, right)


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination with partial pivoting; the prior makes the matrix positive definite."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for below in rows[i + 1 :]:
            share = below[i] / rows[i][i]
            for column in range(i, size + 1):
                below[column] -= share * rows[i][column]
    solution = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][j] * solution[j] for j in range(i + 1, size))
        solution[i] = (rows[i][size] - known) / rows[i][i]
    return solution
