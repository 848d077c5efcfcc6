"""Shares of the peaks from a few measured calls. Standard library only.

Four numbers per phase explain a measured time (see `roofline.predict`): the shares of the compute
peak, of the memory bandwidth and of the link, and the fixed time per kernel. They are chosen to
minimise

    sum over shapes (log predicted - log measured)^2 + PRIOR_WEIGHT * (log of each number / its
    prior)^2

where the priors are the machine's micro-benchmarks: a few shapes that scale alike cannot tell the
numbers apart, and what they leave open stays at the prior. Source of the form: three
parameters per operator cut the error of a pure roofline from 29-34 % to 7-9 % on measured GPU
matrix products.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from roofline.hardware import Efficiency, Hardware
from roofline.phases import Phase, PhaseCost
from roofline.predict import predict

PRIOR_WEIGHT = 0.003
"""Against squared log errors: a prior missed by a factor 2.7 weighs as much as a 5 % error."""
SMALLEST_SHARE, SMALLEST_KERNEL_S, LARGEST_KERNEL_S = 1e-3, 1e-8, 1e-3
SWEEPS, FIRST_STEP, LAST_STEP = 200, 1.0, 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One measured call."""

    name: str
    """Phase and shape, for the report of held-out errors."""
    cost: PhaseCost
    measured_s: float


def fit_phase(samples: Sequence[Sample], hardware: Hardware, prior: Efficiency) -> Efficiency:
    """Efficiency of one phase from its samples, by coordinate descent on the logarithms.

    Raises:
        ValueError: no samples, or samples of different phases.
    """
    phases = {sample.cost.phase for sample in samples}
    if len(phases) != 1:
        raise ValueError(f"a fit needs samples of one phase, got {sorted(phases) or 'none'}")
    kernel_s = hardware.kernel_s if prior.kernel_s is None else prior.kernel_s
    centre = [
        math.log(x)
        for x in (prior.compute, prior.memory, prior.link, max(kernel_s, SMALLEST_KERNEL_S))
    ]
    lowest = [math.log(x) for x in (*[SMALLEST_SHARE] * 3, SMALLEST_KERNEL_S)]
    highest = [0.0, 0.0, 0.0, math.log(LARGEST_KERNEL_S)]

    def shares(point: Sequence[float]) -> Efficiency:
        compute, memory, link, kernel_s = (math.exp(x) for x in point)
        return Efficiency(compute=compute, memory=memory, link=link, kernel_s=kernel_s)

    def loss(point: Sequence[float]) -> float:
        error = sum(log_error(sample, hardware, shares(point)) ** 2 for sample in samples)
        return error + PRIOR_WEIGHT * sum((x - c) ** 2 for x, c in zip(point, centre, strict=True))

    best, step = list(centre), FIRST_STEP
    best_loss = loss(best)
    for _ in range(SWEEPS):
        improved = False
        for i in range(len(best)):
            for move in (step, -step):
                trial = list(best)
                trial[i] = min(highest[i], max(lowest[i], trial[i] + move))
                if (trial_loss := loss(trial)) < best_loss:
                    best, best_loss, improved = trial, trial_loss, True
        if not improved:
            step /= 2
        if step < LAST_STEP:
            break
    return shares(best)


def log_error(sample: Sample, hardware: Hardware, efficiency: Efficiency) -> float:
    """Logarithm of predicted over measured."""
    phase = {sample.cost.phase.value: efficiency}
    there = dataclasses.replace(hardware, phase_efficiency=phase)
    return math.log(predict(sample.cost, there).expected_s / sample.measured_s)


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
