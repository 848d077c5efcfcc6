"""What a mixture of experts costs: E MLPs per layer, of which a router gives each token k. Standard
library only.

The scaling book's counts (transformers and inference chapters): parameters times E, flops per token
times k, weights read as long as any token chooses them. Tokens choose evenly: of m tokens' k m choices
an expert goes unread with probability (1 - k/E)^m. With the experts dealt to several devices, every
token's k copies go to their experts and back, one all-to-all each.
Letters: m tokens of one device, D width, F ffw of one expert, E experts, k per token.
"""

from __future__ import annotations

from models.config import ModelConfig
from roofline.kernels import Layout, Shard, Work, passes, product


def expert_mlp(model: ModelConfig, part: Shard, layout: Layout, tokens: int) -> Work:
    """Router, dispatch, the chosen experts as grouped products, and their weighted sum, forward."""
    e, chosen = layout.compute_bytes, model.experts_per_token * tokens
    halves = 2 if model.gated_mlp else 1
    work = product(tokens, part.width, model.num_experts, e)
    work += passes(2 * tokens * model.num_experts, e)  # softmax and choice
    work += passes(2 * chosen * part.width, e)  # to the experts
    work += grouped(model, layout, tokens, part.width, halves * part.ffw)
    work += passes((halves + 1) * chosen * part.ffw, e)
    work += grouped(model, layout, tokens, part.ffw, part.width)
    return work + passes((chosen + tokens) * part.width, e)  # weighted sum


def grouped(model: ModelConfig, layout: Layout, tokens: int, inner: int, columns: int) -> Work:
    """[inner, columns] of every chosen expert times its tokens, as one kernel: 2 k m inner columns
    flops."""
    chosen = model.experts_per_token * tokens
    values = chosen * (inner + columns) + read_experts(model, layout, tokens) * inner * columns
    return Work(
        flops=2.0 * chosen * inner * columns, hbm_bytes=layout.compute_bytes * values, launches=1
    )


def read_experts(model: ModelConfig, layout: Layout, tokens: int) -> float:
    """Experts of one device that any token chooses, expected; tokens of all devices that share it."""
    here = model.num_experts / layout.expert
    idle = 1 - model.experts_per_token / model.num_experts
    return here * (1 - idle ** (tokens * layout.expert))


def held_experts(model: ModelConfig, part: Shard, layout: Layout) -> int:
    """Parameters of one layer's experts stored on one device, without the router."""
    matrices = 3 if model.gated_mlp else 2
    spread = max(layout.fsdp, layout.expert)
    return model.num_experts * matrices * part.ffw * part.width // spread


def expert_values(model: ModelConfig, part: Shard, layout: Layout) -> int:
    """Values of one layer's experts that one device computes with."""
    matrices = 3 if model.gated_mlp else 2
    return model.num_experts // layout.expert * matrices * part.ffw * part.width
