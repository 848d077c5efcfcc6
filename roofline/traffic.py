"""Which collectives a phase executes, by the method of "How to Scale Your Model" (sharding chapter).

With rows split over data and fsdp, weights over fsdp and heads, ffw and vocabulary over tensor:
    each use of a layer gathers its four weights over fsdp   (qkv, attention out, gate and up, down)
    each layer sums two activations over tensor in forward, and two in backward
    gradients are scattered and summed over fsdp, then summed over data
Left out: the gradients of norms and biases, thousands of times smaller.
Letters: L layers, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models.config import ModelConfig
from roofline.kernels import FLOAT32_BYTES, Layout, Shard, Work, all_gather, all_reduce, shard

Kind = Literal["all-gather", "all-reduce", "reduce-scatter"]
Axis = Literal["data", "fsdp", "tensor"]

WEIGHTS_PER_LAYER = 4
"""Weights that are gathered on their own."""
STATISTICS = 4
"""Reductions over a split vocabulary of each scored token: the maximum, the sum of exponentials, the
entropy's sum and the target's logit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """Equal collectives over one mesh axis."""

    kind: Kind
    axis: Axis
    devices: int
    """Size of the axis."""
    array_bytes: float
    """Bytes of the whole array on one device: gathered, before scattering, or reduced."""
    count: int = 1

    @property
    def link_bytes(self) -> float:
        """What one device sends for all of them."""
        egress = all_reduce if self.kind == "all-reduce" else all_gather  # scattering sends as much
        return self.count * egress(self.array_bytes, self.devices).link_bytes


def as_work(collectives: tuple[Collective, ...]) -> Work:
    """Their traffic and number."""
    return Work(
        link_bytes=sum(c.link_bytes for c in collectives),
        collectives=sum(c.count for c in collectives),
    )


def layers(model: ModelConfig, layout: Layout, tokens: int) -> tuple[Collective, ...]:
    """Of one pass through all layers on `tokens` tokens per device, forward or backward; without the
    sums of the gradients."""
    part, size = shard(model, layout), layout.compute_bytes
    weight = _layer_values(model, part) * size / WEIGHTS_PER_LAYER
    return _over(
        "all-gather", "fsdp", layout.fsdp, weight, WEIGHTS_PER_LAYER * model.num_layers
    ) + _over(
        "all-reduce", "tensor", layout.tensor, tokens * model.width * size, 2 * model.num_layers
    )


def forward(model: ModelConfig, layout: Layout, tokens: int) -> tuple[Collective, ...]:
    """Of the embedding and all layers on `tokens` tokens per device."""
    part, size = shard(model, layout), layout.compute_bytes
    found = layers(model, layout, tokens)
    found += _over("all-gather", "fsdp", layout.fsdp, part.vocab * model.width * size)
    return found + _over("all-reduce", "tensor", part.vocab_shards, tokens * model.width * size)


def scored_head(
    model: ModelConfig, layout: Layout, tokens: int, *, trains: bool
) -> tuple[Collective, ...]:
    """Of the head with log-probabilities; training also sums the gradient of its input.

    A tied head is the embedding, which `forward` has gathered.
    """
    part, size = shard(model, layout), layout.compute_bytes
    split = part.vocab_shards
    found = _over("all-reduce", "tensor", split, tokens * FLOAT32_BYTES, STATISTICS)
    if not model.tied_embeddings:
        found += _over("all-gather", "fsdp", layout.fsdp, part.vocab * model.width * size)
    if trains:
        found += _over("all-reduce", "tensor", split, tokens * model.width * size)
    return found


def gradients(model: ModelConfig, layout: Layout) -> tuple[Collective, ...]:
    """Of one micro-batch's weight gradients in the compute type, before they are accumulated.

    A tied matrix is summed twice, as embedding and as head.
    """
    part, size = shard(model, layout), layout.compute_bytes
    values = model.num_layers * _layer_values(model, part) + 2 * part.vocab * model.width
    count = WEIGHTS_PER_LAYER * model.num_layers + 2
    array_bytes = values * size / count
    return _over("reduce-scatter", "fsdp", layout.fsdp, array_bytes, count) + _over(
        "all-reduce", "data", layout.data, array_bytes / layout.fsdp, count
    )


def _layer_values(model: ModelConfig, part: Shard) -> int:
    """Values of one layer's weights that one tensor-parallel device computes with."""
    gates = 2 if model.gated_mlp else 1
    return model.width * (2 * part.query + 2 * part.kv + (gates + 1) * part.ffw)


def _over(
    kind: Kind, axis: Axis, devices: int, array_bytes: float, count: int = 1
) -> tuple[Collective, ...]:
    """Collectives over an axis; none over an axis of one device."""
    if devices == 1:
        return ()
    return (
        Collective(kind=kind, axis=axis, devices=devices, array_bytes=array_bytes, count=count),
    )
