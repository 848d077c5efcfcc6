"""The verifier process: receives items over a pipe, answers with verdicts, ends with the pipe.

Started as `python -c "from jaxrl.rewards.worker import main; main(fd)"` and not through
multiprocessing's spawn, which imports the parent's main module, and jax with it, into every worker.
"""

from __future__ import annotations

import faulthandler
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple

from jaxrl.config import TaskConfig
from jaxrl.errors import UserError
from jaxrl.tasks.base import IsolatedTask, ShapedTask, Task
from jaxrl.types import Problem, Reward

READY = "ready"
"""First answer of a worker that has built its task; otherwise it says what is wrong."""


class Item(NamedTuple):
    """One completion to verify."""

    problem: Problem
    completion: str
    finished: bool
    num_tokens: int = 0
    """Length of the completion, its stop token included."""


class Setup(NamedTuple):
    """First message to a worker: what it verifies with. `make` is pickled by name."""

    make: Callable[[TaskConfig, int], Task]
    config: TaskConfig
    seed: int
    latency_s: float


class Verdict(NamedTuple):
    """Answer to one item: a reward, or the traceback of the exception that `verify` raised."""

    reward: Reward | None
    traceback: str
    duration_s: float


def judge(task: Task, item: Item) -> Verdict:
    """Verify one item; an exception becomes part of the verdict, whatever it is, sys.exit included."""
    start_s = time.perf_counter()
    try:
        reward = task.verify(item.problem, item.completion, item.finished)
        if isinstance(task, ShapedTask):
            reward = task.shape(item.problem, item.completion, item.num_tokens, reward)
    except (Exception, SystemExit):
        return Verdict(None, traceback.format_exc(), time.perf_counter() - start_s)
    return Verdict(reward, "", time.perf_counter() - start_s)


def main(file_descriptor: int) -> None:
    """Serve the pipe until the parent closes it or dies."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with Connection(file_descriptor) as pipe:
        try:
            setup: Setup = pipe.recv()
            task = setup.make(setup.config, setup.seed)
            if isinstance(task, IsolatedTask):
                task.load_verifier()
        except UserError as error:
            pipe.send(str(error))
            return
        except Exception:
            pipe.send(traceback.format_exc())
            return
        pipe.send(READY)
        try:
            while True:
                pipe.send(_judge_all(task, pipe.recv(), setup.latency_s))
        except (EOFError, ConnectionError):
            return


def _judge_all(task: Task, items: Sequence[Item], latency_s: float) -> list[Verdict]:
    verdicts = []
    for item in items:
        if latency_s:
            time.sleep(latency_s)
        verdict = judge(task, item)
        verdicts.append(verdict._replace(duration_s=verdict.duration_s + latency_s))
    return verdicts
