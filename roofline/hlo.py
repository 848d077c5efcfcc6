"""A compiled program as its optimised HLO text says it: instructions, how often each one runs, and its
collectives. Standard library only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "s16": 16,
        "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64,
        "f64": 64}  # fmt: skip
"""Of one value by HLO type; others (token, opaque) take no memory."""
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
    "opt-barrier", "partition-id", "replica-id", "while", "conditional", "call",
})  # fmt: skip
"""Instructions that are no kernel of their own."""

_SHAPE = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_START = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([\w\-]+)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_ALIAS = re.compile(r"\{([\d,]*)\}: \((\d+),")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,{}]+)\}\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_MESH_AXIS = re.compile(r"'(\w+)'=(\d+)")


@dataclass(frozen=True, slots=True)
class Shape:
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Values."""
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        """Bytes, without padding."""
        return self.size * BITS.get(self.dtype, 0) // 8


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Of the result, a tuple's parts one after another."""
    layout: str
    """The result's type as printed, memory spaces included."""
    arguments: str
    """Between its parentheses: operands, a parameter's number, a constant's value."""
    attributes: str
    """The rest of the line."""
    is_root: bool

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of instructions of the same computation."""
        return tuple(_OPERAND.findall(self.arguments))

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole result."""
        return sum(shape.num_bytes for shape in self.shapes)

    @property
    def called(self) -> tuple[str, ...]:
        """Computations it names: bodies, conditions, branches, fused computations, reducers."""
        names: list[str] = []
        for one, several in _CALLED.findall(self.attributes):
            names += [one] if one else [name.strip(" %") for name in several.split(",")]
        return tuple(names)

    @property
    def runs(self) -> tuple[str, ...]:
        """Computations whose instructions run when it runs; not those inside one kernel."""
        flow = self.opcode in ("while", "conditional", "call") or self.opcode.endswith("-start")
        return self.called if flow and not self.opcode.startswith("all-reduce") else ()

    @property
    def target(self) -> str:
        """Of a custom call, what it calls; else empty."""
        found = re.search(r'custom_call_target="([^"]+)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def scope(self) -> str:
        """Where in the Python program it comes from; empty where the compiler lost that."""
        found = re.search(r'op_name="([^"]+)"', self.attributes)
        return found.group(1) if found else ""


@dataclass(frozen=True)
class Module:
    """A program: its computations in the order the compiler scheduled them."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str
    header: str

    @cached_property
    def by_name(self) -> Mapping[str, Mapping[str, Instruction]]:
        """Instructions of each computation by name."""
        return {name: {one.name: one for one in body} for name, body in self.computations.items()}

    @property
    def aliased_parameters(self) -> frozenset[int]:
        """Numbers of the parameters whose memory an output takes over."""
        start = self.header.find("input_output_alias={")
        if start < 0:
            return frozenset()
        found = _ALIAS.findall(self.header[start:].partition("entry_computation_layout")[0])
        return frozenset(int(parameter) for _, parameter in found)

    def executions(self, *, unknown_trips: int | None = None) -> dict[str, int]:
        """How often one run executes each computation; absent: it is part of a kernel.

        `unknown_trips`: of loops that end on a computed condition; without it they count 0. Every
        branch of a conditional counts as taken.
        """
        times: dict[str, int] = {}
        pending = [(self.entry, 1)]
        while pending:
            name, count = pending.pop()
            times[name] = times.get(name, 0) + count
            for one in self.computations.get(name, ()):
                inner = count
                if one.opcode == "while":
                    trips = _TRIPS.search(one.attributes)
                    inner *= int(trips.group(1)) if trips else unknown_trips or 0
                pending += [(called, inner) for called in one.runs]
        return times

    def executed(self, *, unknown_trips: int | None = None) -> Iterator[tuple[Instruction, int]]:
        """Every instruction outside of kernels with how often it runs."""
        for name, count in self.executions(unknown_trips=unknown_trips).items():
            for one in self.computations.get(name, ()):
                yield one, count


def parse_module(text: str) -> Module:
    """The module that `compiled.as_text()` prints.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, tuple[Instruction, ...]] = {}
    current: list[Instruction] = []
    name, entry, header = "", None, ""
    for line in text.splitlines():
        if line.startswith("HloModule"):
            header = line
        elif (begin := _HEADER.match(line)) and "=" not in line.split("(")[0]:
            name, current = begin.group(2), []
            entry = name if begin.group(1) else entry
        elif line.startswith("}"):
            computations[name] = tuple(current)
        elif (start := _START.match(line)) is not None:
            current.append(_instruction(line, start))
    if entry is None:
        raise ValueError("not the text of a compiled program: it has no ENTRY computation")
    return Module(computations=computations, entry=entry, header=header)


def _instruction(line: str, start: re.Match[str]) -> Instruction:
    at = start.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        raise ValueError(f"not an HLO instruction: {line.strip()[:200]}")
    last = _closing(line, opcode.end() - 1)
    shapes = (Shape(d, _numbers(dims)) for d, dims in _SHAPE.findall(line[at:end]))
    return Instruction(
        name=start.group(2),
        opcode=opcode.group(1),
        shapes=tuple(shapes),
        layout=line[at:end],
        arguments=line[opcode.end() : last],
        attributes=line[last + 1 :],
        is_root=start.group(1) is not None,
    )


def _closing(line: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for at in range(opening, len(line)):
        depth += {"(": 1, ")": -1}.get(line[at], 0)
        if depth == 0:
            return at
    raise ValueError(f"an open parenthesis in {line.strip()[:200]}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


# -- collectives -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledCollective:
    """One collective instruction of a program."""

    name: str
    kind: str
    array_bytes: int
    """Bytes of its result on one device, all parts of a combined one together."""
    group: tuple[int, ...]
    """Devices of the first group that exchange with each other; empty: all."""
    times: int
    """How often one run executes it: the product of the trip counts of the loops around it."""
    is_async: bool
    """Started and waited for separately, so that other work may run between."""
    hidden_by: int
    """Kernels that the compiler scheduled between its start and its end; 0: nothing hides it."""

    @property
    def whole_bytes(self) -> int:
        """Bytes of the whole array on one device: gathered, before scattering, or reduced."""
        parts = len(self.group) if self.kind == "reduce-scatter" else 1
        return self.array_bytes * parts


def compiled_collectives(
    program: str | Module, *, unknown_trips: int | None = None
) -> tuple[CompiledCollective, ...]:
    """Every collective of an optimised HLO module, given as text or parsed.

    Raises:
        ValueError: a collective stands in a loop whose trip count neither the compiler recorded nor
            `unknown_trips` gives.
    """
    module = parse_module(program) if isinstance(program, str) else program
    found: list[CompiledCollective] = []
    for name, times in module.executions(unknown_trips=unknown_trips).items():
        body = module.computations.get(name, ())
        for at, one in enumerate(body):
            kind = one.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            if times == 0:
                raise ValueError(f"a collective in a loop of unknown length: {one.name}")
            found.append(_collective(kind, body, at, times))
    return tuple(found)


def _collective(kind: str, body: Sequence[Instruction], at: int, times: int) -> CompiledCollective:
    begun = ended = body[at]
    hidden_by = 0
    if begun.opcode.endswith("-start"):
        for after in body[at + 1 :]:
            if begun.name in after.operands and after.opcode.endswith("-done"):
                ended = after
                break
            hidden_by += _is_kernel(after)
    waits = '"is_sync":true' in begun.attributes  # the compiler found nothing to run meanwhile
    return CompiledCollective(
        name=begun.name,
        kind=kind,
        array_bytes=ended.num_bytes,
        group=next(_groups(begun.attributes), ()),
        times=times,
        is_async=begun is not ended and not waits,
        hidden_by=hidden_by,
    )


def _is_kernel(one: Instruction) -> bool:
    return one.opcode not in FREE and not one.opcode.endswith(("-start", "-done"))


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
