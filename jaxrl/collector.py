"""Python's garbage collector beside lanes that must not stop.

A full collection walks every object that jax's traces and programs left behind, 0.2 s in a small run, and
holds the interpreter meanwhile: generators and learner both stand still. What exists once the programs are
compiled stays until the end of the run, so it need not be walked: https://docs.python.org/3/library/gc.html
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def settled() -> Iterator[None]:
    """Collect once; until the end, collections walk only what is made from now on."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
