"""Which devices do what: the learner's mesh and the rollout's, disjoint unless colocated."""

from __future__ import annotations

import os

import jax
from jax.sharding import Mesh

from jaxrl.config import MeshConfig
from jaxrl.errors import UserError
from models.sharding import make_mesh

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
