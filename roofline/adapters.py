"""What a low-rank adapter costs: its parameters, and its two thin products beside each weight's.

Left out: on tensor-parallel devices the sums of the rank-wide results of attention out and down, a
thousandth of the sums beside them. Letters: r rank; a prime marks a size divided over the tensor axis.
"""

from __future__ import annotations

from models.config import ModelConfig
from roofline.kernels import Layout, Shard, Work, passes, product, shard

_GROUPS = (("q", "k", "v"), ("attention_out",), ("gate", "up"), ("down",))
"""Weights that meet the same input."""


def adapter_parameters(model: ModelConfig, layout: Layout) -> int:
    """Adapter parameters stored on one device, their widths over fsdp, heads and ffw over tensor; 0
    without an adapter."""
    if model.lora is None:
        return 0
    part = shard(model, layout)
    widths = {**dict.fromkeys(_targets(model), 0), **dict.fromkeys(("attention_out", "down"), 1)}
    held = 0
    for name, pair in _sizes(model, part).items():
        held += pair[widths[name]] // layout.fsdp + pair[1 - widths[name]]
    return model.num_layers * model.lora.rank * held


def adapter_arrays(model: ModelConfig) -> int:
    """Arrays of the adapter, A and B of each target, stacked over the layers."""
    return 0 if model.lora is None else 2 * len(_targets(model))


def adapter_split_values(model: ModelConfig) -> int:
    """Values of one layer's arrays that have a width, which fsdp splits: A of what reads the residual,
    B of what adds to it."""
    return 0 if model.lora is None else model.lora.rank * model.width * len(_targets(model))


def adapter_whole_values(model: ModelConfig, layout: Layout) -> int:
    """Gradients of one layer's other arrays on one tensor-parallel device. Weights that meet the same
    input have one B with blocks on its diagonal, summed in full."""
    if model.lora is None:
        return 0
    part, rank = shard(model, layout), model.lora.rank
    sizes, every = _sizes(model, part), _sizes_of_all(model, part)
    values = sum(rank * sizes[name][0] for name in ("attention_out", "down") if name in sizes)
    for group in (("q", "k", "v"), ("gate", "up")):
        blocks = sum(name in sizes for name in group)
        values += blocks * rank * sum(every[name][1] for name in group if name in every)
    return values


def adapter_products(
    model: ModelConfig, part: Shard, layout: Layout, tokens: int, *, together: bool
) -> Work:
    """One layer's x A, (x A) B and their sum with x W on `tokens` tokens, forward.

    together: weights that meet the same input are multiplied as one, so that their B is one matrix with
    blocks on its diagonal, multiplied in full.
    """
    if model.lora is None:
        return Work()
    sizes, rank, e, work = _sizes(model, part), model.lora.rank, layout.compute_bytes, Work()
    for group in _GROUPS:
        members = [sizes[name] for name in group if name in sizes]
        if not members:
            continue
        if together:
            every = _sizes_of_all(model, part)
            out = sum(every[name][1] for name in group if name in every)
            members = [(members[0][0], out)]
        inner = rank * (sum(n in sizes for n in group) if together else 1)
        for fan_in, fan_out in members:
            work += product(tokens, fan_in, inner, e) + product(tokens, inner, fan_out, e)
            work += passes(3 * tokens * fan_out, e)
    return work


def adapter_made_again(
    model: ModelConfig, part: Shard, layout: Layout, tokens: int, *, together: bool, down: bool
) -> Work:
    """One layer's products (x A) B on `tokens` tokens, forward: of down alone, or of all but it.

    What backward keeps of an adapter is x A; it makes the rest again, but for down's, whose sum it does
    not read.
    """
    work = Work()
    if model.lora is None:
        return work
    sizes, every = _sizes(model, part), _sizes_of_all(model, part)
    for group in _GROUPS:
        members = [name for name in group if name in sizes and (name == "down") == down]
        if together and members:
            out = sum(every[name][1] for name in group if name in every)
            work += product(tokens, len(members) * model.lora.rank, out, layout.compute_bytes)
        else:
            for name in members:
                work += product(tokens, model.lora.rank, sizes[name][1], layout.compute_bytes)
    return work


def _targets(model: ModelConfig) -> tuple[str, ...]:
    """Those of the adapter's targets that the architecture has."""
    wanted = () if model.lora is None else model.lora.targets
    return tuple(name for name in wanted if name != "gate" or model.gated_mlp)


def _sizes(model: ModelConfig, part: Shard) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each target on one device."""
    every = _sizes_of_all(model, part)
    return {name: every[name] for name in _targets(model)}


def _sizes_of_all(model: ModelConfig, part: Shard) -> dict[str, tuple[int, int]]:
    sizes = {
        "q": (part.width, part.query), "k": (part.width, part.kv), "v": (part.width, part.kv),
        "attention_out": (part.query, part.width), "gate": (part.width, part.ffw),
        "up": (part.width, part.ffw), "down": (part.ffw, part.width),
    }  # fmt: skip
    if not model.gated_mlp:
        del sizes["gate"]
    return sizes
