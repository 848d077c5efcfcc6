"""One phase's program, compiled and read."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from models.attention_kernels import lowering_for
from roofline.executable import Operator, host_transfers, large_arrays, operators
from roofline.hlo import CompiledCollective, Module, compiled_collectives, parse_module
from roofline.phases import Phase, PhaseCost
from roofline.rehearse.target import HOST
from roofline.traffic import Collective


@dataclass(frozen=True, kw_only=True)
class Program:
    """One jitted phase, what it is called with, and what is predicted of it."""

    phase: Phase
    lane: str
    """learner or rollout: whose devices it runs on."""
    function: Any
    """Result of `jax.jit`."""
    arguments: tuple[Any, ...]
    """Arrays as `jax.ShapeDtypeStruct` with shardings."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Static arguments by name."""
    mesh: Any
    cost: PhaseCost
    """Of one run."""
    traffic: tuple[Collective, ...]
    """Of one run."""
    memory: Mapping[str, int]
    """Bytes by name on one device while it runs."""
    resident: int
    """Bytes of its arguments that stay on the device before and after it."""
    trips: int | None = None
    """Of its loop whose end is computed."""
    tokens: int = 0
    """Tokens on one device whose logits must not all exist at once; 0: none are made."""
    vocab: tuple[int, ...] = ()
    """Sizes that the vocabulary may have in an array of one device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one device, as the compiler planned them."""

    arguments: int
    outputs: int
    aliased: int
    """Of the outputs, what takes over the memory of donated arguments."""
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        """Most that exists while the program runs: temporaries share one block that is held throughout."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


@dataclass(frozen=True, kw_only=True)
class Executable:
    """What one compiled program will do on each device."""

    program: Program
    compile_s: float
    memory: Memory
    donated: int
    """Bytes of arguments that the caller gives up."""
    collectives: tuple[CompiledCollective, ...]
    operators: tuple[Operator, ...]
    host_transfers: tuple[str, ...]
    whole_logits: tuple[str, ...]
    """float32 arrays that hold the logits of all tokens at once."""
    module: Module

    @property
    def flops(self) -> float:
        """Of matrix products, in one run."""
        return sum(one.times * one.flops for one in self.operators)

    @property
    def moved_bytes(self) -> float:
        """Of memory traffic, in one run."""
        return sum(one.times * one.moved_bytes for one in self.operators)

    @property
    def launches(self) -> int:
        """Kernels started in one run, collectives left out."""
        return sum(one.times for one in self.operators)

    @property
    def extra(self) -> int:
        """Bytes that its run needs beyond what is resident."""
        return self.memory.peak - self.program.resident


def compile_program(program: Program) -> Executable:
    """Lower and compile for the devices of its mesh; nothing runs."""
    began = time.perf_counter()
    with jax.set_mesh(program.mesh), lowering_for(program.mesh.devices.flat[0]):
        lowered = program.function.lower(*program.arguments, **program.options)
        compiled = lowered.compile(compiler_options=_compiler_options(program.mesh))
    seconds = time.perf_counter() - began
    module = parse_module(compiled.as_text())
    logits = (
        found
        for size in program.vocab
        for found in large_arrays(module, dtype="f32", size=program.tokens * size, dim=size)
    )
    return Executable(
        program=program,
        compile_s=seconds,
        memory=_memory(compiled),
        donated=_donated_bytes(lowered, program.arguments),
        collectives=compiled_collectives(module, unknown_trips=program.trips),
        operators=operators(module, unknown_trips=program.trips),
        host_transfers=host_transfers(module),
        whole_logits=tuple(f"{name} {shape}" for name, shape in logits) if program.tokens else (),
        module=module,
    )


def _compiler_options(mesh: Any) -> dict[str, Any]:
    """Kernels for an absent device are chosen by rules: there is none to time them on."""
    on_host = next(iter(mesh.devices.flat)).platform == HOST
    return {} if on_host else {"xla_gpu_autotune_level": 0}


def local_bytes(tree: Any) -> int:
    """Bytes of one device of arrays that carry shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _memory(compiled: Any) -> Memory:
    stats = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


def _donated_bytes(lowered: Any, arguments: tuple[Any, ...]) -> int:
    given, _ = lowered.args_info
    flags = [info.donated for info in jax.tree.leaves(given)]
    leaves = jax.tree.leaves(arguments)
    return sum(local_bytes(leaf) for leaf, gone in zip(leaves, flags, strict=True) if gone)
