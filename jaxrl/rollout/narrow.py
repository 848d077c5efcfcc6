"""Fewer slots for the last samples: a decode step costs what its slots cost, live or idle.

When nothing more can enter, the live samples are gathered into a quarter or a sixteenth of the slots, and all
slots are made again once others wait. Each device gathers its own. An array is freed as soon as the smaller
one is there, so that both stand at once for one array of one layer only, while no program runs: the memory
plan (`roofline.memory`), which counts what a decode program needs beside all slots, has room for it.
The rule is here as pure functions; the host's tables move with `RowTable.moved`, arrays with `moved_slots`.
Letters: B slots, R rows of prompts, C lanes of a row; a prime marks them after the move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl.rollout.prefix_rows import MovedRows
from jaxrl.rollout.sampling import Slots
from models.prefixes import Prefixes

NARROWER = (4, 16)
"""Parts of the slots that are decoded alone. Every width has programs of its own to compile, so there are two;
halves and eighths besides save a tenth of a long tail's time (benchmarks/LOG.md)."""
LEAST_STEPS = 32
"""Fewer steps that can follow are not worth the programs of another width [decode steps]: completions of up to
so many tokens never move."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tail:
    """What is left to decode when nothing can enter. A pass is reading or writing one slot's whole cache."""

    width: int
    """Slots decoded now, on one device."""
    live: int
    """Live samples of the fullest device."""
    steps: int
    """Decode steps that can follow: the most tokens that a sample may still take."""
    read: float
    """Share of a slot's cache that a decode step reads, in (0, 1]."""
    wasted: float
    """What idle slots of one device have read since nothing waits or since the last move [passes]."""


def widths_of(slots: int) -> tuple[int, ...]:
    """Slots of one device that may be decoded, widest first."""
    parts = (-(-slots // part) for part in NARROWER)
    return tuple(dict.fromkeys((slots, *parts)))


def fitting_width(widths: Sequence[int], tail: Tail) -> int:
    """Slots of one device to go on with: the fewest that hold the live samples, if moving there pays.

    It pays once idle slots have wasted as much as the move costs, which bounds the loss where others enter
    right after it, and if the steps that can follow save as much. Only bytes of caches count: of what
    a step costs besides, the fewer slots save some too.
    """
    fewest = min(width for width in widths if width >= tail.live)
    if fewest >= tail.width or tail.steps < LEAST_STEPS:
        return tail.width
    price = _move_passes(tail.width, fewest, widths[0])
    saved = (tail.width - fewest) * tail.read * tail.steps
    return fewest if price <= min(tail.wasted, saved) else tail.width


def _move_passes(width: int, fewest: int, whole: int) -> int:
    """Passes of a move: read and write what stays; who leaves all slots pays for making them again."""
    back = whole + fewest if width == whole else 0
    return 2 * fewest + back


def new_slots(
    live: Iterable[int], width: int, other: int, devices: int
) -> tuple[dict[int, int], np.ndarray]:
    """Where live slots go when each device has `other` slots instead of `width`: into its first ones, in order.

    Returns: the new slot of each, and the old one of each new slot [B'] int32, -1: none.
    """
    found: dict[int, int] = {}
    sources = np.full(other * devices, -1, np.int32)
    taken = [0] * devices
    for slot in sorted(live):
        device = slot // width
        found[slot] = device * other + taken[device]
        sources[found[slot]] = slot
        taken[device] += 1
    return found, sources


Take = Callable[[jax.Array, Any, Any], jax.Array]


def take_rows(x: jax.Array, sources: jax.Array, place: NamedSharding) -> jax.Array:
    """Row sources[i] of x at i, zeros where it is -1. Each device takes from its own part, where the sources of
    what it makes must lie: nothing travels."""
    axes = place.spec[0]

    def own(x: jax.Array, sources: jax.Array) -> jax.Array:
        first = jax.lax.axis_index(axes) * x.shape[0]
        at = jnp.where(sources < 0, x.shape[0], sources - first)  # past the end: filled
        return jnp.take(x, at, axis=0, mode="fill", fill_value=0)

    given = (place.spec, PartitionSpec(axes))
    return jax.shard_map(
        own, mesh=place.mesh, in_specs=given, out_specs=place.spec, check_vma=False
    )(x, sources)


def moved_slots(slots: Slots, sources: np.ndarray, rows: MovedRows | None, take: Take) -> Slots:
    """B' slots of which i was sources[i] [B'] int32, -1: idle. Frees the given ones, array by array.

    take: `take_rows`, jitted with the sharding as static argument.
    """

    def among(sources: np.ndarray) -> Callable[[jax.Array], jax.Array]:
        def instead(x: jax.Array) -> jax.Array:
            made = jax.block_until_ready(take(x, sources, x.sharding))
            x.delete()
            return made

        return instead

    moved, prefixes = among(sources), slots.prefixes
    slots = jax.tree.map(moved, replace(slots, prefixes=None))
    if prefixes is None or rows is None:
        return slots
    place = prefixes.lanes.sharding
    return replace(
        slots,
        prefixes=Prefixes(
            cache=jax.tree.map(among(rows.sources), prefixes.cache),
            lengths=among(rows.sources)(prefixes.lengths),
            members=jax.device_put(rows.members, place),
            lanes=jax.device_put(rows.lanes, place),
            starts=moved(prefixes.starts),
        ),
    )
