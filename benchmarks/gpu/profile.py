"""The most expensive kernels of a run, from a jax.profiler trace.

Events count their own time: what runs inside a loop is not counted for the loop as well. Unrolled
layers are one entry: kernels are grouped by name without its number and by the operation they come
from (JAX's name stack, read from the compiled programs' text).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

SHOWN = 10
_NUMBER = re.compile(r"[._]\d+$")
_NAMED = re.compile(r"%?([\w.\-]+) = .*metadata=\{[^}]*op_name=\"([^\"]*)\"")


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One execution of one kernel."""

    kernel: str
    operation: str
    """Name in the compiled program; the same as the kernel's where the trace gives none."""
    program: str
    start_ns: float
    duration_ns: float


def most_expensive(
    run: Callable[[], Any], dump: Path | None = None, programs: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The SHOWN kernels that take most of the time of `run()`: name, source, calls, seconds, share.

    dump: folder into which XLA wrote its programs (--xla_dump_to), for the sources. programs: only kernels of
    those, and such as name none; empty: of all.

    Raises:
        RuntimeError: the trace holds no kernel, as where the GPU's profiling interface is missing, or none of
            these programs.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        traces = sorted(Path(folder).rglob("*.xplane.pb"))
        lines = [line for trace in traces for line in _lines(trace)]
    if not any(lines):
        raise RuntimeError("the profiler's trace holds no kernel: it cannot see this device")
    kernels = ranked(lines, {} if dump is None else sources(dump), programs)
    if not kernels:
        ran = sorted({event.program for line in lines for event in line})
        raise RuntimeError(f"the trace holds no kernel of {', '.join(programs)}, but of {ran}")
    return kernels


def _lines(trace: Path) -> list[list[Event]]:
    """Kernel events per thread or stream. A GPU's streams, or on a CPU the threads that run thunks."""
    data = jax.profiler.ProfileData.from_file(str(trace))
    on_gpu = any(plane.name.startswith("/device:GPU") for plane in data.planes)
    lines = []
    for plane in data.planes:
        if not plane.name.startswith("/device:GPU" if on_gpu else "/host:CPU"):
            continue
        for line in plane.lines:
            if on_gpu and not line.name.startswith("Stream"):
                continue
            lines.append([e for raw in line.events if (e := _event(raw, on_gpu)) is not None])
    return lines


def _event(raw: Any, on_gpu: bool) -> Event | None:
    stats = {str(key): value for key, value in raw.stats}
    operation = stats.get("hlo_op")
    if operation is None and not on_gpu:
        return None
    return Event(
        kernel=raw.name,
        operation=str(operation or raw.name),
        program=str(stats.get("hlo_module", "")),
        start_ns=raw.start_ns,
        duration_ns=raw.duration_ns,
    )


def sources(dump: Path) -> dict[tuple[str, str], str]:
    """(program, operation) -> JAX's name stack, from XLA's text dumps after optimization."""
    found: dict[tuple[str, str], str] = {}
    for path in dump.glob("*after_optimizations.txt"):
        text = path.read_text(encoding="utf-8", errors="replace")
        program = text.removeprefix("HloModule ").partition(",")[0]
        for name, source in _NAMED.findall(text):
            found.setdefault((program, name), source)
    return found


def ranked(
    lines: Iterable[Iterable[Event]], source_of: Mapping[tuple[str, str], str],
    programs: Sequence[str] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """The SHOWN groups of these programs' kernels with the largest sum of own times; shares are of them."""
    total: dict[tuple[str, str, str], list[float]] = {}
    for line in lines:
        for event, own_ns in own_times(line):
            if programs and event.program and event.program not in programs:
                continue
            source = source_of.get((event.program, event.operation), "")
            key = (_NUMBER.sub("", event.kernel), source, event.program)
            entry = total.setdefault(key, [0, 0.0])
            entry[0] += 1
            entry[1] += own_ns * 1e-9
    everything = sum(seconds for _, seconds in total.values())
    largest = sorted(total.items(), key=lambda item: -item[1][1])[:SHOWN]
    return [
        {
            "kernel": kernel, "source": source, "program": program, "calls": int(calls),
            "seconds": seconds, "share": seconds / everything,
        }
        for (kernel, source, program), (calls, seconds) in largest
    ]  # fmt: skip


def own_times(line: Iterable[Event]) -> list[tuple[Event, float]]:
    """Each event of one thread or stream with its duration minus that of the events inside it [ns]."""
    own: list[list[Any]] = []
    open_: list[tuple[float, int]] = []  # end, index into own
    for event in sorted(line, key=lambda e: (e.start_ns, -e.duration_ns)):
        while open_ and open_[-1][0] <= event.start_ns:
            open_.pop()
        if open_:
            own[open_[-1][1]][1] -= event.duration_ns
        open_.append((event.start_ns + event.duration_ns, len(own)))
        own.append([event, event.duration_ns])
    return [(event, max(0.0, ns)) for event, ns in own]
