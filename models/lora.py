"""Low-rank adapters: y = x W + (alpha / rank) (x A) B with W frozen (LoRA, arXiv:2106.09685 section 4.1).

A starts normal with variance 1 / (3 fan_in), that of peft's uniform start; B starts at zero, so that a
fresh adapter changes nothing. The sum is never multiplied out but by `merged`, for export: in bfloat16 a
small A B would be rounded away. An adapter is a dictionary of arrays by parameter name, `q_a`, `q_b`, ...,
stacked over L like the weights they belong to.
Letters: L layers, D width, r rank; I... and O... are the input and output dims of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from models.config import Lora, ModelConfig
from models.parameters import Parameter, input_dims, layer_table

if TYPE_CHECKING:
    from models.decoder import Decoder, Layers

Adapter = dict[str, Any]
"""Arrays, or what stands for them, by name."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LowRankSum:
    """weight [I..., O...] + scale * a [I..., r] b [r, O...]; `models.layers.product` takes it for a weight."""

    weight: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float = field(metadata={"static": True})


Weight = jax.Array | LowRankSum


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AdaptedLayers:
    """Layers with their adapter, each array with a leading L; one slice of it is one layer."""

    frozen: Layers
    adapter: Adapter
    scale: float = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AdaptedDecoder:
    """A policy whose base is frozen; stands wherever the functions of `models` take a Decoder."""

    base: Decoder
    adapter: Adapter

    @property
    def config(self) -> ModelConfig:
        """The architecture, its adapter included."""
        return self.base.config

    @property
    def embedding(self) -> jax.Array:
        """[V, D]."""
        return self.base.embedding

    @property
    def final_norm(self) -> jax.Array:
        """[D]."""
        return self.base.final_norm

    @property
    def head(self) -> jax.Array | None:
        """[V, D]; None: the embedding."""
        return self.base.head

    @property
    def layers(self) -> AdaptedLayers:
        """The layers, each with its part of the adapter."""
        return AdaptedLayers(
            frozen=self.base.layers, adapter=self.adapter, scale=lora_of(self.config).scale
        )


def lora_of(config: ModelConfig) -> Lora:
    """The adapter's shape. Raises: ValueError if the architecture has none."""
    if config.lora is None:
        raise ValueError("this model has no adapter; set lora.rank to at least 1")
    return config.lora


def adapter_table(config: ModelConfig) -> dict[str, Parameter]:
    """Every array of the adapter, stacked over L, with the logical axes of the weight it belongs to.

    Raises: ValueError for an architecture without adapter, or without any of its targets.
    """
    lora, depth = lora_of(config), config.num_layers
    table: dict[str, Parameter] = {}
    for name, weight in layer_table(config).items():
        if name not in lora.targets:
            continue
        split = input_dims(name)
        shape, axes = weight.shape, weight.axes
        fan_in = math.prod(shape[:split])
        table[f"{name}_a"] = Parameter(
            (depth, *shape[:split], lora.rank), (None, *axes[:split], None), (3 * fan_in) ** -0.5
        )
        table[f"{name}_b"] = Parameter(
            (depth, lora.rank, *shape[split:]), (None, None, *axes[split:])
        )
    if not table:
        raise ValueError(f"this model has none of the adapter's targets {', '.join(lora.targets)}")
    return table


def init_adapter(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Adapter:
    """A fresh adapter, which changes nothing yet."""
    table = adapter_table(config)
    keys = jax.random.split(key, len(table))
    return {name: p.init(k, dtype) for (name, p), k in zip(table.items(), keys, strict=True)}


def weight_of(layer: Layers | AdaptedLayers, name: str) -> Any:
    """A weight of one layer as `models.layers.product` takes it; None where the layer has none."""
    if not isinstance(layer, AdaptedLayers):
        return getattr(layer, name)
    weight = getattr(layer.frozen, name)
    if f"{name}_a" not in layer.adapter:
        return weight
    a, b = layer.adapter[f"{name}_a"], layer.adapter[f"{name}_b"]
    return LowRankSum(weight=weight, a=a, b=b, scale=layer.scale)


def grown(weight: Weight, dim: int) -> Weight:
    """A weight with one input dim, and a new output dim of size 1 before `dim`."""
    if not isinstance(weight, LowRankSum):
        return jnp.expand_dims(weight, dim)
    return LowRankSum(
        weight=jnp.expand_dims(weight.weight, dim), a=weight.a,
        b=jnp.expand_dims(weight.b, dim), scale=weight.scale,
    )  # fmt: skip


def side_by_side(weights: Sequence[Weight], dim: int) -> Weight:
    """Weights [D, O...] that meet the same input as one, concatenated along output dim `dim`.

    Their A stand side by side too, and their B in blocks, each below its own part of the output.
    """
    plain = [w.weight if isinstance(w, LowRankSum) else w for w in weights]
    whole = jnp.concatenate(plain, axis=dim)
    low = [w for w in weights if isinstance(w, LowRankSum)]
    if not low:
        return whole
    blocks, before = [], 0
    for w, p in zip(weights, plain, strict=True):
        if isinstance(w, LowRankSum):
            around = [(0, 0)] * w.b.ndim
            around[dim] = (before, whole.shape[dim] - before - p.shape[dim])
            blocks.append(jnp.pad(w.b, around))
        before += p.shape[dim]
    return LowRankSum(
        weight=whole, a=jnp.concatenate([w.a for w in low], axis=-1),
        b=jnp.concatenate(blocks, axis=0), scale=low[0].scale,
    )  # fmt: skip


def saves_products(config: ModelConfig) -> Callable[..., Any]:
    """A policy for `jax.checkpoint`: keep the results of weight products, but make those of (x A) B again.

    Kept, they would double what a layer keeps, for products that cost next to nothing.
    """
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    if config.lora is None:
        return keep
    ranks = {config.lora.rank * together for together in (1, 2, 3)}

    def policy(primitive: Any, *operands: Any, **parameters: Any) -> Any:
        if primitive is jax.lax.dot_general_p:
            ((contracted, _), _) = parameters["dimension_numbers"]
            if math.prod(operands[0].shape[dim] for dim in contracted) in ranks:
                return False
        return keep(primitive, *operands, **parameters)

    return policy


def merged(config: ModelConfig, name: str, weight: Any, adapter: Adapter) -> Any:
    """Parameter `name` with its adapter added in float32, numpy or jax, stacked over L; another as it is."""
    if f"{name}_a" not in adapter:
        return weight
    a, b = adapter[f"{name}_a"], adapter[f"{name}_b"]
    depth, rank = a.shape[0], a.shape[-1]
    change = a.astype(jnp.float32).reshape(depth, -1, rank) @ b.astype(jnp.float32).reshape(
        depth, rank, -1
    )
    return weight.astype(jnp.float32) + lora_of(config).scale * change.reshape(weight.shape)
