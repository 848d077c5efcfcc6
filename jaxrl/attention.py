"""Which program attends where: what the configuration asks for, or the fastest one measured.

`attention_measured.json` beside this file holds the medians of `benchmarks/gpu_suite.py`, written by
`python -m benchmarks.gpu_table`: {device kind: [{phase, rows, tokens, seconds: {program: s}}]}. `auto` takes
the fastest program at the nearest measured shape; on a device without measurements what its structure says
(`models.attention`): cuDNN's kernels for packed rows where they accept them, else products of xla, on a CPU in
blocks.
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
from models.attention import DecodeAttention, decode_by_structure, rows_by_structure
from models.config import ModelConfig
from models.rows import RowAttention

TABLE = Path(__file__).with_name("attention_measured.json")
Phase = Literal["train", "decode"]
Table = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Programs:
    """The programs of one run on one kind of device."""

    train: RowAttention = "blocks"
    """Training and scoring."""
    prompts: RowAttention = "blocks"
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


def choose_programs(
    config: Config, device: Any, shape: ModelConfig, table: Table | None = None
) -> Programs:
    """The programs of a run of a model of that shape on `device`; `table`: None, the one that comes with
    this version."""
    table = measured() if table is None else table
    model, rollout, train = config.model, config.rollout, config.train
    half = model.dtype == "bfloat16"
    plain = rollout.stored_dtype(model.dtype) == model.dtype
    shared = train.shared_prompts is not None
    rows, decode = model.attention, rollout.attention
    if rows == "auto":
        allowed = ["xla", *(["cudnn"] if half else []), "pallas"]
        at = (train.rows_per_microbatch, train.row_tokens)
        found = fastest(table, device.device_kind, "train", *at, allowed)
        rows = found or rows_by_structure(device, model.dtype, shape.head_size)
    if decode == "auto":
        alone = plain and not rollout.shared_prefix  # kernels read a cache of one piece
        allowed = ["blocks", "xla", *(["pallas"] if alone else [])]
        allowed += ["cudnn"] if half and alone else []
        at = (rollout.slots, rollout.max_prompt_tokens + rollout.max_new_tokens)
        found = fastest(table, device.device_kind, "decode", *at, allowed)
        decode = found or decode_by_structure(device)
    chosen = cast("RowAttention", rows)
    in_rows: RowAttention = "xla" if shared and chosen != "blocks" else chosen
    return Programs(train=in_rows, prompts=chosen, decode=cast("DecodeAttention", decode))


def cache_dtype(config: Config) -> jnp.dtype:
    """Type of cached keys and values."""
    return jnp.dtype(stored_name(config.rollout, config.model.dtype))


def stored_name(rollout: RolloutConfig, compute: str) -> str:
    """The same as jax names it, where the model computes in `compute`."""
    name = rollout.stored_dtype(compute)
    return "float8_e4m3fn" if name == "float8_e4m3" else name
