"""Which collectives a phase executes, by the method of "How to Scale Your Model" (sharding chapter).

With rows split over data and fsdp, weights over fsdp and heads, ffw and vocabulary over tensor:
    each use of a layer gathers its four weights over fsdp   (qkv, attention out, gate and up, down)
    each layer sums two activations over tensor in forward, and two in backward
    gradients are scattered and summed over fsdp, then summed over data
    experts dealt to several devices get their tokens by all-to-all and send the results back the same
    way; only what is left of fsdp then gathers them, and only their other holders sum their gradients
Left out: the gradients of norms and biases, thousands of times smaller.
Letters: L layers, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from models.config import ModelConfig
from roofline.adapters import adapter_split_values, adapter_whole_values
from roofline.experts import expert_values
from roofline.kernels import FLOAT32_BYTES, Layout, Shard, Work, all_gather, all_reduce, shard
from roofline.parameters import split_arrays

Kind = Literal["all-gather", "all-reduce", "reduce-scatter", "all-to-all"]
Axis = Literal["data", "fsdp", "tensor", "expert"]

WEIGHTS_PER_LAYER = 4
"""Weights that are gathered on their own."""
STATISTICS = 4
"""Reductions over a split vocabulary of each scored token: the maximum, the sum of exponentials, the
entropy's sum and the target's logit."""
SAMPLE_BYTES, COUNTER_BYTES = 9, 4
"""Of a decode step's token, log-probability and whether it counts; of how many a slot may still sample."""


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
        # scattering, and dealing out, sends as much as gathering
        egress = all_reduce if self.kind == "all-reduce" else all_gather
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
    weights, deep = _weights_apart(model), model.num_layers
    weight = _layer_values(model, part) * size / weights
    found = _over("all-gather", "fsdp", layout.fsdp, weight, weights * deep)
    found += _over("all-reduce", "tensor", layout.tensor, tokens * model.width * size, 2 * deep)
    if model.lora:
        adapter = adapter_split_values(model) * size
        found += _over("all-gather", "fsdp", layout.fsdp, adapter, deep)
    if not model.num_experts:
        return found
    experts, left = expert_values(model, part, layout) * size, layout.fsdp // layout.expert
    chosen = tokens * model.experts_per_token * model.width * size
    found += _over("all-gather", "fsdp", max(1, left), experts / 2, 2 * deep)
    return found + _over("all-to-all", "expert", layout.expert, chosen, 2 * deep)


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

    A tied head is the embedding, which `forward` has gathered; where that needed a cast, XLA keeps the
    gathers of the two uses apart.
    """
    part, size = shard(model, layout), layout.compute_bytes
    split = part.vocab_shards
    found = _over("all-reduce", "tensor", split, tokens * FLOAT32_BYTES, STATISTICS)
    if not model.tied_embeddings or layout.param_bytes != size:
        found += _over("all-gather", "fsdp", layout.fsdp, part.vocab * model.width * size)
    if trains:
        found += _over("all-reduce", "tensor", split, tokens * model.width * size)
    return found


def train(
    model: ModelConfig, layout: Layout, tokens: int, predicting: int | None = None
) -> tuple[Collective, ...]:
    """Of forward and backward of one micro-batch of `tokens` tokens per device, of which `predicting`
    meet the head (None: all)."""
    scored = tokens if predicting is None else predicting
    return (
        forward(model, layout, tokens)
        + scored_head(model, layout, scored, trains=True)
        + layers(model, layout, tokens)
        + gradients(model, layout)
    )


def score(
    model: ModelConfig, layout: Layout, tokens: int, predicting: int | None = None
) -> tuple[Collective, ...]:
    """Of the log-probabilities of `tokens` tokens per device, of which `predicting` meet the head
    (None: all)."""
    scored = tokens if predicting is None else predicting
    return forward(model, layout, tokens) + scored_head(model, layout, scored, trains=False)


def sampling(model: ModelConfig, layout: Layout, rows: int) -> tuple[Collective, ...]:
    """Of the float32 logits of one token of `rows` slots per device, gathered over the vocabulary."""
    logits = FLOAT32_BYTES * rows * model.vocab_size
    return _over("all-gather", "tensor", shard(model, layout).vocab_shards, logits)


def samples(layout: Layout, rows: int, steps: int) -> tuple[Collective, ...]:
    """Of what a chunk of `steps` steps sampled for `rows` slots of all devices, gathered for the host."""
    chunk = rows * (steps * SAMPLE_BYTES + COUNTER_BYTES)
    return _over("all-gather", "data", layout.row_shards, chunk)


def publication(model: ModelConfig, learner: Layout, rollout: Layout) -> tuple[Collective, ...]:
    """Of the cast weights: each stacked array that fsdp splits is gathered on its own, first over as much of
    tensor as the rollout does without; of an adapted model the adapter's. Copies to the rollout are none.

    XLA joins what is under 30 MiB on GPUs. Where the rollout splits more than the learner, it may exchange
    before it gathers, half as much.
    """
    kept = rollout.tensor if learner.devices % rollout.tensor == 0 else 1
    kept = min(kept, learner.tensor)
    found: tuple[Collective, ...] = ()
    for values in split_arrays(model, replace(learner, tensor=kept)):
        whole = values * rollout.param_bytes
        if not model.lora:
            joined = learner.tensor // kept
            found += _over("all-gather", "tensor", joined, whole / learner.fsdp)
        found += _over("all-gather", "fsdp", learner.fsdp, whole)
    return found


def repeated(collectives: tuple[Collective, ...], times: int) -> tuple[Collective, ...]:
    """The same collectives so many times."""
    return tuple(replace(one, count=times * one.count) for one in collectives)


def gradients(model: ModelConfig, layout: Layout) -> tuple[Collective, ...]:
    """Of one micro-batch's weight gradients in the compute type, before they are accumulated. The head's
    is summed whole, in float32, in which its chunks are accumulated.

    A tied matrix is summed twice, as embedding and as head. Of an adapted model the adapter's alone: an
    array with a width is scattered, another summed whole.
    """
    part, size, deep = shard(model, layout), layout.compute_bytes, model.num_layers
    if model.lora:
        split, rest = adapter_split_values(model), adapter_whole_values(model, layout)
        found = _over("reduce-scatter", "fsdp", layout.fsdp, split * size, deep)
        found += _over("all-reduce", "fsdp", layout.fsdp, rest * size, deep)
        summed = split / layout.fsdp + rest
        return found + _over("all-reduce", "data", layout.data, summed * size, deep)
    matrix = part.vocab * model.width
    count = _weights_apart(model) * deep + 1
    array_bytes = (deep * _layer_values(model, part) + matrix) * size / count
    of_head = matrix * FLOAT32_BYTES
    found = _over("reduce-scatter", "fsdp", layout.fsdp, array_bytes, count)
    found += _over("all-reduce", "data", layout.data, array_bytes / layout.fsdp, count)
    found += _over("all-reduce", "fsdp", layout.fsdp, of_head)
    found += _over("all-reduce", "data", layout.data, of_head / layout.fsdp)
    if not model.num_experts:
        return found
    experts, count = expert_values(model, part, layout) * size / 2, 2 * model.num_layers
    left = max(1, layout.fsdp // layout.expert)
    holders = layout.row_shards // max(layout.fsdp, layout.expert)
    found += _over("reduce-scatter", "fsdp", left, experts, count)
    return found + _over("all-reduce", "data", holders, experts / left, count)


def _weights_apart(model: ModelConfig) -> int:
    """Weights of a layer gathered on their own, experts left out: a router stands for two."""
    return 3 if model.num_experts else WEIGHTS_PER_LAYER


def _layer_values(model: ModelConfig, part: Shard) -> int:
    """Values of one layer's weights that one tensor-parallel device computes with, without experts."""
    gates = 2 if model.gated_mlp else 1
    mlp = model.num_experts or (gates + 1) * part.ffw
    return model.width * (2 * part.query + 2 * part.kv + mlp)


def _over(
    kind: Kind, axis: Axis, devices: int, array_bytes: float, count: int = 1
) -> tuple[Collective, ...]:
    """Collectives over an axis; none over an axis of one device."""
    if devices == 1:
        return ()
    return (
        Collective(kind=kind, axis=axis, devices=devices, array_bytes=array_bytes, count=count),
    )
