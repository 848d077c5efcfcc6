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
from roofline.kernels import FLOAT32_BYTES, Layout, Shard, Work, shard

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
        """What one device sends for all of them: A (n-1)/n, twice that for an all-reduce."""
        once = self.array_bytes * (self.devices - 1) / self.devices
        return self.count * once * (2 if self.kind == "all-reduce" else 1)


def as_work(collectives: tuple[Collective, ...]) -> Work:
    """Their traffic and number."""
    return Work(
        link_bytes=sum(c.link_bytes for c in collectives),
        collectives=sum(c.count for c in collectives),
    )


def forward(model: ModelConfig, layout: Layout, tokens: int) -> tuple[Collective, ...]:
    """Of the embedding and all layers on `tokens` tokens per device."""
    part, size = shard(model, layout), layout.compute_bytes
    found = _layer_gathers(model, part, layout)
    found += _gathered("fsdp", layout.fsdp, part.vocab * model.width * size, 1)
    found += _summed(layout.tensor, tokens * model.width * size, 2 * model.num_layers)
    return found + _summed(part.vocab_shards, tokens * model.width * size, 1)


def backward(model: ModelConfig, layout: Layout, tokens: int) -> tuple[Collective, ...]:
    """Of all layers' backward on `tokens` tokens per device, without the gradients' sums."""
    part, size = shard(model, layout), layout.compute_bytes
    found = _layer_gathers(model, part, layout)
    return found + _summed(layout.tensor, tokens * model.width * size, 2 * model.num_layers)


def scored_head(
    model: ModelConfig, layout: Layout, tokens: int, *, trains: bool
) -> tuple[Collective, ...]:
    """Of the head with log-probabilities; training also sums the gradient of its input.

    A tied head is the embedding, which `forward` has gathered.
    """
    part, size = shard(model, layout), layout.compute_bytes
    found = _summed(part.vocab_shards, tokens * FLOAT32_BYTES, STATISTICS)
    if not model.tied_embeddings:
        found += _gathered("fsdp", layout.fsdp, part.vocab * model.width * size, 1)
    if trains:
        found += _summed(part.vocab_shards, tokens * model.width * size, 1)
    return found


def gradients(model: ModelConfig, layout: Layout) -> tuple[Collective, ...]:
    """Of one micro-batch's weight gradients in the compute type, before they are accumulated.

    A tied matrix is summed twice, as embedding and as head.
    """
    part, size = shard(model, layout), layout.compute_bytes
    values = model.num_layers * _layer_values(model, part) + 2 * part.vocab * model.width
    count = WEIGHTS_PER_LAYER * model.num_layers + 2
    found: tuple[Collective, ...] = ()
    if layout.fsdp > 1:
        found += (
            Collective(
                kind="reduce-scatter", axis="fsdp", devices=layout.fsdp,
                array_bytes=values * size / count, count=count,
            ),
        )  # fmt: skip
    if layout.data > 1:
        found += (
            Collective(
                kind="all-reduce", axis="data", devices=layout.data,
                array_bytes=values * size / count / layout.fsdp, count=count,
            ),
        )  # fmt: skip
    return found


def _layer_values(model: ModelConfig, part: Shard) -> int:
    """Values of one layer's weights that one tensor-parallel device computes with."""
    gates = 2 if model.gated_mlp else 1
    return model.width * (2 * part.query + 2 * part.kv + (gates + 1) * part.ffw)


def _layer_gathers(model: ModelConfig, part: Shard, layout: Layout) -> tuple[Collective, ...]:
    size = _layer_values(model, part) * layout.compute_bytes / WEIGHTS_PER_LAYER
    return _gathered("fsdp", layout.fsdp, size, WEIGHTS_PER_LAYER * model.num_layers)


def _gathered(axis: Axis, devices: int, array_bytes: float, count: int) -> tuple[Collective, ...]:
    if devices == 1:
        return ()
    return (
        Collective(
            kind="all-gather", axis=axis, devices=devices, array_bytes=array_bytes, count=count
        ),
    )


def _summed(devices: int, array_bytes: float, count: int) -> tuple[Collective, ...]:
    if devices == 1:
        return ()
    return (
        Collective(
            kind="all-reduce", axis="tensor", devices=devices, array_bytes=array_bytes, count=count
        ),
    )
