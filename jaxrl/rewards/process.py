"""The parent's handle of one verifier process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import Pipe

from jaxrl.rewards.worker import READY, Item, Setup, Verdict

_STARTUP_S = 120.0
"""A process that is not ready by then (usual: 0.3 s) is an error."""
_PROGRAM = "from jaxrl.rewards.worker import main; main({})"


class StartError(RuntimeError):
    """The process could not build its task; the text is the user's error, or its traceback."""


class WorkerProcess:
    """One process and our end of its pipe. All methods but `kill` belong to one thread."""

    def __init__(self, setup: Setup) -> None:
        """Start it and do not wait. Raises: StartError if there can be no process."""
        self._pipe, theirs = Pipe()
        self._ready = False
        self._pipe.send(setup)  # small: it waits in the pipe
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _PROGRAM.format(theirs.fileno())],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
            except OSError as error:
                raise StartError(str(error)) from error

    def ask(self, items: Sequence[Item], timeout_s: float) -> list[Verdict]:
        """Verdicts of the items, in order; starting up does not count towards timeout_s.

        Raises: TimeoutError if they take longer; EOFError or OSError if the process dies;
        StartError if it cannot build its task. After any of them it is of no more use: `discard`
        it.
        """
        if not self._ready:
            self._wait_ready()
        self._pipe.send(items)
        if not self._pipe.poll(timeout_s):
            raise TimeoutError
        return self._pipe.recv()

    def _wait_ready(self) -> None:
        if not self._pipe.poll(_STARTUP_S):
            raise StartError(f"it was not ready after {_STARTUP_S} s")
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            raise StartError(f"it ended with exit code {code}; stderr says more") from error
        if answer != READY:
            raise StartError(answer)
        self._ready = True

    def kill(self) -> None:
        """End the process now; a thread that waits for its answer sees EOFError."""
        self._process.kill()

    def discard(self) -> int:
        """Kill it, reap it, close the pipe; its exit code (-9 if it was still alive)."""
        self._process.kill()
        self._pipe.close()
        return self._process.wait()
