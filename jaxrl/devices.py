"""Which devices do what: the learner's mesh and the rollout's, disjoint unless colocated."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jax
from jax.sharding import Mesh

from jaxrl.config import MeshConfig
from jaxrl.errors import UserError
from models.sharding import make_mesh
from roofline import machine
from roofline.machine import cache_folder, prefer_wide_vectors

MOST_DEVICES = 256
"""No node has more accelerators, and a CPU that poses as more takes minutes and gigabytes to start."""
_CUDA = ("gpu", "cuda")
_DECODE_ON_CUDA = {
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"
    ),
}
"""XLA's default list (docs: debug_options_flags.cc of openxla/xla) with loops and conditionals."""
_TRAIN_ON_CUDA = {"xla_gpu_enable_latency_hiding_scheduler": True}
"""docs.nvidia.com/jax-toolbox, performance-profiling/gpu-performance; so is the next."""
_GATHER_AHEAD = {"xla_gpu_enable_pipelined_all_gather": True}
_GATHER_AHEAD_NEWER = {"xla_gpu_pipeline_all_gather": "COLLECTIVE_PIPELINING_MODE_ON"}
"""As jaxlib 0.12 spells it."""
_HOST_COUNT_FLAG = "--xla_force_host_platform_device_count"


def start_devices(count: int) -> None:
    """What every program does before jax starts: `count` devices also on a CPU, code for its widest
    vectors, compiled programs kept.

    Raises:
        UserError: as `simulate_cpu_devices`.
    """
    prefer_wide_vectors()
    simulate_cpu_devices(count)
    remember_programs()


def simulate_cpu_devices(count: int) -> None:
    """Let the CPU pose as `count` devices. Call before jax starts; without effect on accelerators.

    Collectives of several simulated devices starve on jax 0.10 when there are fewer threads than
    waiting programs, hence PJRT_NPROC.

    Raises:
        UserError: more than one process can drive.
    """
    if count > MOST_DEVICES:
        raise UserError(
            f"the mesh.* sizes ask for {count} devices; one process drives at most {MOST_DEVICES}"
        )
    if _HOST_COUNT_FLAG in os.environ.get("XLA_FLAGS", ""):
        return
    if count > 2:
        os.environ.setdefault("PJRT_NPROC", "16")
    jax.config.update("jax_num_cpu_devices", count)


def remember_programs() -> None:
    """Keep compiled programs for later runs, unless jax was told where (JAX_COMPILATION_CACHE_DIR)."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("programs")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def keep_freed_memory() -> None:
    """`roofline.machine.keep_freed_memory` where programs run on the CPU. Call after jax has started."""
    machine.keep_freed_memory(jax.default_backend())


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


def make_meshes(mesh: MeshConfig, devices: Sequence[Any] | None = None) -> tuple[Mesh, Mesh]:
    """(learner mesh, rollout mesh) over the first of `devices`; None: those of this process.

    Raises:
        UserError: there are fewer devices than the configuration asks for.
    """
    devices = jax.local_devices() if devices is None else devices
    if len(devices) < mesh.devices:
        raise UserError(
            f"the meshes need {mesh.devices} devices (learner {mesh.learner_devices}, rollout "
            f"{mesh.rollout_devices}, mesh.colocated={mesh.colocated}), but there are "
            f"{len(devices)} ({devices[0].platform}); shrink the mesh.* sizes to at most {len(devices)} "
            "together, or set mesh.colocated=true"
        )
    first = 0 if mesh.colocated else mesh.learner_devices
    learner = make_mesh(
        devices[: mesh.learner_devices], data=mesh.learner_data, fsdp=mesh.learner_fsdp,
        tensor=mesh.learner_tensor,
    )  # fmt: skip
    rollout = make_mesh(
        devices[first : first + mesh.rollout_devices], data=mesh.rollout_data, fsdp=1,
        tensor=mesh.rollout_tensor,
    )  # fmt: skip
    return learner, rollout
