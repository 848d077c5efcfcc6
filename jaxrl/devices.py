"""Which devices do what: the learner's mesh and the rollout's, disjoint unless colocated."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
from jax.sharding import Mesh

from jaxrl.config import MeshConfig
from jaxrl.errors import UserError
from models.sharding import make_mesh
from roofline import machine
from roofline.machine import (
    cache_folder,
    keep_freed_memory,
    prefer_wide_vectors,
    take_gpu_memory,
)

MOST_DEVICES = 256
"""No node has more accelerators, and a CPU that poses as more takes minutes and gigabytes to start."""
_COMPILED = "/jax/core/compile/backend_compile_duration"
_LONG_S = 0.2
"""Programs that compile faster leave little behind [seconds]."""
_LOWERED = (
    ("jax._src.pjit", "_pjit_lower"),
    ("jax._src.interpreters.pxla", "_cached_lowering_to_hlo"),
)
"""Where jax keeps what it compiled programs from, by module."""
_HOST_COUNT_FLAG = "--xla_force_host_platform_device_count"


def start_devices(count: int) -> None:
    """What every program does before jax starts: `count` devices also on a CPU, code for its widest
    vectors, compiled programs and freed memory kept, but for what the compiler frees; a GPU's memory taken.

    Raises:
        UserError: as `simulate_cpu_devices`.
    """
    prefer_wide_vectors()
    keep_freed_memory()
    give_back_after_compiling()
    simulate_cpu_devices(count)
    take_gpu_memory(os.environ)
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


@cache
def give_back_after_compiling() -> None:
    """From here on `forget_lowered` whenever a compilation ends, and after a long one give back what
    `keep_freed_memory` has kept: the compiler frees more than programs of a small model use. Once in a process:
    jax calls its listeners for ever."""

    def compiled(event: str, duration_secs: float, **_: Any) -> None:
        if event != _COMPILED:
            return
        forget_lowered()
        if duration_secs >= _LONG_S:
            machine.give_back_freed_memory()

    jax.monitoring.register_event_duration_secs_listener(compiled)


def forget_lowered() -> None:
    """Drop the modules that jax lowered and compiled, which it would keep for as long as their function lives:
    some 2 MB of a program (benchmarks/LOG.md).

    A compiled program runs without. One that jax calls the slow way, as those that call back into Python, would
    be compiled anew; there is none here. Caches that another version of jax has not are passed over.
    """
    for module, name in _LOWERED:
        lowered = getattr(sys.modules.get(module), name, None)
        if lowered is not None:
            lowered.cache_clear()


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
