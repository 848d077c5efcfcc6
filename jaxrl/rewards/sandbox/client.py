"""Running untrusted programs, seen from the process that wants the result."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxrl.errors import UserError
from jaxrl.rewards.sandbox import filters
from jaxrl.rewards.sandbox.limits import Limits
from jaxrl.rewards.sandbox.protocol import receive, send

_START_S = 60.0
"""A zygote that is not ready by then (usual: 0.1 s) is an error."""
_GRACE_S = 5.0
"""How much later than the time limit an answer may come; after that the zygote is replaced."""
_DEATHS = 2
"""Zygotes that one run may cost before it is an error."""
_NOBODY = 65534
_COMMAND = (
    "import sys; sys.path.append({folder!r}); from sandbox import zygote; sys.path.pop(); "
    "zygote.main({descriptor}, {namespaces})"
)


class SandboxError(RuntimeError):
    """No program can be run here; the text says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Isolation:
    """What stands between a program and this machine. The filter and the limits always do."""

    namespaces: bool
    """Own network, processes and file system; without them files that we may read, it may read."""
    reason: str
    """Why there are no namespaces; empty if there are."""

    def __str__(self) -> str:
        """One sentence for people."""
        if self.namespaces:
            return "programs run in their own namespaces: no network, no files but libraries"
        return (
            f"programs run WITHOUT namespaces ({self.reason}): a system call filter denies them "
            "sockets, processes and every writing of files, but they can read what this user can "
            "read; allow user namespaces (kernel.apparmor_restrict_unprivileged_userns=0, or "
            "--security-opt seccomp=unconfined for a container) to close that"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Checks:
    """Test code that calls a program from outside."""

    setup: str
    """Run first: imports and helpers."""
    entries: tuple[str, ...]
    """Names of the program that the checks use; anything else comes from `setup` and Python."""
    checks: tuple[str, ...]
    """Statements; one that raises has failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a run ended."""

    status: int | None
    """Exit status of the program, or of the checks; minus the signal that ended it; None: too slow."""
    wall_s: float
    output: str
    """Standard output, as far as it was written."""
    errors: str
    """The last 2000 bytes of standard error."""
    passed: tuple[bool, ...] = ()
    """Verdicts on the checks that were reached, in order."""


class Sandbox:
    """A zygote and the runs that are forked from it, one at a time; started by the first run.

    Any thread may use it. It ends with `close`, with the object, and with this process.
    """

    def __init__(self, namespaces: bool = True) -> None:
        """namespaces: False leaves them out even where the kernel allows them.

        Raises: UserError unless this is Linux on x86_64 or aarch64.
        """
        if not filters.supported():
            raise UserError(
                f"programs cannot be run safely on {sys.platform} ({os.uname().machine}); the code "
                "verifier needs Linux on x86_64 or aarch64: use another verifier or machine"
            )
        self._wanted = namespaces
        self._lock = threading.Lock()
        self._zygote: _Zygote | None = None

    @property
    def isolation(self) -> Isolation:
        """What programs run in. Raises: SandboxError if the zygote cannot start."""
        with self._lock:
            return self._started().isolation

    def run(self, program: str, stdin: str, limits: Limits) -> Outcome:
        """Run a program as the main module with this standard input.

        Raises: SandboxError if it cannot be run; nothing that the program does.
        """
        job = {"program": program, "stdin": stdin, "checks": False, "limits": asdict(limits)}
        return self._ask([job], limits)

    def check(self, program: str, checks: Checks, limits: Limits) -> Outcome:
        """Import a program as a module and run checks that call it, in a process of their own.

        Raises: SandboxError if it cannot be run; nothing that the program does.
        """
        job = {"program": program, "stdin": "", "checks": True, "limits": asdict(limits)}
        return self._ask([job, asdict(checks)], limits)

    def close(self) -> None:
        """End the zygote, after a run that is under way; the next run starts another."""
        with self._lock:
            self._drop()

    def _ask(self, messages: Sequence[dict], limits: Limits) -> Outcome:
        with self._lock:
            for _ in range(_DEATHS):
                zygote = self._started()
                try:
                    answer = zygote.ask(messages, limits.wall_s + _GRACE_S)
                    passed = tuple(answer.pop("passed"))
                    return Outcome(**answer, passed=passed)
                except TimeoutError:
                    self._drop()
                    wall_s = limits.wall_s + _GRACE_S
                    return Outcome(status=None, wall_s=wall_s, output="", errors="no answer")
                except (EOFError, OSError):
                    self._drop()
            raise SandboxError(f"a program ended its supervisor {_DEATHS} times; stderr says more")

    def _started(self) -> _Zygote:
        if self._zygote is None:
            reason = "not wanted"
            if self._wanted:
                try:
                    self._zygote = _Zygote(namespaces=True)
                    return self._zygote
                except _NoNamespaces as error:
                    reason = str(error)
            self._zygote = _Zygote(namespaces=False, reason=reason)
            warnings.warn(str(self._zygote.isolation), RuntimeWarning, stacklevel=4)
        return self._zygote

    def _drop(self) -> None:
        if self._zygote:
            self._zygote.end()
            self._zygote = None


class _NoNamespaces(Exception):
    """The kernel does not allow them; the text says which step failed."""


class _Zygote:
    """The process and our end of its socket."""

    def __init__(self, namespaces: bool, reason: str = "") -> None:
        """Raises: _NoNamespaces if they are wanted and forbidden, SandboxError for the rest."""
        self.isolation = Isolation(namespaces=namespaces, reason=reason)
        self._control, theirs = socket.socketpair()
        descriptor = theirs.fileno()
        folder = str(Path(__file__).resolve().parents[1])
        command = _COMMAND.format(folder=folder, descriptor=descriptor, namespaces=namespaces)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-s", "-S", "-X", "utf8", "-c", command],
                    env={"PYTHONHASHSEED": "0"},  # sets of texts iterate the same in every process
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/",
                    pass_fds=[descriptor], start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise SandboxError(f"a Python interpreter cannot be started: {error}") from error
        self.end = weakref.finalize(self, _end, self._control, self._process)
        try:
            self._wait_ready()
        except (EOFError, OSError) as error:
            self.end()
            raise SandboxError(f"the sandbox did not start: {error!r}; stderr says more") from error

    def ask(self, messages: Sequence[dict], timeout_s: float) -> dict:
        """Raises: TimeoutError; EOFError or OSError if the process is gone."""
        self._control.settimeout(timeout_s)
        for message in messages:
            send(self._control, message)
        return receive(self._control)

    def _wait_ready(self) -> None:
        self._control.settimeout(_START_S)
        answer = receive(self._control)
        if answer.get("ready") is False:
            try:
                user = _map_users(self._process.pid)
            except OSError as error:
                self.end()
                raise _NoNamespaces(f"user map: {error}") from error
            send(self._control, {"user": user})
            answer = receive(self._control)
        if "failed" in answer:
            self.end()
            raise _NoNamespaces(answer["failed"])


def _map_users(pid: int) -> int:
    """Map the process's root to us and, where we are root, its user 1 to nobody; programs' user.

    Raises: OSError if neither map is allowed.
    """
    own = {"uid": os.geteuid(), "gid": os.getegid()}
    if not own["uid"]:
        with contextlib.suppress(OSError):
            for kind, number in own.items():
                Path(f"/proc/{pid}/{kind}_map").write_text(f"0 {number} 1\n1 {_NOBODY} 1\n")
            return 1
    Path(f"/proc/{pid}/setgroups").write_text("deny")
    for kind, number in own.items():
        Path(f"/proc/{pid}/{kind}_map").write_text(f"0 {number} 1\n")
    return 0


def _end(control: socket.socket, process: subprocess.Popen) -> None:
    control.close()
    process.kill()
    process.wait()
