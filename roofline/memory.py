"""Bytes that one device must hold, by name, for learner and rollout. Standard library only.

Activation counts follow the scaling book (transformers and applied-training chapters): without
recomputation a layer keeps every operand of its products and elementwise maps; with block
recomputation one residual per layer.
"""

from __future__ import annotations

from models.config import ModelConfig
from roofline.cost import KV_BLOCK_TOKENS, Remat, held_parameters
from roofline.kernels import FLOAT32_BYTES, Layout, ceil_div, round_up, shard


def memory_per_device(
    model: ModelConfig,
    layout: Layout,
    *,
    trains: bool = False,
    rows: int = 0,
    row_tokens: int = 0,
    remat: Remat = "none",
    chunk_tokens: int = 0,
    slots: int = 0,
    max_len: int = 0,
    snapshots: int = 0,
) -> dict[str, int]:
    """Bytes by name on the busiest device: what stays, and the largest thing that comes and goes.

    `trains`: parameters in the stored type, float32 gradients, AdamW's mean and square in float32,
    activations of one micro-batch of [rows, row_tokens] and the logits of `chunk_tokens` tokens (0:
    of all tokens at once). `slots`, `max_len`: key and value cache of the rollout. `snapshots`:
    copies of the weights in the compute type held by the rollout (2 while a new version arrives).

    Raises:
        ValueError: the layout does not divide the model.
    """
    part = shard(model, layout)
    held = held_parameters(model, layout)
    sizes: dict[str, float] = {}
    if trains:
        sizes["parameters"] = held * layout.param_bytes
        sizes["gradients"] = held * FLOAT32_BYTES
        sizes["optimizer"] = held * 2 * FLOAT32_BYTES
        tokens = ceil_div(rows, layout.row_shards) * row_tokens
        sizes["activations"] = _activation_bytes(model, layout, tokens, row_tokens, remat)
        sizes["logits"] = 2.0 * min(chunk_tokens or tokens, tokens) * part.vocab * FLOAT32_BYTES
        if layout.fsdp > 1:
            sizes["gathered_layer"] = model.layer_parameters / layout.tensor * layout.compute_bytes
    if snapshots:
        sizes["snapshots"] = snapshots * model.num_parameters / layout.tensor * layout.compute_bytes
    if slots:
        sizes["kv_cache"] = kv_cache_bytes(model, layout, slots, max_len)
        sizes["step_logits"] = (
            2.0 * ceil_div(slots, layout.row_shards) * model.vocab_size * FLOAT32_BYTES
        )
    return {name: round(size) for name, size in sizes.items()}


def kv_cache_bytes(model: ModelConfig, layout: Layout, slots: int, max_len: int) -> int:
    """Keys and values of one device, 2 L B' S K' H values; S rounded up to the cache's blocks."""
    values = model.num_layers * ceil_div(slots, layout.row_shards) * shard(model, layout).kv
    return 2 * values * round_up(max_len, KV_BLOCK_TOKENS) * layout.kv_bytes


def _activation_bytes(
    model: ModelConfig, layout: Layout, tokens: int, row_tokens: int, remat: Remat
) -> float:
    """Saved for backward over L layers, and the inside of one layer while it is differentiated."""
    part, e = shard(model, layout), layout.compute_bytes
    ffw = (3 if model.gated_mlp else 2) * part.ffw
    inside = tokens * (6 * part.width + 2 * (part.query + 2 * part.kv) + ffw) * e
    scores = tokens * row_tokens * part.heads * (FLOAT32_BYTES + e)
    residual = tokens * part.width * e
    if remat == "block":
        return model.num_layers * residual + inside + scores
    return model.num_layers * (inside + scores)
