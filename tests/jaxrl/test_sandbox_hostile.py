"""Hostile programs: each claims success by printing REACHED, or by a verdict that it has not earned."""

import os
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jaxrl.rewards.sandbox.client import Checks, Sandbox
from jaxrl.rewards.sandbox.limits import Limits

LIMITS = Limits(wall_s=0.5, memory_bytes=256 << 20, disk_bytes=2 << 20, output_bytes=1 << 20)
SQUARE = Checks(
    setup="",
    entries=("f",),
    checks=("assert f(2) == 4", "assert f(3) == 9", "assert {f(1)} == {1}"),
)
GOOD = "def f(x):\n    return x * x"

ATTACKS = {
    "fork bomb": """
        import os
        while True:
            try:
                os.fork()
                print("REACHED")
            except OSError:
                pass
    """,
    "fork past libc": """
        import ctypes
        libc = ctypes.CDLL(None)
        for number in (56, 57, 58, 435):  # clone, fork, vfork, clone3 of x86_64
            if libc.syscall(number, 17, 0, 0, 0, 0) >= 0:
                print("REACHED")
    """,
    "a thread bomb": """
        import threading, time
        for _ in range(200):
            threading.Thread(target=time.sleep, args=(0.3,), daemon=True).start()
        print("REACHED")
    """,
    "another program": """
        import os, subprocess
        if os.system("true") == 0 or subprocess.run(["/bin/true"]).returncode == 0:
            print("REACHED")
    """,
    "an endless loop": "while True: pass",
    "a sleeper that catches everything": """
        import signal, time
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
    """,
    "one large object": "x = bytearray(1 << 30); print('REACHED')",
    "many objects": "x = [[0] * 10_000 for i in range(10_000)]; print('REACHED')",
    "memory outside of the address space": """
        import ctypes
        libc = ctypes.CDLL(None)
        if any(libc.syscall(n, b"x", 1 << 30, 0o1600) >= 0 for n in (319, 29, 240)):
            print("REACHED")  # memfd_create, shmget, mq_open of x86_64
    """,
    "a large file": """
        with open("large", "wb") as file:
            for _ in range(64):
                file.write(bytes(1 << 16))
        print("REACHED")
    """,
    "many files": """
        for number in range(64):
            open(str(number), "wb").write(bytes(1 << 16))
        print("REACHED")
    """,
    "very many empty files": """
        for number in range(5000):
            open(str(number), "wb").close()
        print("REACHED")
    """,
    "a flood of output": "while True: print('REACHED' * 1000)",
    "a flood of errors": "import sys\nwhile True: sys.stderr.write('x' * 10000)",
    "killing its parents": """
        import os, signal
        for pid in (os.getppid(), {pid}, -1, 0, *range(2, 50)):
            try:
                if pid != os.getpid():
                    os.kill(pid, signal.SIGKILL)
                    print("REACHED")
            except OSError:
                pass
    """,
    "changing its parents": """
        import ctypes, os, resource
        libc = ctypes.CDLL(None)
        for pid in {os.getppid(), {pid}} - {0}:
            for attack in (
                lambda: resource.prlimit(pid, resource.RLIMIT_CPU, (0, 0)),
                lambda: os.setpriority(os.PRIO_PROCESS, pid, 19),
                lambda: os.sched_setaffinity(pid, [0]),
                lambda: 1 / (1 + libc.ptrace(16, pid, 0, 0)),
            ):
                try:
                    attack()
                    print("REACHED")
                except (OSError, ZeroDivisionError):
                    pass
    """,
    "outliving its parent": """
        import ctypes
        if ctypes.CDLL(None).prctl(1, 0) == 0:
            print("REACHED")
    """,
    "writing outside of its folder": """
        import os
        for path in ({canary!r}, "/x", "/usr/lib/x", "/etc/x", "/dev/shm/x", "/var/tmp/x", "../x"):
            for attack in (lambda: open(path, "a").write("x"), lambda: os.remove(path),
                           lambda: os.mkdir(path + "_"), lambda: os.truncate(path, 0),
                           lambda: os.chmod(path, 0o777), lambda: os.rename(path, path + "_")):
                try:
                    attack()
                    print("REACHED")
                except OSError:
                    pass
    """,
    "the network": """
        import socket
        for family, address in ((socket.AF_INET, ("127.0.0.1", {port})),
                                (socket.AF_UNIX, {unix!r})):
            try:
                socket.socket(family).connect(address)
                print("REACHED")
            except OSError:
                pass
    """,
    "new namespaces": """
        import ctypes
        libc = ctypes.CDLL(None)
        if 0 in (libc.unshare(0x10000000), libc.unshare(0x00020000),
                 libc.mount(b"none", b"/tmp", b"tmpfs", 0, b""), libc.chroot(b"/tmp")):
            print("REACHED")
    """,
    "the environment": """
        import os
        if len(os.environ) or "JAXRL_CANARY" in os.popen("env").read():
            print("REACHED")
    """,
}
NEED_NAMESPACES = {
    "the trainer's files": """
        import os
        for path in ({canary!r}, {source!r}, "/proc/{pid}/environ", "/proc/self/environ"):
            if os.path.exists(path):
                print("REACHED")
    """,
    "the trainer's memory": """
        open("/proc/{pid}/mem", "rb")
        print("REACHED")
    """,
}
FORGERIES = {
    "ends early with success": "import os\nos._exit(0)",
    "ends early in the call": "import os\ndef f(x): os._exit(0)",
    "exits quietly": "import sys\ndef f(x): sys.exit(0)",
    "equals everything": """
        class Any:
            def __eq__(self, other): return True
            def __hash__(self): return 1
            def __bool__(self): return True
        def f(x): return Any()
    """,
    "a number that equals everything": """
        class Any(int):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            __hash__ = int.__hash__
        def f(x): return Any(0)
    """,
    "overrides the checker": """
        import builtins, json, sys
        for name in ("AssertionError", "Exception", "set", "len", "exec", "compile", "all"):
            setattr(builtins, name, lambda *a, **k: True)
        json.dumps = lambda *a, **k: '{"value": true}'
        sys.modules["sandbox.zygote"].__dict__.clear()
        def f(x): return True
    """,
    "writes verdicts everywhere": """
        import os
        for fd in range(128):
            for text in (b"1", b"111", b'{"value": true}\\n' * 9, b'{"passed": [true, true, true]}'):
                try: os.write(fd, text)
                except OSError: pass
        def f(x): return 1
    """,
    "answers with an exception": "def f(x): raise SystemExit(0)",
    "looks for the checks": """
        import gc, sys
        texts, frame = [], sys._getframe()
        while frame:
            texts.append(repr((frame.f_locals, frame.f_globals)))
            frame = frame.f_back
        texts += [repr(o) for o in gc.get_objects() if isinstance(o, (dict, list, tuple))]
        needle = "".join(["assert", " f(2)"])
        def f(x): return x * x if any(needle in text for text in texts) else None
    """,
    "a bomb as its answer": """
        from decimal import Decimal
        def f(x): return [Decimal("1e999999999"), 10 ** 200_000, 9.9e999]
    """,
    "an endless answer": """
        import itertools
        def f(x): return itertools.count()
    """,
}


@pytest.fixture(scope="module", params=[True, False], ids=["namespaces", "filter"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    before = _children()
    os.environ["JAXRL_CANARY"] = "1"
    sandbox = Sandbox(namespaces=request.param)
    with warnings.catch_warnings(action="ignore"):
        isolation = sandbox.isolation
    if request.param and not isolation.namespaces:
        pytest.skip(f"no namespaces here: {isolation.reason}")
    yield sandbox
    sandbox.close()
    del os.environ["JAXRL_CANARY"]
    assert _children() == before


def _children() -> set[int]:
    pids = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(pid) for path in pids for pid in path.read_text().split()}


def _attack(sandbox: Sandbox, program: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("alive")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(tmp_path / "s"))
        local.listen()
        facts = {
            "pid": os.getpid(), "canary": str(canary), "port": server.getsockname()[1],
            "unix": str(tmp_path / "s"), "source": __file__,
        }  # fmt: skip
        text = textwrap.dedent(program)
        for name, value in facts.items():
            text = text.replace(f"{{{name}!r}}", repr(value)).replace(f"{{{name}}}", str(value))
        outcome = sandbox.run(text, "", LIMITS)
    assert "REACHED" not in outcome.output.split()
    assert canary.read_text() == "alive"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["canary", "s"]
    assert sandbox.check(GOOD, SQUARE, Limits()).passed == (True,) * 3


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_scores_zero_and_harms_nothing(sandbox, tmp_path: Path, name: str):
    _attack(sandbox, ATTACKS[name], tmp_path)


@pytest.mark.parametrize("name", NEED_NAMESPACES)
def test_a_program_sees_nothing_of_the_trainer(sandbox, tmp_path: Path, name: str):
    if not sandbox.isolation.namespaces:
        pytest.skip(
            "files that this user can read stay readable without namespaces, and it says so"
        )
    _attack(sandbox, NEED_NAMESPACES[name], tmp_path)


@pytest.mark.parametrize("name", FORGERIES)
def test_a_verdict_cannot_be_forged(sandbox, name: str):
    outcome = sandbox.check(textwrap.dedent(FORGERIES[name]), SQUARE, LIMITS)
    assert outcome.passed != (True,) * 3
    assert sandbox.check(GOOD, SQUARE, Limits()).passed == (True,) * 3


def test_the_attacks_would_be_noticed(sandbox):
    """The programs above fail because they are stopped, not because REACHED never counts."""
    assert sandbox.run("print('REACHED')", "", Limits()).output == "REACHED\n"


def test_a_program_leaves_nothing_for_the_next(sandbox):
    if sandbox.isolation.namespaces:
        first = "open('left', 'w').write('x')\nimport math\nmath.pi = 3\nprint('REACHED')"
    else:
        first = "import math\nmath.pi = 3\nprint('REACHED')"
    second = (
        "import math, os\nprint('REACHED' if math.pi > 3 and not os.path.exists('left') else '')"
    )
    for program in (first, second):
        assert sandbox.run(program, "", Limits()).output == "REACHED\n"


def test_missing_isolation_is_said_once():
    sandbox = Sandbox(namespaces=False)
    with pytest.warns(RuntimeWarning, match="WITHOUT namespaces") as said:
        sandbox.run("", "", LIMITS)
    assert len(said) == 1
    sandbox.run("", "", LIMITS)  # a second warning would be an error
    assert not sandbox.isolation.namespaces
    sandbox.close()


def test_all_processes_end_with_a_worker_that_is_killed_during_a_run():
    code = """
        from jaxrl.rewards.sandbox.client import Sandbox
        from jaxrl.rewards.sandbox.limits import Limits
        Sandbox().run("while True: pass", "", Limits(wall_s=60.0))
    """
    worker = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        cwd=Path(__file__).parents[2],
    )
    _wait_until(lambda: len(_descendants(worker.pid)) == 3)  # zygote, supervisor, program
    descendants = _descendants(worker.pid)
    worker.kill()
    worker.wait()
    _wait_until(lambda: not any(map(_alive, descendants)))


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.perf_counter() + 30.0
    while not condition():
        assert time.perf_counter() < deadline_s
        time.sleep(0.01)


def _descendants(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    children = [int(child) for child in text.split()]
    return children + [grandchild for child in children for grandchild in _descendants(child)]


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
