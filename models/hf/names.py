"""Which tensor of a checkpoint is which part of which of our parameters.

Letters: L layers, D width, N query heads, K kv heads, G = N / K, H head size, F ffw, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from models.config import ModelConfig
from models.parameters import input_dims, layer_table, outer_table


@dataclass(frozen=True, slots=True)
class HFTensor:
    """One tensor of a checkpoint and where it lives in ours."""

    name: str
    shape: tuple[int, ...]
    """Shape in the checkpoint."""
    parameter: str
    """Our parameter, stacked over L if `layer` is a number."""
    layer: int | None
    own_shape: tuple[int, ...]
    """Shape in ours: the parameter's, without L."""
    transposed: bool
    """A projection: [out, in] in the checkpoint, [in, out] in ours, each side split into dims."""

    def read(self, value: np.ndarray) -> np.ndarray:
        """The checkpoint's layout -> ours."""
        return (value.T if self.transposed else value).reshape(self.own_shape)

    def write(self, value: np.ndarray) -> np.ndarray:
        """Ours -> the checkpoint's layout."""
        if self.transposed:
            return value.reshape(self.shape[::-1]).T
        return value.reshape(self.shape)


def tensors_of(config: ModelConfig) -> list[HFTensor]:
    """Every tensor of a checkpoint of this architecture. All supported families use these names."""
    outer, inner = outer_table(config), layer_table(config)
    names = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight"}
    names |= {} if config.tied_embeddings else {"head": "lm_head.weight"}
    table = [
        HFTensor(name, outer[parameter].shape, parameter, None, outer[parameter].shape, False)
        for parameter, name in names.items()
    ]
    for i in range(config.num_layers):
        for parameter, suffix in _layer_names(config):
            shape = inner[parameter].shape
            transposed = suffix.endswith("_proj.weight")
            theirs = _projection_shape(parameter, shape) if transposed else (math.prod(shape),)
            name = f"model.layers.{i}.{suffix}"
            table.append(HFTensor(name, theirs, parameter, i, shape, transposed))
    return table


def _layer_names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(our parameter, its name in the checkpoint after the layer's prefix)."""
    yield "attention_norm", "input_layernorm.weight"
    yield "mlp_norm", "post_attention_layernorm.weight"
    yield "attention_out", "self_attn.o_proj.weight"
    yield "down", "mlp.down_proj.weight"
    yield "up", "mlp.up_proj.weight"
    if config.gated_mlp:
        yield "gate", "mlp.gate_proj.weight"
    for name in ("q", "k", "v"):
        yield name, f"self_attn.{name}_proj.weight"
        if config.qkv_bias:
            yield f"{name}_bias", f"self_attn.{name}_proj.bias"
    if config.qk_norm:
        yield "q_norm", "self_attn.q_norm.weight"
        yield "k_norm", "self_attn.k_norm.weight"


def _projection_shape(parameter: str, shape: tuple[int, ...]) -> tuple[int, int]:
    split = input_dims(parameter)
    return math.prod(shape[split:]), math.prod(shape[:split])
