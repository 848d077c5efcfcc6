"""The pipeline of a run, simulated event by event.

    rollout lane   admit prompts, decode one chunk over all slots          events: end of a chunk
    verifiers      first come, first served                                events: a group is verified
    learner lane   take P groups, score and train, publish                 events: trained, published

Four ways to couple the lanes:
    synchronous   tickets for P groups; the next P only after the weights are published
    one-step-off  P groups are sampled while the P before them train; both meet at the publication
    asynchronous  (S + 1) P tickets; a sample has one version, so slots run dry before a swap
    in-flight     (S + 1) P tickets; weights change between two chunks (what jaxrl does)
with S the staleness bound. Tickets, and which groups may leave first, follow `jaxrl.buffer`. All slots
advance chunk by chunk on one clock, as one jitted program drives them; so an event is a chunk of all
slots, and the work of a simulation grows with chunks and completions, not with GPUs. While both lanes
compute on shared cores each runs `contention` times slower.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import inf

import numpy as np

from roofline.lengths import Lengths
from roofline.slots import Slots

ROUNDING_S = 1e-12
"""Work left below this is rounding."""


class Mode(StrEnum):
    """How generators and learner are coupled."""

    SYNCHRONOUS = "synchronous"
    ONE_STEP_OFF = "one-step-off"
    ASYNCHRONOUS = "asynchronous"
    IN_FLIGHT = "in-flight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """Sizes and seconds of one run."""

    mode: Mode = Mode.IN_FLIGHT
    prompts_per_step: int
    """P."""
    group_size: int
    """G."""
    max_staleness: int = 1
    """S, for asynchronous and in-flight."""
    slots: int
    """Sequences decoded at once, over all generators."""
    chunk_steps: int
    """Decode steps between two refills."""
    decode_step_s: float
    """One decode step over all slots [s]."""
    admit_s: float = 0.0
    """Fixed time of one refill [s]."""
    prompt_s: float = 0.0
    """Prefill of one prompt, all generators at work [s]."""
    learner_s: float
    """Scoring, training and the optimizer, per optimizer step [s]."""
    publish_s: float = 0.0
    """Learner time to hand over the weights [s]."""
    verify_s: float = 0.0
    """One verification [s]."""
    verifiers: int = 0
    """Verifier processes; 0 verifies on the rollout lane."""
    contention: float = 1.0
    """How many times slower a lane runs while the other computes too."""
    flat_share: float = 0.0
    """Share of groups without signal, all right or all wrong; asked only where they are replaced."""
    refill_rounds: int = 0
    """Most times in a step that its groups without signal are replaced by others (`jaxrl.refill`)."""

    def __post_init__(self) -> None:
        """Refuse sizes that cannot run."""
        for name in ("prompts_per_step", "group_size", "slots", "chunk_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"simulation {name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.flat_share <= 1:
            raise ValueError(f"simulation flat_share={self.flat_share} must lie in [0, 1]")
        for name in (
            "refill_rounds",
            "max_staleness",
            "verifiers",
            "admit_s",
            "prompt_s",
            "publish_s",
            "verify_s",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"simulation {name}={getattr(self, name)} must be >= 0")
        for name in ("decode_step_s", "learner_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"simulation {name}={getattr(self, name)} must be greater than 0")
        if self.contention < 1:
            raise ValueError(f"simulation contention={self.contention} must be at least 1")

    @property
    def samples_per_step(self) -> int:
        """P * G."""
        return self.prompts_per_step * self.group_size

    @property
    def tickets(self) -> int:
        """Groups that may be under way at once."""
        bounded = self.mode in (Mode.ASYNCHRONOUS, Mode.IN_FLIGHT)
        return self.prompts_per_step * (1 + (self.max_staleness if bounded else 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """Steady state of a simulated run, from the first step past the warm-up to the last."""

    step_s: float
    """Mean time between two publications [s]."""
    samples_per_s: float
    rollout_idle: float
    """Share of the time in which no chunk runs."""
    slot_idle: float
    """Share of slot time without a completion; one that ends within a chunk counts to its end."""
    learner_idle: float
    """Share of the time in which the learner waits."""
    staleness: Mapping[int, int]
    """Samples consumed, by versions between birth and consumption; the whole run."""
    published_s: tuple[float, ...]
    """When version 1, 2, ... was there [s]."""

    @property
    def mean_staleness(self) -> float:
        """Mean over consumed samples [versions]."""
        return sum(k * n for k, n in self.staleness.items()) / sum(self.staleness.values())


def simulate(pipeline: Pipeline, lengths: Lengths, *, steps: int = 30, seed: int = 0) -> Simulation:
    """Run `steps` optimizer steps.

    Raises:
        ValueError: too few steps to leave a warm-up of max_staleness + 2 behind.
    """
    warm_up = pipeline.max_staleness + 2
    if steps <= warm_up:
        raise ValueError(
            f"steps={steps} must be more than the warm-up of {warm_up}; use {4 * warm_up}"
        )
    run = _Run(pipeline, lengths, np.random.default_rng(seed))
    while len(run.published) < steps:
        run.advance()
    marks = run.published
    first, last = marks[warm_up - 1], marks[-1]
    span = last.time_s - first.time_s
    per_step = span / (steps - warm_up)
    return Simulation(
        step_s=per_step,
        samples_per_s=pipeline.samples_per_step / per_step,
        rollout_idle=1 - (last.rollout_s - first.rollout_s) / span,
        slot_idle=1 - (last.slot_s - first.slot_s) / (span * pipeline.slots),
        learner_idle=1 - (last.learner_s - first.learner_s) / span,
        staleness=dict(sorted(run.buffer.staleness.items())),
        published_s=tuple(mark.time_s for mark in marks),
    )


@dataclass(frozen=True, slots=True)
class _Mark:
    """Sums at a publication."""

    time_s: float
    rollout_s: float
    slot_s: float
    learner_s: float


class _Buffer:
    """Tickets and finished groups, counted by birth version (groups of one birth are alike)."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._prompts, self._samples = pipeline.prompts_per_step, pipeline.group_size
        self._bound = pipeline.tickets // pipeline.prompts_per_step - 1
        self.free, self.version = pipeline.tickets, 0
        self.births: Counter[int] = Counter()  # taken tickets
        self.finished: Counter[int] = Counter()  # verified, not consumed
        self.staleness: Counter[int] = Counter()

    def draw(self, most: int) -> int:
        number = min(most, self.free)
        self.free -= number
        self.births[self.version] += number
        return number

    def take(self, wanted: int) -> Counter[int] | None:
        """The oldest `wanted` groups by birth if they may leave: an earliest-deadline-first argument."""
        chosen: Counter[int] = Counter()
        for birth in sorted(self.finished):
            chosen[birth] = min(self.finished[birth], wanted - chosen.total())
        if chosen.total() < wanted or not self._others_can_wait(chosen):
            return None
        self.finished = +(self.finished - chosen)
        self.births = +(self.births - chosen)
        return +chosen

    def consume(self, birth: int, number: int) -> None:
        """So many of the groups taken are trained on."""
        self.staleness[self.version - birth] += number * self._samples

    def _others_can_wait(self, chosen: Counter[int]) -> bool:
        left = 0
        for birth, number in sorted((self.births - chosen).items()):
            left += number
            if left > self._prompts * (birth + self._bound - self.version):
                return False
        return True


class _Run:
    """State between two events."""

    def __init__(self, pipeline: Pipeline, lengths: Lengths, rng: np.random.Generator) -> None:
        self.pipeline, self._lengths, self._rng = pipeline, lengths, rng
        self.buffer = _Buffer(pipeline)
        self.published: list[_Mark] = []
        self._now = self._rollout_s = self._slot_s = self._learner_s = 0.0
        self._rollout_left = self._learner_left = inf  # work alone [s]; inf: nothing to do
        self._publishes, self._waits_for_groups = False, False
        self._begin_batch()
        self._weights = 0  # version that the slots sample with
        self._slots = Slots(pipeline.slots, pipeline.chunk_steps, pipeline.group_size)
        self._verifier_free = np.zeros(pipeline.verifiers)
        self._inline: Counter[int] = Counter()  # groups being verified on the rollout lane
        self._verified: list[tuple[float, int, int]] = []  # heap: time, birth, groups

    # -- events ------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Start what can start, then go to the next event."""
        if self._learner_left == inf:
            self._start_learner()
        if self._rollout_left == inf:
            self._start_chunk()
        computing = (self._rollout_left < inf) + (self._learner_left < inf)
        slow = self.pipeline.contention if computing == 2 else 1.0
        arrival = self._verified[0][0] - self._now if self._verified else inf
        ahead = min(self._rollout_left * slow, self._learner_left * slow, arrival)
        assert ahead < inf, "every lane waits for another"
        self._now += ahead
        if self._rollout_left < inf:
            self._rollout_s += ahead
            self._slot_s += ahead * self._slots.live
            self._rollout_left -= ahead / slow
        if self._learner_left < inf:
            self._learner_s += ahead
            self._learner_left -= ahead / slow
        while self._verified and self._verified[0][0] <= self._now:
            _, birth, groups = heapq.heappop(self._verified)
            self.buffer.finished[birth] += groups
        if self._rollout_left <= ROUNDING_S:
            self._end_rollout()
        if self._learner_left <= ROUNDING_S:
            self._end_learner()

    def _start_learner(self) -> None:
        buffer, pipeline = self.buffer, self.pipeline
        if self._waits_for_groups:  # one-step-off: trained, the other batch is still being sampled
            if buffer.finished.total() < pipeline.prompts_per_step:
                return
            self._waits_for_groups = False
            self._publish()
            if self._publishes:
                return
        if self._gather():
            self._learner_left = pipeline.learner_s
            if pipeline.mode is Mode.ONE_STEP_OFF:
                buffer.free += pipeline.prompts_per_step

    def _begin_batch(self) -> None:
        """Groups that the next batch lacks, and how often it may still replace some."""
        self._lacks = self.pipeline.prompts_per_step
        self._rounds = self.pipeline.refill_rounds

    def _gather(self) -> bool:
        """Take what the batch lacks, again while groups without signal are replaced; whether it is whole."""
        while (taken := self.buffer.take(self._lacks)) is not None:
            flat = self._without_signal(taken) if self._rounds else Counter[int]()
            for birth, number in taken.items():
                self.buffer.consume(birth, number - flat[birth])
            if not flat.total():
                self._begin_batch()
                return True
            self.buffer.free += flat.total()
            self._lacks, self._rounds = flat.total(), self._rounds - 1
        return False

    def _without_signal(self, taken: Counter[int]) -> Counter[int]:
        """Groups by birth, each flat by chance."""
        share = self.pipeline.flat_share
        return Counter({birth: int(self._rng.binomial(n, share)) for birth, n in taken.items()})

    def _end_learner(self) -> None:
        self._learner_left = inf
        if self._publishes:
            self._publishes = False
            self._release()
        elif self.pipeline.mode is Mode.ONE_STEP_OFF:
            self._waits_for_groups = True
        else:
            self._publish()

    def _publish(self) -> None:
        if self.pipeline.publish_s > 0:
            self._publishes, self._learner_left = True, self.pipeline.publish_s
        else:
            self._release()

    def _release(self) -> None:
        self.buffer.version += 1
        if self.pipeline.mode is not Mode.ONE_STEP_OFF:
            self.buffer.free += self.pipeline.prompts_per_step
        self.published.append(_Mark(self._now, self._rollout_s, self._slot_s, self._learner_s))

    def _start_chunk(self) -> None:
        pipeline = self.pipeline
        runs_dry = pipeline.mode is Mode.ASYNCHRONOUS and self._weights < self.buffer.version
        if not runs_dry or self._slots.live == 0:
            self._weights = self.buffer.version
            admitted = self._admit()
        else:
            admitted = 0.0
        if self._slots.live:
            self._rollout_left = admitted + self._slots.steps() * pipeline.decode_step_s

    def _admit(self) -> float:
        """Fill free slots; seconds of prefill."""
        pipeline, version = self.pipeline, self.buffer.version
        if drawn := self.buffer.draw(self._slots.wanted()):
            self._slots.queue(version, self._lengths.draw(self._rng, drawn * pipeline.group_size))
        if not self._slots.enter():
            return 0.0
        return pipeline.admit_s + drawn * pipeline.prompt_s

    def _end_rollout(self) -> None:
        self._rollout_left = inf
        if self._inline:
            self.buffer.finished += self._inline
            self._inline = Counter()
        else:
            self._end_chunk()

    def _end_chunk(self) -> None:
        if complete := self._slots.end_chunk():
            self._verify(complete)

    def _verify(self, complete: Counter[int]) -> None:
        """Hand complete groups, by birth, to the verifiers; free ones take the next sample each."""
        pipeline = self.pipeline
        if pipeline.verify_s == 0:
            self.buffer.finished += complete
            return
        tasks = complete.total() * pipeline.group_size
        if pipeline.verifiers == 0:
            self._inline = complete
            self._rollout_left = tasks * pipeline.verify_s
            return
        free = np.sort(np.maximum(self._verifier_free, self._now))
        rounds, place = np.divmod(np.arange(tasks), free.size)
        done = free[place] + (rounds + 1) * pipeline.verify_s
        free += tasks // free.size * pipeline.verify_s
        free[: tasks % free.size] += pipeline.verify_s
        self._verifier_free = free
        ready, begin = done.reshape(-1, pipeline.group_size).max(axis=1), 0
        for birth, groups in sorted(complete.items()):
            at, counts = np.unique(ready[begin : begin + groups], return_counts=True)
            begin += groups
            for time_s, number in zip(at.tolist(), counts.tolist(), strict=True):
                heapq.heappush(self._verified, (time_s, birth, number))
