"""What the kernels of a compiled program do: products, bytes moved, transfers to the host, large arrays.
Standard library only.

Flops are those of matrix products, wherever the compiler put them: a dot, a library call, a fusion.
Bytes are what a kernel must read and write: of an operand that a fusion only slices or gathers, what
it takes; of an array that it updates in place, what it writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from roofline.hlo import FREE, KINDS, Instruction, Module, Shape

GEMM_TARGETS = ("__cublas$", "__onednn$matmul")
FMHA_TARGET = "__cudnn$fmha"
HOST_OPCODES = frozenset({
    "infeed", "outfeed", "send", "recv", "send-done", "recv-done",
})  # fmt: skip
HOST_TARGETS = ("callback", "MoveToHost", "MoveToDevice", "annotate_device_placement")
HOST_SPACE = "S(5)"
"""In layouts: the array lies in the host's memory."""
NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "s8": "int8", "u8": "int8",
         "f8e4m3fn": "float8", "f8e5m2": "float8"}  # fmt: skip
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
_IN_PLACE = frozenset({"dynamic-update-slice", "scatter"})
_THROUGH = frozenset({"bitcast", "reshape"})
_DIMS = re.compile(r"(lhs|rhs)_(contracting|batch)_dim(?:ension)?s\"?[=:]?[{:\[]\s*([\"\d,]*)")
_SCORES = re.compile(r'intermediate_tensor_shape":\s*\{[^}]*?"dimensions":\s*\[([\d", ]+)\]')


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """One matrix product, [m, k] x [k, n], `batch` times."""

    m: int
    n: int
    k: int
    batch: int
    dtype: str

    @property
    def flops(self) -> float:
        """A multiply-add is two."""
        return 2.0 * self.batch * self.m * self.n * self.k


@dataclass(frozen=True, kw_only=True, slots=True)
class Operator:
    """One kernel of a program."""

    name: str
    kind: str
    """product, attention, fusion, custom-call, or the opcode of a kernel that is none of these."""
    scope: str
    times: int
    """How often one run executes it."""
    moved_bytes: float
    """Each time."""
    products: tuple[Product, ...] = ()
    attention_flops: float = 0.0
    """Of a fused attention kernel, each time."""

    @property
    def flops(self) -> float:
        """Each time."""
        return self.attention_flops + sum(product.flops for product in self.products)


def operators(module: Module, *, unknown_trips: int | None = None) -> tuple[Operator, ...]:
    """Every kernel that one run executes, collectives left out (`roofline.hlo`)."""
    found = []
    for name, times in module.executions(unknown_trips=unknown_trips).items():
        for one in module.computations.get(name, ()):
            if times and is_kernel(one):
                found.append(_operator(module, name, one, times))
    return tuple(found)


def is_kernel(one: Instruction) -> bool:
    """Whether the instruction is a kernel of its own, and no collective."""
    kind = one.opcode.removesuffix("-start").removesuffix("-done")
    return one.opcode not in FREE and kind not in KINDS and not one.opcode.endswith("-done")


def host_transfers(module: Module) -> tuple[str, ...]:
    """Names of the executed instructions that exchange data with the host."""
    return tuple(
        one.name
        for one, _ in module.executed()
        if one.opcode in HOST_OPCODES
        or any(part in one.target for part in HOST_TARGETS)
        or (one.opcode.startswith("copy") and HOST_SPACE in one.layout)
    )


def large_arrays(
    module: Module, *, dtype: str, size: int, dim: int | None = None
) -> tuple[tuple[str, Shape], ...]:
    """Arrays of at least `size` values, with `dim` among their dimensions, that kernels leave in memory."""
    found = []
    for one, _ in module.executed():
        if one.opcode in FREE:
            continue
        found += [
            (one.name, shape)
            for shape in one.shapes
            if shape.dtype == dtype and shape.size >= size and (dim is None or dim in shape.dims)
        ]
    return tuple(found)


def _operator(module: Module, where: str, one: Instruction, times: int) -> Operator:
    products = tuple(_products(module, where, one))
    scores = _attention_flops(one)
    kind = one.opcode
    if scores:
        kind = "attention"
    elif products:
        kind = "product"
    return Operator(
        name=one.name, kind=kind, scope=one.scope, times=times, products=products,
        attention_flops=scores, moved_bytes=_moved_bytes(module, where, one),
    )  # fmt: skip


def _products(module: Module, where: str, one: Instruction) -> Iterator[Product]:
    """Of the instruction itself, or of all computations inside its kernel."""
    if one.opcode == "dot" or one.target.startswith(GEMM_TARGETS):
        yield _product(module, where, one)
    elif one.opcode == "fusion":
        for inner in one.called:
            for part in module.computations.get(inner, ()):
                yield from _products(module, inner, part)


def _product(module: Module, where: str, one: Instruction) -> Product:
    left, right = (module.by_name[where][name].shapes[0] for name in one.operands[:2])
    dims: dict[tuple[str, str], tuple[int, ...]] = {}
    for side, role, numbers in _DIMS.findall(one.attributes):
        dims[side, role] = tuple(int(n) for n in numbers.replace('"', "").split(",") if n)
    summed = [left.dims[i] for i in dims.get(("lhs", "contracting"), ())]
    shared = [left.dims[i] for i in dims.get(("lhs", "batch"), ())]
    k, batch = math.prod(summed), math.prod(shared)
    return Product(
        m=left.size // (k * batch), n=right.size // (k * batch), k=k, batch=batch,
        dtype=NAMES.get(left.dtype, "float32"),
    )  # fmt: skip


def _attention_flops(one: Instruction) -> float:
    """4 B N T S H of a fused attention kernel (10 B N T S H backward), half of it if causal."""
    scores = _SCORES.search(one.attributes)
    if not one.target.startswith(FMHA_TARGET) or scores is None:
        return 0.0
    size = math.prod(int(n) for n in scores.group(1).replace('"', "").split(","))
    factor = 10.0 if "Backward" in one.target else 4.0
    causal = 0.5 if "CAUSAL" in one.attributes else 1.0
    return factor * causal * size * one.shapes[0].dims[-1]


# -- bytes -----------------------------------------------------------------------------------------


def _moved_bytes(module: Module, where: str, one: Instruction) -> float:
    here = module.by_name[where]
    operands = [here[name] for name in one.operands if name in here]
    if one.opcode == "fusion" and one.called:
        inner = one.called[0]
        read = sum(_read_bytes(module, inner, i, o) for i, o in enumerate(operands))
        return read + _written_bytes(module, inner, one)
    if one.opcode in _SLICES:
        return 2.0 * one.num_bytes
    if one.opcode in _IN_PLACE:
        return 2.0 * sum(o.num_bytes for o in operands[1:])
    if one.opcode in ("broadcast", "rng-bit-generator"):
        return float(one.num_bytes)
    return float(sum(o.num_bytes for o in operands) + one.num_bytes)


def _read_bytes(module: Module, inner: str, number: int, operand: Instruction) -> float:
    """Of one operand of a fusion, what its kernel reads."""
    body = module.computations[inner]
    parameter = next(
        (p for p in body if p.opcode == "parameter" and p.arguments.strip() == str(number)), None
    )
    if parameter is None:
        return operand.num_bytes
    total = 0.0
    for user, at in _users(body, parameter.name):
        if user.opcode in _SLICES and at == 0:
            total += user.num_bytes
        elif user.opcode in _IN_PLACE and at == 0:
            continue
        elif user.opcode == "fusion" and user.called:
            total += _read_bytes(module, user.called[0], at, operand)
        else:
            return operand.num_bytes
    return min(total, operand.num_bytes)


def _users(body: Sequence[Instruction], name: str) -> Iterator[tuple[Instruction, int]]:
    """Instructions that use a value, also through reshapes, with the place it has among operands."""
    for one in body:
        for at, operand in enumerate(one.operands):
            if operand == name and one.opcode in _THROUGH:
                yield from _users(body, one.name)
            elif operand == name:
                yield one, at


def _written_bytes(module: Module, inner: str, fusion: Instruction) -> float:
    """Of the result of a fusion, what its kernel writes."""
    here = module.by_name[inner]
    root = next((one for one in module.computations[inner] if one.is_root), None)
    if root is None:
        return fusion.num_bytes
    parts = [here[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return sum(_result_bytes(here, part) for part in parts)


def _result_bytes(here: Mapping[str, Instruction], one: Instruction) -> float:
    while one.opcode in _THROUGH:
        one = here[one.operands[0]]
    if one.opcode == "dynamic-update-slice":
        return here[one.operands[1]].num_bytes
    if one.opcode == "scatter":
        return here[one.operands[-1]].num_bytes
    return one.num_bytes
