"""Where the sums of gradients are between updates, and what waits for what while they are made.

On a CPU memory is the process's heap, and what its programs take there is kept (`roofline.machine`). Sums that
were freed would leave their place to whatever comes next, and take more; so they stay, at zero. Micro-batches
wait for one another, as each that has begun or is about to holds temporaries of its own. Elsewhere the device's
allocator sees to both: sums are made anew and freed, and micro-batches are queued.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


class GradientSums:
    """The sums of one learner's gradients."""

    def __init__(self, device: Any, shardings: Any) -> None:
        """shardings: of the gradients of all that is trained."""
        self._on_cpu = device.platform == "cpu"
        self._kept: Any = None
        self.program = jax.jit(
            zeros_like, donate_argnums=(0,), keep_unused=True, out_shardings=shardings
        )

    def take(self, model: Any, make: Callable[[Any], Any]) -> Any:
        """Zeros in the shape of `model`: those kept, else what `make` makes of it."""
        kept, self._kept = self._kept, None
        return kept if _alike(kept, model) else make(model)

    def keep(self, gradients: Any, trained: Any) -> None:
        """After an update keep its sums for the next, if they are of all that is trained."""
        if self._on_cpu and _alike(gradients, trained):
            self._kept = self.program(gradients)

    def added(self, done: Any) -> None:
        """A micro-batch is being added; `done` comes out of it."""
        if self._on_cpu:
            jax.block_until_ready(done)


def zeros_like(model: Any) -> Any:
    """Gradients before the first micro-batch."""
    return jax.tree.map(jnp.zeros_like, model)


def _alike(gradients: Any, model: Any) -> bool:
    return jax.tree.structure(gradients) == jax.tree.structure(model)
