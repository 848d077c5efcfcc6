"""The weights in use as decode reads them: a copy in which matrices that meet the same input lie side by side.

Made once per version, by the first chunk that decodes with it, and dropped while nothing is sampled.
"""

from __future__ import annotations

from functools import partial

import jax
from jax.sharding import Mesh

from jaxrl.types import Snapshot
from models.config import ModelConfig
from models.decoder import FusedLayer, split_layers
from models.sharding import split_shardings


class LaidOut:
    """At most one such copy, on the devices of the snapshots."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        self.places = split_shardings(config, mesh)
        # partial: a function of this copy alone, so that its traces are counted alone
        self.program = jax.jit(partial(split_layers), out_shardings=self.places)
        self.layers: tuple[FusedLayer, ...] = ()
        self._version: int | None = None

    def of(self, snapshot: Snapshot) -> tuple[FusedLayer, ...]:
        """The layers of these weights; those of an older version are dropped before they are made."""
        if snapshot.version != self._version:
            self.drop()
            self.layers, self._version = self.program(snapshot.policy), snapshot.version
        return self.layers

    def drop(self) -> None:
        """Hold nothing."""
        self.layers, self._version = (), None
