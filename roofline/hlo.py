"""Collectives of a compiled program, read from its optimised HLO text. Standard library only."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32,
        "s64": 64, "u64": 64, "f64": 64}  # fmt: skip
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_WHILE = re.compile(r"body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations)=\{?%?([\w.\-]+)")
_LISTED = re.compile(r"replica_groups=\{\{([\d,{}]+)\}\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_MESH_AXIS = re.compile(r"'(\w+)'=(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledCollective:
    """One collective instruction of a program."""

    kind: str
    array_bytes: int
    """Bytes of its result on one device, all parts of a combined one together."""
    group: tuple[int, ...]
    """Devices of the first group that exchange with each other."""
    times: int
    """How often one run executes it: the product of the trip counts of the loops around it."""
    is_async: bool
    """Started and waited for separately, so that other work may run between."""


def compiled_collectives(text: str) -> tuple[CompiledCollective, ...]:
    """Every collective of an optimised HLO module.

    Raises:
        ValueError: a collective stands in a loop whose trip count the compiler did not record.
    """
    bodies = _computations(text)
    times = _executions(bodies)
    return tuple(
        _read(line, match, times[name])
        for name, lines in bodies.items()
        for line in lines
        if (match := _COLLECTIVE.search(line)) is not None
    )


def _computations(text: str) -> dict[str, list[str]]:
    """Lines of each computation by its name; the entry computation is called ENTRY."""
    bodies: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and "=" not in line.split("(")[0]:
            name = "ENTRY" if line.startswith("ENTRY") else header.group(1)
            current = bodies.setdefault(name, [])
        else:
            current.append(line)
    return bodies


def _executions(bodies: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs in one run of the entry; 0: trip count unknown."""
    times = dict.fromkeys(bodies, 0)
    pending = [("ENTRY", 1)]
    while pending:
        name, count = pending.pop()
        times[name] = times.get(name, 0) + count
        for line in bodies.get(name, ()):
            loop = _WHILE.search(line) if " while(" in line else None
            if loop:
                trips = _TRIPS.search(line)
                pending.append((loop.group(1), count * int(trips.group(1)) if trips else 0))
            else:
                pending += [(called, count) for called in _CALLED.findall(line)]
    return times


def _read(line: str, match: re.Match[str], times: int) -> CompiledCollective:
    if times == 0:
        raise ValueError(f"a collective in a loop of unknown length: {line.strip()[:200]}")
    return CompiledCollective(
        kind=match.group(2),
        array_bytes=sum(_bytes(*shape) for shape in _SHAPE.findall(match.group(1))),
        group=next(_groups(line), ()),
        times=times,
        is_async=match.group(3) is not None,
    )


def _bytes(dtype: str, dims: str) -> int:
    sizes = [int(size) for size in dims.split(",") if size]
    return math.prod(sizes) * BITS.get(dtype, 0) // 8


def _groups(line: str) -> Iterator[tuple[int, ...]]:
    """The replica groups: written out, as a transposed iota, or as axes of a mesh in device order."""
    listed = _LISTED.search(line)
    if listed:
        for group in listed.group(1).split("},{"):
            yield tuple(int(device) for device in group.split(","))
    iota = _IOTA.search(line)
    if iota:
        count, size = int(iota.group(1)), int(iota.group(2))
        dims = [int(d) for d in iota.group(3).split(",")]
        order = [int(d) for d in iota.group(4).split(",")] if iota.group(4) else range(len(dims))
        devices = _transposed(dims, list(order))
        for start in range(0, count * size, size):
            yield tuple(devices[start : start + size])
    mesh = _MESH.search(line)
    if mesh:
        sizes = {name: int(size) for name, size in _MESH_AXIS.findall(mesh.group(1))}
        along = re.findall(r"'(\w+)'", mesh.group(2))
        names = list(sizes)
        order = [names.index(name) for name in names if name not in along]
        order += [names.index(name) for name in along]
        size = math.prod(sizes[name] for name in along)
        devices = _transposed(list(sizes.values()), order)
        for start in range(0, len(devices), size):
            yield tuple(devices[start : start + size])


def _transposed(dims: Sequence[int], order: Sequence[int]) -> list[int]:
    """0..n-1 in the shape `dims`, transposed by `order`, read row by row."""
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    values = [0]
    for dim in order:
        values = [value + i * strides[dim] for value in values for i in range(dims[dim])]
    return values
