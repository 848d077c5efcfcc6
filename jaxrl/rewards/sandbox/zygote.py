"""The bare interpreter that every run is forked from: start-up costs a run milliseconds.

Each job goes to a supervisor, a fork that waits for the run's end or its time limit and answers. The text
of the checks reaches the supervisor only after the program's process exists, and this process reads no job
at all, so that a program finds neither checks nor other programs in its memory. It ends when the other end
of its socket closes.
"""

from __future__ import annotations

import bisect  # noqa: F401  what programs import most is loaded once, here
import builtins
import collections  # noqa: F401
import contextlib
import copy  # noqa: F401
import datetime  # noqa: F401
import decimal  # noqa: F401
import functools
import gc
import heapq  # noqa: F401
import itertools  # noqa: F401
import json
import math  # noqa: F401
import os
import random
import re  # noqa: F401
import select
import signal
import socket
import string  # noqa: F401
import sys
import time
import traceback
import types
import typing  # noqa: F401
from collections.abc import Callable, Sequence

from . import isolation
from .calls import Calls, serve
from .limits import Limits
from .protocol import receive, send

_TAIL = 2000
"""Bytes of standard error that the answer carries."""


def main(descriptor: int, namespaces: bool) -> None:
    """Serve jobs until the other end closes; in a forked program's process, run the program."""
    control = socket.socket(fileno=descriptor)
    try:
        user = _isolate(control) if namespaces else None
    except OSError as error:
        send(control, {"failed": str(error)})
        return
    send(control, {"ready": True})
    os.environ.clear()
    sys.set_int_max_str_digits(0)
    builtins.exit = builtins.quit = sys.exit  # as programs know them from `site`
    random.seed(0)  # every program draws the same numbers: a verdict is a function of its text
    gc.collect()
    gc.freeze()
    if play := _serve_jobs(control, user):
        control.detach()  # closed already, and its number may be another file's by now
        play()


def _isolate(control: socket.socket) -> int:
    """Take namespaces and the bare root; the user that programs run as. Raises: OSError."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # when memory runs out, a program goes first
    isolation.take_namespaces()
    send(control, {"ready": False})
    user = receive(control)["user"]  # the other end has written the user map
    isolation.take_root()
    return user


def _serve_jobs(control: socket.socket, user: int | None) -> Callable[[], None] | None:
    """Fork a supervisor per job. Returns at the end, and in a run's processes what they are to do.

    Only the supervisor reads the job: this process would hand it on to the programs of later jobs.
    """
    while True:
        select.select([control], [], [])
        pid = os.fork()
        if not pid:
            try:
                return _supervise(control, receive(control), user)
            except EOFError:
                os._exit(1)
            except Exception:
                traceback.print_exc()
                os._exit(1)
        if os.waitpid(pid, 0)[1]:
            return None


def _supervise(control: socket.socket, job: dict, user: int | None) -> Callable[[], None]:
    """Start the run, wait for its end, answer. Returns only in the processes that it starts."""
    limits = Limits(**job["limits"])
    isolation.die_with_parent()
    if user is not None:
        isolation.take_run(limits, user)
    confine = functools.partial(isolation.confine, limits, user)
    output, errors, verdicts = (os.memfd_create(name) for name in ("output", "errors", "verdicts"))
    source, requests, answers = (os.pipe() if job["checks"] else (-1, -1) for _ in range(3))
    children: list[int] = []
    if job["checks"]:  # first, so that the program cannot outlive it
        pid, alive = _fork()
        if not pid:
            _keep(
                (_file(""), output, errors), (source[0], requests[1], answers[0], verdicts, alive)
            )
            confine(alive)
            return functools.partial(_check, source[0], requests[1], answers[0], verdicts)
        children.append(pid)
    pid, alive = _fork()
    if not pid:
        keep = (requests[0], answers[1], alive) if job["checks"] else (alive,)
        _keep((_file(job["stdin"]), output, errors), keep)
        confine(alive)
        return functools.partial(_play, job["program"], requests[0], answers[1])
    children.append(pid)
    start_s = time.perf_counter()
    if job["checks"]:
        for descriptor in (source[0], *requests, *answers):
            os.close(descriptor)
        _hand_over(receive(control), source[1])
    status = _wait(children, start_s + limits.wall_s, control)
    wall_s = time.perf_counter() - start_s
    _end(children)
    message = {
        "status": status,
        "wall_s": wall_s,
        "output": os.pread(output, limits.output_bytes, 0).decode(errors="replace"),
        "errors": _tail(errors),
        "passed": [byte == ord("1") for byte in os.pread(verdicts, 1 << 20, 0)],
    }
    send(control, message)
    os._exit(0)


def _fork() -> tuple[int, int]:
    """Child's id (0 in the child) and, in the child, a pipe that breaks when its parent is gone."""
    ours, theirs = os.pipe()
    pid = os.fork()
    os.close(theirs if pid else ours)
    return pid, theirs


def _file(text: str) -> int:
    descriptor = os.memfd_create("input")
    data = memoryview(text.encode(errors="replace"))
    while data:
        data = data[os.write(descriptor, data) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _keep(streams: tuple[int, int, int], others: Sequence[int]) -> None:
    """Make `streams` the standard ones and close everything but `others`."""
    for target, descriptor in enumerate(streams):
        os.dup2(descriptor, target)
    last = 2
    for descriptor in (*sorted(others), os.sysconf("SC_OPEN_MAX")):
        os.closerange(last + 1, descriptor)
        last = descriptor
    sys.stdin = open(0, errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115


def _wait(children: list[int], deadline_s: float, control: socket.socket) -> int | None:
    """Exit status of the first child (minus the signal's number), or None at the deadline.

    Also None when the other end of `control` closes: nobody waits for an answer any more. Takes those
    that ended out of `children`: the first of a namespace ends only after the others are waited for.
    """
    first = children[0]
    wake, woken = os.pipe2(os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    events = select.poll()
    events.register(wake, select.POLLIN)
    events.register(control, select.POLLIN)
    while True:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            children.remove(ended[0])
            if ended[0] == first:
                return os.waitstatus_to_exitcode(ended[1])
        left_s = deadline_s - time.perf_counter()
        if left_s <= 0 or control.fileno() in dict(events.poll(left_s * 1000 + 1)):
            return None
        with contextlib.suppress(BlockingIOError):
            os.read(wake, 4096)


def _end(children: Sequence[int]) -> None:
    for pid in children:
        os.kill(pid, signal.SIGKILL)  # at least a zombie: until it is waited for the id is its own
    for pid in reversed(children):
        os.waitpid(pid, 0)


def _hand_over(checks: dict, descriptor: int) -> None:
    with contextlib.suppress(BrokenPipeError), open(descriptor, "w") as file:
        json.dump(checks, file)


def _tail(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, _TAIL, max(0, size - _TAIL)).decode(errors="replace")


def _play(text: str, requests: int, answers: int) -> None:
    """Run the program: as the main module, or, if there are pipes, as a module that is then called."""
    module = types.ModuleType("__main__" if requests < 0 else "program")
    sys.modules[module.__name__] = module
    exec(compile(text, "<program>", "exec", dont_inherit=True), module.__dict__)
    if requests >= 0:
        with open(requests) as questions, open(answers, "w") as replies:
            serve(module.__dict__, questions, replies)
        os._exit(0)


def _check(source: int, requests: int, answers: int, verdicts: int) -> None:
    """Run the checks one after the other; write 1 or 0 for each as soon as it is known."""
    with open(source) as file:
        checks = json.load(file)
    calls = Calls(open(requests, "w"), open(answers))  # noqa: SIM115  until the process ends
    names: dict[str, object] = {"__name__": "checks"}
    exec(compile(checks["setup"], "<setup>", "exec", dont_inherit=True), names)
    names.update({name: calls.ask({"name": name}) for name in checks["entries"]})
    for check in checks["checks"]:
        try:
            exec(compile(check, "<check>", "exec", dont_inherit=True), names)
            passed = not calls.gone
        except Exception:
            traceback.print_exc()
            passed = False
        os.write(verdicts, b"1" if passed else b"0")
    os._exit(0)
