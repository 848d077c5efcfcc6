"""What a checkpoint is and what it needs, from its configuration and headers alone."""

from __future__ import annotations

import math
from pathlib import Path

from jax.sharding import AbstractMesh

from models.config import ModelConfig
from models.hf.read import checked_tensors, read_config
from models.parameters import outer_table, stacked_layer_table
from models.sharding import MESH_AXES, parameters_by_name, policy_shardings

_TRAINING_BYTES = 4 * 4
"""Bytes per parameter on the learner: float32 parameter, gradient, and AdamW's mean and square."""


def inspect(folder: Path, *, data: int = 1, fsdp: int = 1, tensor: int = 1) -> str:
    """A text: family, sizes, memory, and how a mesh (data, fsdp, tensor) would split each parameter.

    Needs no device.
    Raises: ValueError for a checkpoint that cannot be used, or a dimension the mesh does not divide.
    """
    config = read_config(folder)
    found = [stored for _, stored in checked_tensors(folder, config)]
    dtypes, files = {stored.dtype for stored in found}, {stored.file for stored in found}
    count = config.num_parameters
    lines = [
        f"{folder}",
        f"  family       {config.family}, {count:,} parameters, stored as "
        f"{', '.join(sorted(dtypes))} in {len(files)} file{'s' if len(files) > 1 else ''}",
        f"  shape        {config.num_layers} layers of width {config.width}, "
        f"{config.num_heads} query and {config.num_kv_heads} kv heads of {config.head_size}, "
        f"ffw {config.ffw_size}, vocabulary {config.vocab_size}",
        f"  positions    {config.max_positions} tokens, {_rotation(config)}",
        f"  stop tokens  {', '.join(map(str, config.eos_token_ids)) or 'none in config.json'}",
        f"  memory       weights {_gib(2 * count)} in bfloat16, {_gib(4 * count)} in float32; training "
        f"state {_gib(_TRAINING_BYTES * count)}",
        f"  cache        {config.kv_bytes_per_token(2) / 1024:.1f} KiB per token in bfloat16",
        f"  on a mesh of data={data} fsdp={fsdp} tensor={tensor}, in float32:",
    ]
    return "\n".join(lines + _placement(config, data, fsdp, tensor))


def _placement(config: ModelConfig, data: int, fsdp: int, tensor: int) -> list[str]:
    """One line per parameter: shape, mesh axis of each dimension, what one device holds."""
    mesh = AbstractMesh((data, fsdp, tensor), MESH_AXES)
    shardings = parameters_by_name(policy_shardings(config, mesh))
    lines, total = [], 0
    for name, parameter in (outer_table(config) | stacked_layer_table(config)).items():
        sharding = shardings[name]
        local = sharding.shard_shape(parameter.shape)
        size = math.prod(local)
        total += size
        split = ", ".join(axis or "-" for axis in sharding.spec)
        lines.append(f"    {name:15} {parameter.shape!s:28} ({split}){'':4}{_gib(4 * size)}")
    return [*lines, f"    {'each device':44} {_gib(4 * total)}"]


def _rotation(config: ModelConfig) -> str:
    scaling = config.rope_scaling
    stretched = "" if scaling is None else f" stretched {scaling.factor:g}x ({scaling.kind})"
    without = len(config.no_rope_layers)
    some = f", {without} layers without" if without else ""
    return f"rotary base {config.rope_theta:g}{stretched}{some}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"
