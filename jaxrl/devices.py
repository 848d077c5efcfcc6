"""Which devices do what: the learner's mesh and the rollout's, disjoint unless colocated."""

from __future__ import annotations

import ctypes
import os
import platform

import jax
from jax.sharding import Mesh

from jaxrl.config import MeshConfig
from jaxrl.errors import UserError
from models.sharding import make_mesh
from roofline.machine import cache_folder

_MALLOC_OPTIONS = (
    (-4, 0),  # M_MMAP_MAX: no block gets a mapping of its own
    (-1, 2**31 - 1),  # M_TRIM_THRESHOLD: the heap's end is not given back
    (-8, 1),  # M_ARENA_MAX: one heap, since only the first may grow without limit
)
_HOST_COUNT_FLAG = "--xla_force_host_platform_device_count"


def simulate_cpu_devices(count: int) -> None:
    """Let the CPU pose as `count` devices. Call before jax starts; without effect on accelerators.

    Collectives of several simulated devices starve on jax 0.10 when there are fewer threads than
    waiting programs, hence PJRT_NPROC.
    """
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
    """On a CPU with glibc, let the process keep freed memory instead of giving it back to the system.

    XLA allocates the temporaries of every call anew; as fresh pages they fault one by one, which takes a
    third of a training step (benchmarks/LOG.md). Call after jax has started; elsewhere it does nothing.
    """
    if jax.default_backend() != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    glibc = ctypes.CDLL(None)
    for option, value in _MALLOC_OPTIONS:
        glibc.mallopt(option, value)


def make_meshes(mesh: MeshConfig) -> tuple[Mesh, Mesh]:
    """(learner mesh, rollout mesh) over the first devices of this process.

    Raises:
        UserError: there are fewer devices than the configuration asks for.
    """
    devices = jax.local_devices()
    if len(devices) < mesh.devices:
        raise UserError(
            f"the meshes need {mesh.devices} devices (learner {mesh.learner_devices}, rollout "
            f"{mesh.rollout_devices}, mesh.colocated={mesh.colocated}), but this process has "
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
