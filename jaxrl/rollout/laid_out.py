"""The weights in use as decode reads them: layers one by one, matrices that meet the same input side by side.

On a single CPU they lie in the memory of the snapshot, which was published so. Elsewhere they are a copy, made
once per version by the first chunk that decodes with it. Either is dropped while nothing is sampled.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl.types import Snapshot
from models.config import ModelConfig
from models.fused import FusedDecoder, FusedLayer, split_layers, viewed_layers
from models.sharding import split_shardings


class LaidOut:
    """The layers of at most one version, on the devices of the snapshots."""

    def __init__(self, config: ModelConfig, mesh: Mesh, dtype: jnp.dtype) -> None:
        self.nbytes = config.num_parameters * jnp.dtype(dtype).itemsize
        """Of one version's weights, on all devices that split them."""
        self.places = split_shardings(config, mesh)
        self.whole = NamedSharding(mesh, PartitionSpec())
        # partial: a function of this copy alone, so that its traces are counted alone
        self.program = jax.jit(partial(split_layers), out_shardings=self.places)
        self.layers: tuple[FusedLayer, ...] = ()
        self._version: int | None = None

    def of(self, snapshot: Snapshot) -> tuple[FusedLayer, ...]:
        """The layers of these weights; those of an older version are dropped before they are made."""
        if snapshot.version != self._version:
            self.drop()
            policy = snapshot.policy
            if isinstance(policy, FusedDecoder):
                self.layers = viewed_layers(policy, self.whole)
            else:
                self.layers = self.program(policy)
            self._version = snapshot.version
        return self.layers

    def drop(self) -> None:
        """Hold nothing."""
        self.layers, self._version = (), None
