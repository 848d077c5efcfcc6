"""How many parameters one device holds and trains, in how many arrays. Standard library only."""

from __future__ import annotations

from models.config import ModelConfig
from roofline.adapters import adapter_arrays, adapter_parameters, adapter_split_values
from roofline.experts import held_experts
from roofline.kernels import Layout, shard


def trained_parameters(model: ModelConfig, layout: Layout) -> int:
    """Parameters on one device that have gradients and optimizer state: the adapter's, or all."""
    return adapter_parameters(model, layout) if model.lora else held_parameters(model, layout)


def trained_arrays(model: ModelConfig) -> int:
    """Their arrays."""
    return adapter_arrays(model) if model.lora else num_arrays(model)


def split_arrays(model: ModelConfig, layout: Layout) -> tuple[int, ...]:
    """Values of each trained array that has a width, which fsdp splits, embedding and head first: the whole
    of it on one tensor-parallel device, layers stacked."""
    part, deep = shard(model, layout), model.num_layers
    if model.lora:
        arrays = adapter_arrays(model) // 2
        return (deep * adapter_split_values(model) // arrays,) * arrays
    experts = max(1, model.num_experts)
    columns = [part.query, part.query, part.kv, part.kv]
    columns += [experts * part.ffw] * (3 if model.gated_mlp else 2)
    columns += [model.num_experts] if model.num_experts else []
    outer = [part.vocab * part.width] * (1 if model.tied_embeddings else 2)
    return (*outer, *(deep * part.width * size for size in columns))


def held_parameters(model: ModelConfig, layout: Layout) -> int:
    """Parameters stored on one device: matrices over fsdp and tensor, norms on every device."""
    part = shard(model, layout)
    width = model.width // layout.fsdp
    norms = 2 * model.width + (2 * model.head_size if model.qk_norm else 0)
    biases = (part.query + 2 * part.kv) if model.qkv_bias else 0
    matrices = 2 * part.query + 2 * part.kv + model.num_experts
    mlp = (3 if model.gated_mlp else 2) * part.ffw * width
    if model.num_experts:
        mlp = held_experts(model, part, layout)
    outer = (1 if model.tied_embeddings else 2) * part.vocab * width + model.width
    return outer + model.num_layers * (width * matrices + mlp + norms + biases)


def num_arrays(model: ModelConfig) -> int:
    """Arrays of the parameter tree, whose layers are stacked."""
    return _layer_arrays(model) + 2 + (0 if model.tied_embeddings else 1)


def joined_arrays(model: ModelConfig) -> int:
    """Arrays that there are fewer where q, k and v lie side by side, their biases, and gate and up."""
    return 2 + (1 if model.gated_mlp else 0) + (2 if model.qkv_bias else 0)


def _layer_arrays(model: ModelConfig) -> int:
    """Two norms, the matrices, and the optional head norms and biases."""
    return 2 + _layer_matrices(model) + (2 if model.qk_norm else 0) + (3 if model.qkv_bias else 0)


def _layer_matrices(model: ModelConfig) -> int:
    """q, k, v, attention out, up, down, the gate, and the router."""
    return (7 if model.gated_mlp else 6) + (1 if model.num_experts else 0)
