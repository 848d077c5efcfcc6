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

A single CPU that samples gets the layers as decode reads them (`models.fused`), so that they are there once.
Of an adapted policy only the adapter is published. Its frozen base goes over once, with the first version;
where rollout and learner hold it alike on the same devices it is one set of arrays for both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl.tracing import num_traces
from jaxrl.types import Snapshot
from models.config import ModelConfig
from models.decoder import Decoder, Policy
from models.fused import FusedDecoder, can_view, fused
from models.lora import AdaptedDecoder
from models.sharding import adapter_shardings, fused_shardings, make_mesh, policy_shardings


def _cast(arrays: Any, dtype: jnp.dtype) -> Any:
    return jax.tree.map(lambda x: jnp.array(x, dtype=dtype, copy=True), arrays)


def _fused_cast(policy: Decoder, dtype: jnp.dtype) -> FusedDecoder:
    return fused(_cast(policy, dtype))


class WeightStore:
    """Publishes the learner's weights to the rollout devices and hands out the newest."""

    def __init__(
        self, config: ModelConfig, *, learner_mesh: Mesh, rollout_mesh: Mesh, dtype: jnp.dtype
    ) -> None:
        self._dtype = dtype
        self._config, self._meshes = config, (learner_mesh, rollout_mesh)
        cast, of = _cast, policy_shardings if config.lora is None else adapter_shardings
        if can_view(config, rollout_mesh.devices.flat[0], rollout_mesh.size):
            cast, of = _fused_cast, fused_shardings
        self._rollout = of(config, rollout_mesh)
        self._cast = jax.jit(
            partial(cast, dtype=dtype),
            out_shardings=matching_shardings(config, learner_mesh, rollout_mesh, of),
        )
        self._base: Decoder | None = None
        self.published_bytes = 0
        """Bytes of one copy of the arrays that the last publication sent."""
        self._lock = threading.Lock()
        self._in_use: Snapshot | None = None
        self._arrived: Snapshot | None = None

    @property
    def program(self) -> Any:
        """The jitted cast and reshard on the learner's devices, for `jaxrl.programs`."""
        return self._cast

    @property
    def trace_count(self) -> int:
        """Programs traced so far."""
        return num_traces(self._cast)

    def publish(self, version: int, policy: Policy) -> Snapshot:
        """Copy `policy` to the rollout devices as `version`; returns once it has arrived there.

        An older copy that arrived but was never used is dropped first, so at most two exist.
        """
        with self._lock:
            self._arrived = None
        if isinstance(policy, AdaptedDecoder):
            self._base = self._base or self._send_base(policy.base)
            adapter = self._send(policy.adapter)
            arrived: Policy = AdaptedDecoder(base=self._base, adapter=adapter)
        else:
            arrived = self._send(policy)
        snapshot = Snapshot(version=version, policy=arrived)
        with self._lock:
            self._arrived = snapshot
        return snapshot

    def _send(self, arrays: Any) -> Any:
        copy = jax.device_put(self._cast(arrays), self._rollout)
        self.published_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(copy))
        return jax.block_until_ready(copy)

    def _send_base(self, base: Decoder) -> Decoder:
        wanted = policy_shardings(self._config, self._meshes[1])
        alike = jax.tree.map(
            lambda x, s: x.dtype == self._dtype and x.sharding.is_equivalent_to(s, x.ndim),
            base, wanted,
        )  # fmt: skip
        if all(jax.tree.leaves(alike)):
            return base
        between = matching_shardings(self._config, *self._meshes, policy_shardings)
        cast = jax.jit(partial(_cast, dtype=self._dtype), out_shardings=between)
        return jax.block_until_ready(jax.device_put(cast(base), wanted))

    def current(self) -> Snapshot:
        """The newest weights that have arrived. For the one thread that samples."""
        with self._lock:
            if self._arrived is not None:
                self._in_use, self._arrived = self._arrived, None
            if self._in_use is None:
                raise RuntimeError("no weights were published before sampling began")
            return self._in_use


def matching_shardings(
    config: ModelConfig, learner_mesh: Mesh, rollout_mesh: Mesh,
    of: Callable[[ModelConfig, Mesh], Any] = policy_shardings,
) -> Any:  # fmt: skip
    """Shardings on the learner's devices whose shard indices equal those that `of` gives on the rollout mesh.

    The learner's devices are viewed as (copies, tensor) with the rollout's tensor size where that
    divides them; else every device gets a full copy.
    """
    devices = np.asarray(learner_mesh.devices).reshape(-1)
    tensor = rollout_mesh.shape["tensor"]
    if tensor > 1 and devices.size % tensor == 0:
        view = make_mesh(list(devices), data=devices.size // tensor, fsdp=1, tensor=tensor)
        return of(config, view)
    replicated = NamedSharding(learner_mesh, PartitionSpec())
    return jax.tree.map(lambda _: replicated, of(config, learner_mesh))
