"""Two buffers of weights on the rollout devices: one in use, one arriving.

    learner thread                                   rollout thread
    publish(v, policy):                              current():  between two decode chunks
      cast + reshard inside jit, on the learner        if new weights have arrived, use them from
      mesh, to shards that match the rollout's         here on; the old buffer is freed
      device_put: device to device, no host
      wait until arrived, then offer

A transfer between unlike layouts would silently go through the host; so the reshard happens inside
jit on the learner's devices, into a layout whose shard indices equal the rollout's. jit also gives the
snapshot buffers of its own: an eager cast to the same dtype would alias the learner's, which it donates.
"""

from __future__ import annotations

import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl.tracing import num_traces
from jaxrl.types import Snapshot
from models.config import ModelConfig
from models.decoder import Decoder
from models.sharding import make_mesh, policy_shardings


def _cast(policy: Decoder, dtype: jnp.dtype) -> Decoder:
    return jax.tree.map(lambda x: jnp.array(x, dtype=dtype, copy=True), policy)


class WeightStore:
    """Publishes the learner's weights to the rollout devices and hands out the newest."""

    def __init__(
        self, config: ModelConfig, *, learner_mesh: Mesh, rollout_mesh: Mesh, dtype: jnp.dtype
    ) -> None:
        self._rollout = policy_shardings(config, rollout_mesh)
        self._cast = jax.jit(
            partial(_cast, dtype=dtype),
            out_shardings=matching_shardings(config, learner_mesh, rollout_mesh),
        )
        self._lock = threading.Lock()
        self._in_use: Snapshot | None = None
        self._arrived: Snapshot | None = None

    @property
    def trace_count(self) -> int:
        """Programs traced so far."""
        return num_traces(self._cast)

    def publish(self, version: int, policy: Decoder) -> Snapshot:
        """Copy `policy` to the rollout devices as `version`; returns once it has arrived there.

        An older copy that arrived but was never used is dropped first, so at most two exist.
        """
        with self._lock:
            self._arrived = None
        copy = jax.device_put(self._cast(policy), self._rollout)
        snapshot = Snapshot(version=version, policy=jax.block_until_ready(copy))
        with self._lock:
            self._arrived = snapshot
        return snapshot

    def current(self) -> Snapshot:
        """The newest weights that have arrived. For the one thread that samples."""
        with self._lock:
            if self._arrived is not None:
                self._in_use, self._arrived = self._arrived, None
            if self._in_use is None:
                raise RuntimeError("no weights were published before sampling began")
            return self._in_use


def matching_shardings(config: ModelConfig, learner_mesh: Mesh, rollout_mesh: Mesh) -> Decoder:
    """Shardings on the learner's devices whose shard indices equal those on the rollout mesh.

    The learner's devices are viewed as (copies, tensor) with the rollout's tensor size where that
    divides them; else every device gets a full copy.
    """
    devices = np.asarray(learner_mesh.devices).reshape(-1)
    tensor = rollout_mesh.shape["tensor"]
    if tensor > 1 and devices.size % tensor == 0:
        view = make_mesh(list(devices), data=devices.size // tensor, fsdp=1, tensor=tensor)
        return policy_shardings(config, view)
    replicated = NamedSharding(learner_mesh, PartitionSpec())
    return jax.tree.map(lambda _: replicated, policy_shardings(config, learner_mesh))
