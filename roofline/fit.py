"""Shares of the peaks from a few measured calls.

Five numbers per phase explain a measured time (see `roofline.predict`): the shares of the compute
peak, of the memory bandwidth and of the link, and the fixed times per kernel and per call; two more
how much the other lane and the verifiers slow it. They are chosen to minimise

    sum over shapes (log predicted - log measured)^2 + PRIOR_WEIGHT * (log of each number / its
    prior)^2

where the priors are the machine's micro-benchmarks: a few shapes that scale alike cannot tell the
numbers apart, and what they leave open stays at the prior. Source of the form: three
parameters per operator cut the error of a pure roofline from 29-34 % to 7-9 % on measured GPU
matrix products.

`fit_all` is for programs timed alone, `fit_lanes` for the spans of a run's own lanes, which were
beside each other for a part of the time: it takes the former's answer for its prior.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.optimize import least_squares

from roofline.analyse import companies
from roofline.hardware import Efficiency, Hardware
from roofline.phases import Phase, PhaseCost
from roofline.predict import Company, predict, stretched
from roofline.read_run import Span

PRIOR_WEIGHT, CALL_PRIOR_WEIGHT, COMPANY_PRIOR_WEIGHT = 0.003, 0.0003, 0.1
"""Against squared log errors: a prior missed by a factor 2.7 weighs as much as a 5 % error; of the time per
call, whose prior is a bare dispatch, as much as a 2 % error; of what others slow, which a phase that always
meets the same company cannot tell from its own speed, as much as a 30 % error."""
SMALLEST_SHARE, SMALLEST_KERNEL_S, LARGEST_KERNEL_S = 1e-3, 1e-8, 1e-3
SMALLEST_CALL_S, LARGEST_CALL_S = 1e-8, 10.0
MOST_CONTENTION, MOST_BESIDE_VERIFIERS = 3.0, 2.0
"""Two lanes on the same cores leave each other half, and Python's lock and cold caches add to that; verifiers
take one core of two."""
SHARE_STEP = 0.2
"""Calls of equal work are taken together where others were at work for about as much of them."""


ALONE = Company()


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Measured calls of equal work."""

    name: str
    """Phase and shape, for the report of held-out errors."""
    cost: PhaseCost
    measured_s: float
    company: Company = ALONE
    """Who else was at work."""
    weight: float = 1.0


def fit_phase(samples: Sequence[Sample], hardware: Hardware, prior: Efficiency) -> Efficiency:
    """Efficiency of one phase from its samples.

    Raises:
        ValueError: no samples, or samples of different phases.
    """
    return _fit(samples, hardware, prior).efficiency


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fitted:
    efficiency: Efficiency
    contention: float
    beside_verifiers: float


def _fit(samples: Sequence[Sample], hardware: Hardware, prior: Efficiency) -> _Fitted:
    """One phase by least squares on the logarithms; what no sample says stays at the prior."""
    phases = {sample.cost.phase for sample in samples}
    if len(phases) != 1:
        raise ValueError(f"a fit needs samples of one phase, got {sorted(phases) or 'none'}")
    kernel_s = hardware.kernel_s if prior.kernel_s is None else prior.kernel_s
    contention = hardware.contention_of(phases.pop())
    smallest = (*[SMALLEST_SHARE] * 3, SMALLEST_KERNEL_S, SMALLEST_CALL_S, 1.0, 1.0)
    largest = (
        1.0, 1.0, 1.0, LARGEST_KERNEL_S, LARGEST_CALL_S, MOST_CONTENTION, MOST_BESIDE_VERIFIERS,
    )  # fmt: skip
    first = (
        prior.compute, prior.memory, prior.link, kernel_s, max(prior.call_s, hardware.dispatch_s),
        contention, 1.0,
    )  # fmt: skip
    lowest, highest = ([math.log(x) for x in ends] for ends in (smallest, largest))
    centre = [
        math.log(min(high, max(low, x)))
        for x, low, high in zip(first, smallest, largest, strict=True)
    ]

    pull_weights = [math.sqrt(PRIOR_WEIGHT)] * len(centre)
    pull_weights[4:] = map(math.sqrt, (CALL_PRIOR_WEIGHT, *[COMPANY_PRIOR_WEIGHT] * 2))

    def numbers(point: Sequence[float]) -> _Fitted:
        compute, memory, link, kernel_s, call_s, contention, beside_verifiers = map(math.exp, point)
        efficiency = Efficiency(
            compute=min(1.0, compute), memory=min(1.0, memory), link=min(1.0, link),
            kernel_s=kernel_s, call_s=call_s,
        )  # fmt: skip
        return _Fitted(
            efficiency=efficiency, contention=contention, beside_verifiers=beside_verifiers
        )

    def residuals(point: Sequence[float]) -> list[float]:
        trial = numbers(point)
        errors = [math.sqrt(s.weight) * _log_error(s, hardware, trial) for s in samples]
        pulls = zip(point, centre, pull_weights, strict=True)
        return errors + [weight * (x - c) for x, c, weight in pulls]

    return numbers(least_squares(residuals, centre, bounds=(lowest, highest)).x)


def _log_error(sample: Sample, hardware: Hardware, trial: _Fitted) -> float:
    """Logarithm of predicted over measured."""
    alone_s = predict(sample.cost, hardware, trial.efficiency).expected_s
    seconds = stretched(alone_s, sample.company.lane, trial.contention)
    seconds = stretched(seconds, sample.company.verifiers, trial.beside_verifiers)
    return math.log(seconds / sample.measured_s)


def fit_lanes(spans: Sequence[Span], hardware: Hardware) -> Hardware:
    """The hardware with shares, times per call and contention of every phase that the spans hold.

    Phases without a span keep what they had. The contention of phases in general becomes the
    geometric mean of the phases', each by its time.
    """
    groups: dict[tuple[PhaseCost, int, int], list[tuple[float, Company]]] = {}
    for span, company in zip(spans, companies(spans), strict=True):
        if span.cost is not None and span.duration_s > 0:
            shares = round(company.lane / SHARE_STEP), round(company.verifiers / SHARE_STEP)
            groups.setdefault((span.cost, *shares), []).append((span.duration_s, company))
    fitted, seconds = dict(hardware.phase_efficiency), {}
    slower, verified = {}, {}
    for phase in dict.fromkeys(key[0].phase for key in groups):
        own = {key: calls for key, calls in groups.items() if key[0].phase == phase}
        samples = _samples(own)
        found = _fit(samples, hardware, hardware.efficiency_of(phase))
        fitted[phase.value] = found.efficiency
        if any(sample.company.lane > SHARE_STEP for sample in samples):
            slower[phase.value] = found.contention
            seconds[phase.value] = sum(s for calls in own.values() for s, _ in calls)
        if any(sample.company.verifiers > SHARE_STEP for sample in samples):
            verified[phase.value] = found.beside_verifiers
    in_all = sum(seconds.values())
    mean = sum(seconds[name] * math.log(slower[name]) for name in slower)
    usual = statistics.median(verified.values()) if verified else 1.0
    return dataclasses.replace(
        hardware,
        phase_efficiency=fitted,
        phase_contention=slower,
        verifier_contention={name: verified.get(name, usual) for name in slower | verified},
        contention=math.exp(mean / in_all) if in_all else hardware.contention,
    )


def _samples(
    groups: Mapping[tuple[PhaseCost, int, int], Sequence[tuple[float, Company]]],
) -> list[Sample]:
    """One sample for each group of like calls of a phase: their median, in their mean company. The
    scatter of a median falls with the root of their number, its part that the model misses does not."""
    return [
        Sample(
            name=cost.phase.value,
            cost=cost,
            measured_s=statistics.median(seconds for seconds, _ in calls),
            company=Company(
                lane=statistics.fmean(company.lane for _, company in calls),
                verifiers=statistics.fmean(company.verifiers for _, company in calls),
            ),
            weight=math.sqrt(len(calls)),
        )
        for (cost, *_), calls in groups.items()
    ]


LIKE = ((Phase.SCORE, Phase.PREFILL), (Phase.REFERENCE, Phase.SCORE))
"""Phases that take over another one's fit when they were not measured: they run the same layers."""


def fit_all(samples: Sequence[Sample], hardware: Hardware) -> dict[str, Efficiency]:
    """Efficiency by phase of all measured phases, and of those that are like them."""
    fitted: dict[str, Efficiency] = {}
    for phase in dict.fromkeys(sample.cost.phase for sample in samples):
        own = [sample for sample in samples if sample.cost.phase == phase]
        fitted[phase.value] = fit_phase(own, hardware, hardware.efficiency)
    for phase, model in LIKE:
        if phase.value not in fitted and model.value in fitted:
            fitted[phase.value] = fitted[model.value]
    return fitted


def held_out_ratios(samples: Sequence[Sample], hardware: Hardware) -> dict[str, float]:
    """Predicted over measured of calls that were not fitted, by name."""
    return {
        sample.name: predict(sample.cost, hardware).expected_s / sample.measured_s
        for sample in samples
    }
