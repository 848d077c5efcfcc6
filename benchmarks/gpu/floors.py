"""The least work that the results of a phase need: what the book's bound is taken of. Loads no jax.

    decode                 each step reads every weight and every key and value that a slot has, once, and
                           writes one token's (scaling book, inference chapter: (B KV + parameters) / W)
    prefill, score, train  the model's own flops: each matrix once forward and twice backward, attention over
                           visible keys alone, nothing computed twice; weights read once, gradients written
Scores, logits and norms could all stay in registers, so none of their passes over memory is counted.
"""

from __future__ import annotations

from models.config import ModelConfig
from roofline.kernels import FLOAT32_BYTES, Layout, cached_bytes, shard
from roofline.phases import Phase, PhaseCost


def model_flops(
    model: ModelConfig, tokens: int, keys_seen: float, *, headed: int, backward: bool
) -> float:
    """Flops of the model itself: each matrix once forward, twice backward; attention over visible keys only.

    keys_seen: mean number of keys that a token attends to; headed: tokens that get logits.
    """
    query = model.num_heads * model.head_size
    kv = model.num_kv_heads * model.head_size
    matrices = 3 if model.gated_mlp else 2
    layer = model.width * (2 * query + 2 * kv + matrices * model.ffw_size)
    forward = 2.0 * tokens * model.num_layers * layer
    forward += 4.0 * tokens * keys_seen * model.num_layers * query
    forward += 2.0 * headed * model.vocab_size * model.width
    return forward * (3 if backward else 1)


def decode_floor(
    model: ModelConfig, layout: Layout, slots: int, keys: float, steps: int, held: float = 0.0
) -> PhaseCost:
    """`steps` steps of `slots` slots that attend to `keys` keys each on average; held: keys that are read in a
    step over all slots, 0: each slot has its own."""
    sampled = slots * steps
    a_token = 2 * model.num_layers * cached_bytes(shard(model, layout), layout)
    moved = model.num_parameters * layout.param_bytes + a_token * ((held or slots * keys) + slots)
    return PhaseCost(
        phase=Phase.DECODE, hbm_bytes=steps * moved, dtype=layout.compute_dtype,
        flops=model_flops(model, sampled, keys, headed=sampled, backward=False),
    )  # fmt: skip


def rows_floor(model: ModelConfig, layout: Layout, phase: Phase, flops: float) -> PhaseCost:
    """A program over rows of tokens, with the model's own flops."""
    read = float(model.num_parameters * layout.param_bytes)
    written = model.num_parameters * FLOAT32_BYTES if phase == Phase.TRAIN else 0
    return PhaseCost(phase=phase, flops=flops, hbm_bytes=read + written, dtype=layout.compute_dtype)
