"""How often jitted functions were traced: a count that must stay flat once every shape was met."""

from __future__ import annotations

from typing import Any


def num_traces(*jitted: Any) -> int:
    """Programs that these results of `jax.jit` hold, one per combination of shapes and static arguments."""
    return sum(function._cache_size() for function in jitted)
