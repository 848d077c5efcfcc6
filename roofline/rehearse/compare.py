"""Predicted beside compiled, line by line, and what must hold of an executable. Standard library only."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from roofline.hardware import Hardware
from roofline.memory import HELD
from roofline.phases import Phase
from roofline.predict import predict
from roofline.rehearse.timing import Timing, time_program

if TYPE_CHECKING:
    from roofline.rehearse.executable import Executable

SMALL_SHARE = 0.001
"""Collectives of less than this share of all bytes (norms, scalars) are asked for nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One quantity of one program on one device."""

    name: str
    unit: str
    predicted: float
    compiled: float

    @property
    def ratio(self) -> float | None:
        """Compiled over predicted; None where nothing was predicted."""
        return self.compiled / self.predicted if self.predicted else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One property of an executable."""

    name: str
    holds: bool
    found: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Seconds:
    """Times of one run of a program [s]."""

    lower: float
    """The book's bound: everything overlaps."""
    upper: float
    """Nothing overlaps."""
    analytic: float
    """From `roofline.cost`, with the device's shares and fixed times."""
    operators: Timing
    """From the executable's own operators."""


def lines(executable: Executable) -> tuple[Line, ...]:
    """Work, collectives and memory of one run on one device."""
    program, memory = executable.program, executable.memory
    cost = program.cost
    planned = sum(program.memory.values())
    rows = [
        Line(name="flops", unit="flop", predicted=cost.flops, compiled=executable.flops),
        Line(
            name="memory traffic", unit="byte", predicted=cost.hbm_bytes,
            compiled=executable.moved_bytes,
        ),
        Line(name="kernels", unit="", predicted=cost.launches, compiled=executable.launches),
        *_collective_lines(executable),
        Line(
            name="arguments", unit="byte", compiled=memory.arguments,
            predicted=sum(n for name, n in program.memory.items() if name in HELD),
        ),
        Line(name="peak memory", unit="byte", predicted=planned, compiled=memory.peak),
    ]  # fmt: skip
    return tuple(rows)


def _collective_lines(executable: Executable) -> list[Line]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for one in executable.collectives:
        counts[one.kind] += one.times
        sizes[one.kind] += one.times * one.whole_bytes
    expected: Counter[str] = Counter()
    bytes_of: Counter[str] = Counter()
    for one in executable.program.traffic:
        expected[one.kind] += one.count
        bytes_of[one.kind] += round(one.count * one.array_bytes)
    return [
        line
        for kind in sorted(counts | expected)
        for line in (
            Line(name=f"{kind}, number", unit="", predicted=expected[kind], compiled=counts[kind]),
            Line(
                name=f"{kind}, arrays", unit="byte", predicted=bytes_of[kind], compiled=sizes[kind]
            ),
        )
    ]


def seconds(executable: Executable, hardware: Hardware) -> Seconds:
    """Both predictions of one run.

    Raises:
        ValueError: hardware without operator models.
    """
    analytic = predict(executable.program.cost, hardware)
    timing = time_program(executable.module, executable.operators, executable.collectives, hardware)
    return Seconds(
        lower=analytic.lower_s, upper=analytic.upper_s, analytic=analytic.expected_s,
        operators=timing,
    )  # fmt: skip


def checks(executable: Executable) -> tuple[Check, ...]:
    """What must hold: donated memory is taken over, nothing goes through the host, logits never
    exist all at once, and large gathers and scatters run beside other work."""
    memory, program = executable.memory, executable.program
    found = [
        Check(
            name="donated buffers reused",
            holds=memory.aliased >= executable.donated,
            found=f"{memory.aliased} of {executable.donated} bytes",
        ),
        Check(
            name="no transfer to or from the host",
            holds=not executable.host_transfers,
            found=", ".join(executable.host_transfers) or "none",
        ),
    ]
    if program.tokens:
        found.append(
            Check(
                name=f"no float32 logits of all {program.tokens} tokens",
                holds=not executable.whole_logits,
                found="; ".join(executable.whole_logits) or "none",
            )
        )
    if program.phase in (Phase.TRAIN, Phase.SCORE) and executable.collectives:
        found.append(_overlap(executable))
    return tuple(found)


def _overlap(executable: Executable) -> Check:
    """All-gathers and reduce-scatters of weights are started early and waited for late."""
    wanted = [one for one in executable.collectives if one.kind in ("all-gather", "reduce-scatter")]
    total = sum(one.times * one.whole_bytes for one in wanted)
    large = [one for one in wanted if one.times * one.whole_bytes > SMALL_SHARE * total]
    waiting = [one.name for one in large if not one.is_async]
    moved = sum(one.times * one.whole_bytes for one in large if one.is_async and one.hidden_by)
    share = moved / total if total else math.nan
    return Check(
        name="gathers and reduce-scatters asynchronous",
        holds=not waiting,
        found=f"{len(large) - len(waiting)} of {len(large)}, {share:.0%} of their bytes beside kernels"
        + (f"; waiting: {', '.join(waiting[:5])}" if waiting else ""),
    )


def to_json(executables: Sequence[Executable], hardware: Hardware | None) -> list[dict[str, Any]]:
    """Plain values, one entry per program; `hardware` None: without times."""
    return [
        {
            "phase": one.program.phase.value,
            "lane": one.program.lane,
            "compile_s": round(one.compile_s, 1),
            "memory": {**dataclasses.asdict(one.memory), "peak": one.memory.peak},
            "planned_memory": dict(one.program.memory),
            "lines": [
                {**dataclasses.asdict(line), "ratio": line.ratio} for line in lines(one)
            ],
            "checks": [dataclasses.asdict(check) for check in checks(one)],
            "seconds": None if hardware is None else dataclasses.asdict(seconds(one, hardware)),
            "kernels": dict(Counter(op.kind for op in one.operators)),
            "custom_calls": dict(Counter(op.name.split(".")[0] for op in one.operators
                                         if op.kind == "custom-call")),
            "collectives": [
                {
                    "kind": c.kind, "bytes": c.whole_bytes, "devices": len(c.group),
                    "times": c.times, "asynchronous": c.is_async, "kernels_beside": c.hidden_by,
                }
                for c in one.collectives
            ],
        }
        for one in executables
    ]  # fmt: skip
