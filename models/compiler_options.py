"""XLA options that the trainer's programs are compiled with, and calibration's programs like them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

import jax

_CUDA = ("gpu", "cuda")
_DECODE_ON_CUDA = {
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"
    ),
    "xla_gpu_graph_min_graph_size": 1,
}
"""XLA's default list (docs: debug_options_flags.cc of openxla/xla) with loops and conditionals; a loop counts
as one command, and by default fewer than five make no graph."""
_TRAIN_ON_CUDA = {"xla_gpu_enable_latency_hiding_scheduler": True}
"""docs.nvidia.com/jax-toolbox, performance-profiling/gpu-performance; so is the next."""
_GATHER_AHEAD = {"xla_gpu_enable_pipelined_all_gather": True}
_GATHER_AHEAD_NEWER = {"xla_gpu_pipeline_all_gather": "COLLECTIVE_PIPELINING_MODE_ON"}
"""As jaxlib 0.12 spells it."""


def decode_options(device: Any) -> dict[str, Any]:
    """Compiler options of the decode loop on `device`: the loop itself goes into the CUDA graph, so that no
    step waits for the host to read its condition. None on other platforms."""
    return accepted(_DECODE_ON_CUDA) if device.platform in _CUDA else {}


def train_options(device: Any) -> dict[str, Any]:
    """Compiler options of the learner's programs on `device`: collectives overlap with compute."""
    return accepted(_train_on_cuda()) if device.platform in _CUDA else {}


def _train_on_cuda() -> dict[str, Any]:
    older = all(_refusal(name, value) is None for name, value in _GATHER_AHEAD.items())
    return _TRAIN_ON_CUDA | (_GATHER_AHEAD if older else _GATHER_AHEAD_NEWER)


def accepted(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the XLA options that this jaxlib knows; the others are named on standard error.

    In XLA_FLAGS an unknown option ends the process; as an option of one program it raises.
    """
    known = {}
    for name, value in options.items():
        refusal = _refusal(name, value)
        if refusal is None:
            known[name] = value
        else:
            print(f"XLA option {name}={value} is left out: {refusal}", file=sys.stderr)
    return known


@cache
def _refusal(name: str, value: Any) -> str | None:
    """What jaxlib says against an option; None if it takes it."""
    program = jax.jit(lambda x: x, compiler_options={name: value})
    try:
        program.lower(jax.ShapeDtypeStruct((), "float32")).compile()
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        return str(error)
    return None
