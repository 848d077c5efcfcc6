"""Step time and staleness of a pipeline in closed form, checked against `roofline.events`. Standard
library only.

Per optimizer step of P * G samples, with r the generators' time at full slots, g the time until the
slowest of P groups is done when all start together, l the learner's time (scoring, training,
optimizer, publication) and S the staleness bound:

    synchronous    T = g + l
    asynchronous   T = max(r, l, (g + l) / (S + 1))   on devices of their own
    continuum      T* = (a + b) / n                   a, b: least device seconds of each lane, n devices

Where the lanes share what they compute on, each runs c times slower while the other computes (c = 2:
they take turns, as when colocated). A lane that always has work then delays the other: the larger of
r + (c - 1) l (generation binds) or l + (c - 1) min(g, l) (the learner binds, and decodes the tail of
every cohort at full price), and (c - 1) min(g, l) + (g + l) / (S + 1).
Staleness by Little's law: a group is consumed at the first batch after its end, so (latency + l) / r
publications lie in between on average where generation binds, and S where it does not. g of random
lengths: the expected longest completion, and where slots are reused the rest dealt evenly before it.
Staleness bounds of the field: arXiv:2505.24298 (AReaL), in-flight weights: arXiv:2509.19128 (PipelineRL).
"""

from __future__ import annotations


def closed_step_s(
    steady_s: float, lockstep_s: float, learner_s: float, max_staleness: int,
    *, verify_s: float = 0.0, contention: float = 1.0,
) -> float:  # fmt: skip
    """Seconds per step from this module's head: r, g (verification apart), l, S and c.

    `verify_s`: time of the verifiers for a step, all of them at work.
    """
    latency = lockstep_s + verify_s + learner_s
    if max_staleness == 0:
        return latency
    taken = (contention - 1) * min(lockstep_s, learner_s)
    learner_binds = steady_s < learner_s
    lanes = (learner_s, taken) if learner_binds else (steady_s, (contention - 1) * learner_s)
    return max(sum(lanes), taken + latency / (max_staleness + 1), verify_s)


def expected_staleness(
    steady_s: float, latency_s: float, learner_s: float, step_s: float, max_staleness: int,
    *, contention: float = 1.0,
) -> float:  # fmt: skip
    """Mean versions between birth and consumption: Little's law where generation binds, else S.

    `latency_s`: mean time of a group from birth to verdict if nothing else computed. Counted on
    the generators' own clock, on which a step takes r whatever the contention.
    """
    binding_s = steady_s + (contention - 1) * learner_s
    if steady_s < learner_s or step_s > binding_s * (1 + 1e-9):
        return max_staleness
    return min(max_staleness, (latency_s + learner_s) / steady_s)
