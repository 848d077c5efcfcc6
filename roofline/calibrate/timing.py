"""How programs are timed: after warm-up, waiting for the result, the quick calls of several rounds."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

WARM_UPS, MIN_ROUNDS, ROUNDS, MAX_ROUNDS = 2, 3, 7, 24
CALM_SPREAD = 1.2
"""Lower quartile over quickest call: about 1.05 on a quiet machine, above 1.2 on a busy one."""
PAUSE_S = 0.2
"""Between rounds, once the first ones disagree [s]."""

Device = Any
"""A jax.Device, which is no type to a type checker."""
Run = Callable[[], None]
"""Runs one program once and waits for it."""


def caller(function: Callable[..., Any], *arguments: Any) -> Run:
    """Runs the function on these arguments and waits."""

    def run() -> None:
        jax.block_until_ready(function(*arguments))

    return run


def replacer(function: Callable[..., Any], state: Any, *arguments: Any) -> Run:
    """Runs state = function(state, ...), the old state donated, and waits."""
    held = [state]

    def run() -> None:
        held[0] = jax.block_until_ready(function(held[0], *arguments))

    return run


def timed(run: Run) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def quick(times: Sequence[float]) -> float:
    """The lower quartile: other programs only lengthen a call, and the least of all may be luck."""
    return sorted(times)[len(times) // 4]


def seconds(run: Run, rounds: int = ROUNDS) -> float:
    """Lower quartile of `rounds` calls, after warm-up [s]."""
    for _ in range(WARM_UPS):
        run()
    return quick([timed(run) for _ in range(rounds)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Calls of one program."""

    seconds: float
    """Lower quartile of the rounds."""
    spread: float
    """That over the quickest call; far above 1 nothing confirms it."""

    @property
    def calm(self) -> bool:
        """A quarter of the calls agree on the time."""
        return self.spread <= CALM_SPREAD


def in_turn(runs: Sequence[Run], deadline_s: float) -> list[Timing]:
    """Times of each program, all of them run in turn, until `deadline_s` on time.perf_counter.

    A disturbance of the machine then falls on every program, not on one of them. Each round has an order of
    its own: a program finds the caches as the one before it left them, which takes a short one up to a quarter
    of its time. ROUNDS rounds suffice where they agree; where they do not, more follow after pauses, so that a
    quiet moment is met. At least MIN_ROUNDS rounds are run whatever the deadline.
    """
    for run in runs:
        run()
    rounds: list[list[float]] = []
    timings: list[Timing] = []
    while len(rounds) < MAX_ROUNDS and not (len(rounds) >= ROUNDS and all(t.calm for t in timings)):
        if len(rounds) >= MIN_ROUNDS and time.perf_counter() > deadline_s:
            break
        if len(rounds) >= ROUNDS:
            time.sleep(PAUSE_S)
        order = random.Random(len(rounds)).sample(range(len(runs)), len(runs))
        times = {place: timed(runs[place]) for place in order}
        rounds.append([times[place] for place in range(len(runs))])
        timings = [
            Timing(seconds=quick(times), spread=quick(times) / min(times))
            for times in zip(*rounds, strict=True)
        ]
    return timings
