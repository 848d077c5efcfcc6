"""The weighted mean of checkpoints of one architecture: a soup, or a line between two models.

SmolLM3 (huggingface.co/blog/smollm3) averages its preference-tuned checkpoints and then takes 0.9 of
that and 0.1 of an earlier checkpoint, which brings long-context ability back.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.hf.names import HFTensor, tensors_of
from models.hf.read import (
    CONFIG_FILE,
    Stored,
    checked_tensors,
    companions,
    read_config,
    read_json,
    read_tensor,
)
from models.hf.save import MAX_FILE_BYTES, write_json, write_weights

SUM_TOLERANCE = 1e-6
"""How far the weights may sum from 1: decimal fractions do not add up exactly."""


def merge(
    sources: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: Any = "float32",
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write sum_i weights[i] * sources[i], computed in float32, to the new folder `out`.

    weights: None for a soup, all equal; else one finite number per source, summing to 1 (a negative
    one extrapolates). Configuration and tokenizer are those of the first source. The host holds one
    file of the result and two tensors at a time.
    Raises: ValueError for fewer than two sources, weights that do not fit, sources of different
    architectures, a tensor that does not fit, or `out` in use.
    """
    weights = _checked_weights(sources, weights)
    config = read_config(sources[0])
    for source in sources[1:]:
        _check_same(sources[0], config, source, read_config(source))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; give a new folder")
    tables: list[dict[str, Stored]] = [
        {tensor.name: stored for tensor, stored in checked_tensors(source, config)}
        for source in sources
    ]

    def value(tensor: HFTensor) -> np.ndarray:
        total = np.zeros(tensor.shape, np.float32)
        for weight, table in zip(weights, tables, strict=True):
            total += np.float32(weight) * read_tensor(table[tensor.name].file, tensor.name)
        return total

    dtype = jnp.dtype(dtype)
    out.mkdir(parents=True, exist_ok=True)
    write_weights(tensors_of(config), value, out, dtype, max_file_bytes)
    content = read_json(sources[0] / CONFIG_FILE)
    for key in {"torch_dtype", "dtype"} & set(content) or {"torch_dtype"}:
        content[key] = dtype.name
    write_json(out / CONFIG_FILE, content)
    for path in companions(sources[0]):
        shutil.copyfile(path, out / path.name)


def _checked_weights(sources: Sequence[Path], weights: Sequence[float] | None) -> Sequence[float]:
    if len(sources) < 2:
        raise ValueError(f"merging needs at least 2 checkpoints, not {len(sources)}")
    if weights is None:
        return [1 / len(sources)] * len(sources)
    if len(weights) != len(sources):
        raise ValueError(
            f"{len(weights)} weights for {len(sources)} checkpoints; give one per checkpoint"
        )
    total = math.fsum(weights)
    if not abs(total - 1) <= SUM_TOLERANCE:
        raise ValueError(f"the weights {list(weights)} sum to {total:g}; they must sum to 1")
    return weights


def _check_same(first: Path, one: ModelConfig, second: Path, two: ModelConfig) -> None:
    """Everything but special tokens and the longest sequence must agree."""
    aside = {"eos_token_ids": (), "bos_token_id": None, "max_positions": 1}
    one, two = replace(one, **aside), replace(two, **aside)
    for name in ModelConfig.__slots__:
        ours, theirs = getattr(one, name), getattr(two, name)
        if ours != theirs:
            raise ValueError(
                f"{first} has {name}={ours}, but {second} has {theirs}; only checkpoints of one "
                "architecture can be merged"
            )
