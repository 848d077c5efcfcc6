"""Seconds from counts: the book's two bounds, and what a calibrated device should need. Standard
library only.

    lower    = max(flops / C, bytes / W, link / Wl)                      everything overlaps
    upper    =     flops / C + bytes / W + link / Wl                     nothing overlaps
    expected = call_s + dispatches * dispatch_s + launches * kernel_s    fixed times
             + collectives * link_latency_s
             + max(flops / (ec C), (bytes - streamed) / (em W))          matrix products
             + streamed / (em W) + link / (el Wl)                        passes that nothing hides

with C, W, Wl the peaks and ec, em, el the shares of them that programs reach. Source of the bounds:
scaling book (jax-ml.github.io/scaling-book), roofline chapter. `expected` sums the fixed times
because kernels of one program run one after another; the streamed term is the book's "B KV / W"
beside the max of the linear layers (inference chapter).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from roofline.hardware import Efficiency, Hardware
from roofline.phases import Phase, PhaseCost

Bound = Literal["compute", "memory", "link", "overhead"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Seconds that one call of a phase should take, and why. lower <= upper and lower <=
    expected always hold."""

    phase: Phase
    lower_s: float
    """Peaks only, perfect overlap: no program can be faster."""
    upper_s: float
    """Peaks only, no overlap; a real program is slower where fixed times or efficiencies matter."""
    expected_s: float
    """With efficiencies and fixed times."""
    bound: Bound
    """Largest term of `expected_s`."""
    compute_s: float
    """Matrix products at their efficiency [s]."""
    memory_s: float
    """Memory traffic at its efficiency [s]."""
    link_s: float
    """Traffic between devices at its efficiency [s]."""
    overhead_s: float
    """Fixed times of dispatches, kernels and collectives [s]."""


def predict(
    cost: PhaseCost, hardware: Hardware, efficiency: Efficiency | None = None
) -> Prediction:
    """Seconds of one call with this cost, when nothing else runs on the device.

    `efficiency`: instead of what the hardware knows of the phase.

    Raises:
        ValueError: the hardware has no peak for the cost's dtype.
    """
    share = hardware.efficiency_of(cost.phase) if efficiency is None else efficiency
    peak = hardware.peak(cost.dtype)
    compute_s = cost.flops / peak
    memory_s = cost.hbm_bytes / hardware.hbm_bytes_per_s
    link_s = cost.link_bytes / hardware.link_bytes_per_s
    kernel_s = hardware.kernel_s if share.kernel_s is None else share.kernel_s
    overhead_s = (
        share.call_s
        + cost.dispatches * hardware.dispatch_s
        + cost.launches * kernel_s
        + cost.collectives * hardware.link_latency_s
    )
    streamed_s = cost.streamed_bytes / hardware.hbm_bytes_per_s
    products_s = max(compute_s / share.compute, (memory_s - streamed_s) / share.memory)
    reached: dict[Bound, float] = {
        "compute": compute_s / share.compute,
        "memory": memory_s / share.memory,
        "link": link_s / share.link,
        "overhead": overhead_s,
    }
    return Prediction(
        phase=cost.phase,
        lower_s=max(compute_s, memory_s, link_s),
        upper_s=compute_s + memory_s + link_s,
        expected_s=overhead_s + products_s + streamed_s / share.memory + reached["link"],
        bound=max(reached, key=lambda term: reached[term]),
        compute_s=reached["compute"],
        memory_s=reached["memory"],
        link_s=reached["link"],
        overhead_s=overhead_s,
    )


def mfu(cost: PhaseCost, seconds: float, hardware: Hardware) -> float:
    """Flops of the cost over what the dense peak could do in that time."""
    return cost.flops / (seconds * hardware.peak(cost.dtype))


def mbu(cost: PhaseCost, seconds: float, hardware: Hardware) -> float:
    """Bytes of the cost over what the memory bandwidth could move in that time."""
    return cost.hbm_bytes / (seconds * hardware.hbm_bytes_per_s)


def stretched(alone_s: float, share: float, contention: float) -> float:
    """Seconds of a call that takes `alone_s` by itself, while others compute for `share` of its
    span.

    While another lane computes, this one advances 1 / contention seconds per second, so the span
    lasts M with alone = M (1 - share + share / contention). `share` is a fraction of the span
    itself, as measured; with k other lanes it may reach k, and the progress is then 1 / (1 + share
    (contention - 1)).
    """
    if share > 1:
        return alone_s * (1 + share * (contention - 1))
    return alone_s / (1 - share + share / contention)


@dataclass(frozen=True, kw_only=True, slots=True)
class Company:
    """For what shares of a call others were at work, each in [0, 1]."""

    lane: float = 0.0
    """The other device lane."""
    verifiers: float = 0.0
    """At least one verifier."""


def beside(alone_s: float, phase: Phase, company: Company, hardware: Hardware) -> float:
    """Seconds of a call that takes `alone_s` by itself, in this company. The two slow it independently."""
    lane_s = stretched(alone_s, company.lane, hardware.contention_of(phase))
    return stretched(lane_s, company.verifiers, hardware.verifier_contention.get(phase.value, 1.0))


LANES: Mapping[str, tuple[Phase, ...]] = {
    "rollout": (Phase.PREFILL, Phase.DECODE),
    "reward": (Phase.REWARD,),
    "learner": (Phase.SCORE, Phase.REFERENCE, Phase.TRAIN, Phase.OPTIMIZER, Phase.PUBLISH),
}
"""Which lane does which phase of a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepComparison:
    """Seconds of one optimizer step, in lockstep and overlapped."""

    sync_s: float
    """Phases one after another."""
    async_s: float
    """Lanes side by side, in steady state."""
    lanes_s: Mapping[str, float]
    """Time each lane needs for its part of a step, alone."""
    winner: Literal["sync", "async"]
    speedup: float
    """sync_s / async_s; below 1 the lockstep is faster."""


def compare_step(
    phase_s: Mapping[Phase, float],
    hardware: Hardware,
    *,
    waiting_s: Mapping[Phase, float] | None = None,
) -> StepComparison:
    """Step time in lockstep and overlapped, from each phase's seconds per step when it runs alone.

    `waiting_s` is the part of a phase that holds no core (a slow verifier's latency); it overlaps
    for free. While k lanes compute, each runs 1 + (k - 1)(contention - 1) times slower: with
    contention 1 the asynchronous step is the longest lane, with contention 2 (one set of cores) it
    is the sum of the busy times.

    Raises:
        ValueError: a phase belongs to no lane, or waits longer than it takes.
    """
    waiting = dict(waiting_s or {})
    lane_of = {phase: lane for lane, phases in LANES.items() for phase in phases}
    lanes, busy = dict.fromkeys(LANES, 0.0), dict.fromkeys(LANES, 0.0)
    for phase, seconds in phase_s.items():
        if phase not in lane_of:
            raise ValueError(
                f"phase {phase} is not part of a step; give some of {', '.join(lane_of)}"
            )
        idle = waiting.get(phase, 0.0)
        if not 0 <= idle <= seconds:
            raise ValueError(
                f"phase {phase} takes {seconds} s but waits {idle} s of it; "
                f"waiting must lie in [0, {seconds}]"
            )
        lanes[lane_of[phase]] += seconds
        busy[lane_of[phase]] += seconds - idle
    sync_s = sum(lanes.values())
    async_s = max(_overlapped(list(busy.values()), hardware.contention), *lanes.values())
    return StepComparison(
        sync_s=sync_s,
        async_s=async_s,
        lanes_s=lanes,
        winner="async" if async_s < sync_s else "sync",
        speedup=sync_s / async_s if async_s > 0 else 1.0,
    )


def _overlapped(busy_s: list[float], contention: float) -> float:
    """Time until all lanes are done that start together: sum over the k-th longest of slope(k)
    * its extra time."""
    total, previous = 0.0, 0.0
    for done, seconds in enumerate(sorted(busy_s)):
        running = len(busy_s) - done
        total += (seconds - previous) * (1 + (running - 1) * (contention - 1))
        previous = seconds
    return total


if __name__ == "__main__":
    from roofline.what_if import main

    main()
