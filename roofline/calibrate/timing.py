"""How programs are timed: after warm-up, waiting for the result, the median of several rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

WARM_UPS, ROUNDS, MIN_ROUNDS, MAX_ROUNDS = 2, 5, 3, 7

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


def seconds(run: Run, rounds: int = ROUNDS) -> float:
    """Median of `rounds` calls, after warm-up [s]."""
    for _ in range(WARM_UPS):
        run()
    return statistics.median(timed(run) for _ in range(rounds))


def medians(runs: Sequence[Run], deadline_s: float) -> list[float]:
    """Median of each program, all of them run in turn, until `deadline_s` on time.perf_counter.

    A disturbance of the machine then falls on every program, not on one of them. At least
    MIN_ROUNDS rounds are run whatever the deadline.
    """
    for run in runs:
        run()
    rounds: list[list[float]] = []
    while len(rounds) < MAX_ROUNDS:
        if len(rounds) >= MIN_ROUNDS and time.perf_counter() > deadline_s:
            break
        rounds.append([timed(run) for run in runs])
    return [statistics.median(times) for times in zip(*rounds, strict=True)]
