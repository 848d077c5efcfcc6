"""The suite's command: which cases are left, one process after another, every result stored at once.

    python benchmarks/gpu_suite.py [--minutes 8] [--only decode,train,...] [--profile] [--device cpu]

The same command again goes on where the last one was stopped, whether by --minutes or by a kill. A case
begins only if as much time is left as the longest of its kind took; one that was cut off, by the time or with
the whole call, comes again after the others, as does one that failed. A process that dies, or that needs longer
than a case may, costs its own case alone.
Where results are copied between machines, put the file back into --out (or benchmarks/results) first.
Processes follow one another, so that jaxrl and PyTorch never share the device's memory. Loads no jax.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.gpu.card import TOOL, Watch, standing, watching
from benchmarks.gpu.cases import GPU, KINDS, TINY, Case, Scale
from benchmarks.gpu.report import attention_table, report
from benchmarks.gpu.store import CUT_OFF, Store
from roofline.machine import processor, take_gpu_memory

PEERS_PYTHON = (sys.executable, str(record.ROOT / ".venv-peers/bin/python"))
"""Interpreters that may have torch and transformers, first match wins."""
WORKER = ("-m", "benchmarks.gpu.worker")
"""What this interpreter is given to run jaxrl's cases."""
LOG_CHARACTERS = 2000
TO_STOP_S = 5.0
"""Kept of the time of a call to end its processes and write the tables [s]."""
START_TRIES = 2
"""Processes that end before they are ready, after which no other of that kind is started in this call."""
CPU_RESULTS = record.ROOT / "runs" / "gpu_suite"


@dataclass(frozen=True, kw_only=True)
class Call:
    """What this call of the suite is to do."""

    scale: Scale
    device: str
    """gpu or cpu."""
    kinds: Sequence[str]
    deadline_s: float
    """On time.monotonic."""
    profile: bool
    models: Sequence[str]


@dataclass
class Limit:
    """How long a process may go on; its cases have limits of their own."""

    at_s: float
    """On time.monotonic."""


class NeverReady(Exception):
    """A process could not start: what ails it ails the others of its kind."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is left, write JSON and Markdown; exit code 1 if a case failed."""
    began = time.monotonic()
    options = _options(argv)
    scale = TINY if options.device == "cpu" else GPU
    out = options.out or (CPU_RESULTS if options.device == "cpu" else record.RESULTS)
    store = Store.open(
        out,
        scale,
        device_name(options.device),
        options.commit,
        profiled=options.profile,
        mixed=options.mixed,
    )
    call = Call(
        scale=scale, device=options.device, kinds=options.only, profile=options.profile,
        deadline_s=began + 60 * options.minutes - TO_STOP_S,
        models=options.models or list(scale.models),
    )  # fmt: skip
    left = run(call, store)
    failed = [name for name, r in store.outcomes.items() if r["status"] == "failed"]
    print(
        f"{store.path.name}: {left or 'nothing'} left to do"
        + (f", failed: {failed}" if failed else "")
    )
    sys.exit(1 if failed else 0)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_suite.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after so long")
    parser.add_argument("--only", type=lambda s: s.split(","), default=list(KINDS))
    parser.add_argument("--models", type=lambda s: s.split(","), help="some of the models")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu", help="cpu: tiny shapes")
    parser.add_argument("--profile", action="store_true", help="save kernels instead of times")
    parser.add_argument(
        "--mixed", action="store_true",
        help="go on with the newest results also where sources have changed since; they say so",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--commit", help="what is measured, where the checkout has no git")
    options = parser.parse_args(argv)
    if unknown := set(options.only) - set(KINDS):
        parser.error(f"--only: unknown {sorted(unknown)}; known: {', '.join(KINDS)}")
    known = list((TINY if options.device == "cpu" else GPU).models)
    if unknown := set(options.models or ()) - set(known):
        parser.error(f"--models: unknown {sorted(unknown)}; known: {', '.join(known)}")
    return options


def device_name(device: str) -> str:
    """The first GPU as its driver names it, or the processor; exits where there is no GPU."""
    if device == "cpu":
        return processor()
    if name := standing().get("name"):
        return name
    look = "import jax; print(jax.devices()[0].device_kind)"  # an image may lack the driver's tools
    done = subprocess.run(
        [sys.executable, "-c", look], env={**os.environ, "JAX_PLATFORMS": "cuda"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode or not done.stdout.strip():
        last = (done.stderr.strip().splitlines() or ["no word why"])[-1]
        sys.exit(
            f"no CUDA device was found: {TOOL} names none, and jax ends with {last}. Are its driver and jax's "
            "CUDA plug-in (jax[cuda12] or jax[cuda13]) installed? --device cpu runs tiny shapes"
        )
    return done.stdout.splitlines()[-1].strip()


def run(call: Call, store: Store) -> int:
    """Run cases until none is left or the time is over; returns how many are left."""
    unable: set[bool] = set()  # PyTorch's processes, or ours
    with watching() as card:
        if call.device == "gpu":
            store.content["provenance"]["card"] = standing()
        for _, group in groupby(_wanted(call, store), key=lambda case: case.process):
            cases, tries = list(group), START_TRIES
            peers = cases[0].kind == "peers"
            while cases and peers not in unable and _fits(call, store, cases[0]):
                try:
                    cases = _run_group(call, store, card, cases)
                except NeverReady as error:
                    print(error, file=sys.stderr)
                    tries -= 1
                    if not tries:
                        unable.add(peers)
    _write_report(store)
    return len(_wanted(call, store))


def _run_group(call: Call, store: Store, card: Watch, cases: Sequence[Case]) -> list[Case]:
    """One process for cases that share it; returns those that its early end has left. Raises: NeverReady."""
    if cases[0].kind != "peers":
        return _run_process(call, store, card, cases, [sys.executable, *WORKER])
    python = next((path for path in PEERS_PYTHON if _has_torch(path)), None)
    if python is not None:
        return _run_process(call, store, card, cases, [python, "-m", "benchmarks.gpu.peers_torch"])
    why = "torch and transformers are not installed here"
    print(f"peers: skipped, {why}")
    for case in cases:
        store.put(case.name, {"status": "skipped", "why": why})
    return []


def _fits(call: Call, store: Store, case: Case) -> bool:
    """Whether as much time is left as the case is expected to take."""
    left_s = call.deadline_s - time.monotonic()
    return left_s > 0 and left_s >= store.expected_s(case, call.scale)


def _wanted(call: Call, store: Store) -> list[Case]:
    """Unfinished cases of the chosen kinds, and the calibrations that they need; those that were tried and
    did not succeed last, so that none of them keeps the others waiting."""
    cases = [case for case in call.scale.cases() if case.model in call.models]
    cases = [case for case in cases if not store.is_finished(case)]
    chosen = [case for case in cases if case.kind in call.kinds]
    ours = [case for case in chosen if case.kind not in ("calibrate", "peers")]
    if call.profile:
        return sorted(ours, key=store.was_tried)
    needed = {case.model for case in ours}
    wanted = [
        case for case in cases
        if case in chosen or (case.kind == "calibrate" and case.model in needed)
    ]  # fmt: skip
    return sorted(wanted, key=store.was_tried)


def _write_report(store: Store) -> None:
    store.path.parent.mkdir(parents=True, exist_ok=True)
    store.path.with_suffix(".md").write_text(report(store.content), encoding="utf-8")


def _has_torch(python: str) -> bool:
    if not Path(python).is_file():
        return False
    look = (
        "import importlib.util as u, sys; "
        "sys.exit(not (u.find_spec('torch') and u.find_spec('transformers')))"
    )
    return subprocess.run([python, "-c", look], capture_output=True, check=False).returncode == 0


def _run_process(
    call: Call, store: Store, card: Watch, cases: Sequence[Case], command: Sequence[str]
) -> list[Case]:
    """One process for these cases. One that was begun when it ends early has failed, or was cut off if the
    time was over; returns the cases behind it, which it never came to. A case that does not succeed is its
    process's last, and nobody waits for a process to end after its last case.

    Raises: NeverReady, if it ends before it says what it runs on; its first case has failed.
    """
    with tempfile.TemporaryDirectory() as dump, _started(call, command, dump) as (process, log):
        _send(process, _job(call, store, cases, dump))
        ready, begun, since_s, limit = False, "", time.monotonic(), Limit(call.deadline_s)
        for answer in _answers(process, limit):
            if answer is None:
                break
            if "ready" in answer:
                ready = True
                store.content["provenance"].setdefault("seen", {}).update(answer["ready"])
            elif "begun" in answer:
                begun, since_s = answer["begun"], time.monotonic()
                limit.at_s = min(call.deadline_s, since_s + call.scale.longest_s)
                store.begin(begun)
            else:
                clocks = card.between(since_s, time.monotonic())
                result = answer["result"] | ({"card": clocks} if clocks else {})
                store.put(answer["ended"], result)
                _write_report(store)
                print(_line(answer["ended"], result), flush=True)
                if result["status"] != "done" or answer["ended"] == cases[-1].name:
                    return _behind(cases, answer["ended"])
                begun, limit.at_s = "", call.deadline_s
        else:
            if ready and not begun:
                return []
            told = f"the process of {begun or cases[0].name} ended early:\n{_end_of(log)}"
            why = f"its process ended early with code {process.wait()}"
            store.put(begun or cases[0].name, {"status": "failed", "why": why})
            if not begun:
                raise NeverReady(told)
            print(told, file=sys.stderr)
            return _behind(cases, begun)
    return _too_late(call, store, cases, begun, time.monotonic() - since_s)


def _end_of(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-LOG_CHARACTERS:]


def _too_late(
    call: Call, store: Store, cases: Sequence[Case], begun: str, seconds: float
) -> list[Case]:
    """Store what became of the case during which a limit was reached; returns those behind it."""
    if not begun:
        return []
    over = time.monotonic() >= call.deadline_s
    why = f"not done after {seconds:.0f} s" + (", when the call ended" if over else "")
    status = CUT_OFF if over else "failed"
    print(f"{begun}: {status}, {why}" + ("; give it more --minutes" if over else ""))
    store.put(begun, {"status": status, "why": why, "wall_s": seconds})
    return _behind(cases, begun)


def _behind(cases: Sequence[Case], name: str) -> list[Case]:
    names = [case.name for case in cases]
    return list(cases[names.index(name) + 1 :])


def _job(call: Call, store: Store, cases: Sequence[Case], dump: str) -> dict[str, Any]:
    hardware = store.hardware(cases[0].model)
    return {
        "scale": call.scale.name, "device": call.device, "profile": call.profile,
        "cases": [dataclasses.asdict(case) for case in cases],
        "expected_s": [store.expected_s(case, call.scale) for case in cases],
        "left_s": call.deadline_s - time.monotonic(),
        "dump": dump if call.profile else None,
        "attention": attention_table([store.content]),
        "hardware": None if hardware is None else hardware.to_json(),
    }  # fmt: skip


def _send(process: subprocess.Popen[str], job: dict[str, Any]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it ended already: told by its caller
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()  # and not closed: `benchmarks.gpu.protocol` ends with it


@contextlib.contextmanager
def _started(
    call: Call, command: Sequence[str], dump: str
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """The process and its log; killed on leaving if it still runs."""
    given = os.environ.get("PYTHONPATH")  # where an image's packages may lie
    paths = filter(None, (str(record.ROOT), given))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    environment["JAX_PLATFORMS"] = "cpu" if call.device == "cpu" else "cuda"
    take_gpu_memory(environment)
    if call.profile:
        flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flags}"
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        try:
            yield process, log
        finally:
            process.kill()
            process.wait()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


def _answers(process: subprocess.Popen[str], limit: Limit) -> Iterator[dict[str, Any] | None]:
    """The process's answers until it ends; None, as the last, once the limit is reached."""
    lines: queue.Queue[str] = queue.Queue()
    stdout = process.stdout
    assert stdout is not None

    def read() -> None:
        for line in stdout:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(0.0, limit.at_s - time.monotonic()))
        except queue.Empty:
            yield None
            return
        if not line:
            return
        yield json.loads(line)


def _line(name: str, result: dict[str, Any]) -> str:
    """What is printed as soon as a case ends."""
    if result["status"] != "done":
        return f"{name}: {result['status']}, {result['why']}"
    if "measured_s" not in result:
        return f"{name}: done in {result['wall_s']:.0f} s"
    words = f"{name}: {1e3 * result['measured_s']['median']:.2f} ms"
    if "share_of_bound" in result:
        words += f", {result['share_of_bound']:.0%} of the bound, {result['ratio']:.2f} x predicted"
        words += "" if result["calibrated"] else " by the datasheet"
    return words
