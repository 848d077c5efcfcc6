"""Which program attends where: what the configuration asks for, or the fastest one measured.

`attention_measured.json` beside this file holds the medians of `benchmarks/gpu_suite.py`, written by
`python -m benchmarks.gpu_table`: {device kind: [{phase, rows, tokens, seconds: {program: s}}]}. `auto` takes
the fastest program at the nearest measured shape; on a device without measurements the products of xla, on
a CPU those over key blocks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import jax.numpy as jnp

from jaxrl.config import Config, RolloutConfig
from models.attention import DecodeAttention, RowAttention

TABLE = Path(__file__).with_name("attention_measured.json")
Phase = Literal["train", "decode"]
Table = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Programs:
    """The programs of one run on one kind of device."""

    train: RowAttention = "xla"
    """Training and scoring."""
    prompts: RowAttention = "xla"
    """Prefill."""
    decode: DecodeAttention = "blocks"


ON_CPU = Programs()


@cache
def measured() -> Table:
    """The table that comes with this version."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def fastest(
    table: Table, device_kind: str, phase: Phase, rows: int, tokens: int, allowed: Sequence[str]
) -> str | None:
    """The fastest allowed program at the measured shape nearest to [rows, tokens] (ratio of sizes), or None
    if the table has none for this device and phase."""
    entries = [
        (entry, seconds)
        for entry in table.get(device_kind, ())
        if entry["phase"] == phase
        if (seconds := {p: s for p, s in entry["seconds"].items() if p in allowed})
    ]

    def distance(entry: Mapping[str, Any]) -> float:
        return abs(math.log(entry["rows"] / rows)) + abs(math.log(entry["tokens"] / tokens))

    if not entries:
        return None
    _, seconds = min(entries, key=lambda pair: distance(pair[0]))
    return min(seconds, key=lambda program: seconds[program])


def choose_programs(config: Config, device: Any, table: Table | None = None) -> Programs:
    """The programs of a run on `device`; `table`: None, the one that comes with this version."""
    table = measured() if table is None else table
    model, rollout, train = config.model, config.rollout, config.train
    half = model.dtype == "bfloat16"
    plain = rollout.stored_dtype(model.dtype) == model.dtype
    on_cpu = device.platform == "cpu"
    rows, decode = model.attention, rollout.attention
    if rows == "auto":
        allowed = ["xla", *(["cudnn"] if half else []), "pallas"]
        at = (train.rows_per_microbatch, train.row_tokens)
        rows = fastest(table, device.device_kind, "train", *at, allowed) or "xla"
    if decode == "auto":
        allowed = ["blocks", "xla", *(["pallas"] if plain else [])]
        allowed += ["cudnn"] if half and plain else []
        at = (rollout.slots, rollout.max_prompt_tokens + rollout.max_new_tokens)
        found = fastest(table, device.device_kind, "decode", *at, allowed)
        decode = found or ("blocks" if on_cpu else "xla")
    chosen = cast("RowAttention", rows)
    shared = train.shared_prompts is not None
    return Programs(
        train="xla" if shared else chosen, prompts=chosen, decode=cast("DecodeAttention", decode)
    )


def cache_dtype(config: Config) -> jnp.dtype:
    """Type of cached keys and values."""
    return jnp.dtype(stored_name(config.rollout, config.model.dtype))


def stored_name(rollout: RolloutConfig, compute: str) -> str:
    """The same as jax names it, where the model computes in `compute`."""
    name = rollout.stored_dtype(compute)
    return "float8_e4m3fn" if name == "float8_e4m3" else name
