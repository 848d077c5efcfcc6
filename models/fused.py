"""Layers as they are computed: weights that meet the same input side by side in one product.

With few rows a product's time is mostly the reading of its weight, and one wide product reads better than
several narrow ones; in backward, tensor-parallel devices then sum one gradient instead of one per weight.
Laying weights side by side is a copy. A sampler makes it once per version (`split_layers`), and where it is a
single CPU it holds no other: `fused` stores the layers so, prefill scans over the stack and decode reads each
layer where it lies in it (`viewed_layers`). Elsewhere a slice of an array is one more copy. `fused` also turns
the weights of the MLP, outputs first: a CPU then reads them front to back instead of packing them anew in every
product, 1.07 in tokens/s (benchmarks/LOG.md).
Letters: L layers, D width, K kv heads, G query heads per kv head, H head size, F ffw, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.lora import AdaptedLayers, Weight, grown, side_by_side, weight_of

if TYPE_CHECKING:
    from models.decoder import Decoder, Layers, Policy


SIDE_BY_SIDE = {
    "qkv": (3, ("q", "k", "v")),
    "qkv_bias": (2, ("q_bias", "k_bias", "v_bias")),
    "gate_up": (2, ("gate", "up")),
}
"""By attribute of a stack of FusedLayers the dim along which parameters stand in it, and which: those that
lack it have one place each."""
TURNED = {"gate_up": (0, 2, 3, 1), "down": (0, 2, 1)}
"""By attribute of such a stack where the dims of a turned one come from."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class FusedLayer:
    """One layer, or a stack of all with a leading L: weights that meet the same input, side by side in one
    product or apart.

    They lie side by side per kv head and per hidden unit, so that a tensor-parallel device holds what belongs
    together.
    """

    attention_norm: jax.Array  # [D]
    qkv: tuple[Weight, ...]  # [D, K, G + 2, H], or [D, K, G, H] and twice [D, K, 1, H]
    qkv_bias: tuple[jax.Array, ...] | None  # the same without D
    q_norm: jax.Array | None  # [H]
    k_norm: jax.Array | None  # [H]
    attention_out: Weight  # [K, G, H, D]
    mlp_norm: jax.Array  # [D]
    gate_up: tuple[Weight, ...]  # [D, 2, F], or [D, 1, F] each; without a gate only the latter
    down: Weight  # [F, D]
    turned: bool = field(default=False, metadata={"static": True})
    """The MLP's weights have their outputs in front: gate_up one [2, F, D] or [1, F, D], down [D, F]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class FusedDecoder:
    """A policy whose layers are stored as they are computed; stands where a Decoder is only read."""

    config: ModelConfig = field(metadata={"static": True})
    embedding: jax.Array  # [V, D]
    layers: FusedLayer  # with a leading L
    final_norm: jax.Array  # [D]
    head: jax.Array | None  # [V, D]; None: the embedding


def fused(policy: Decoder) -> FusedDecoder:
    """The weights with those of every layer side by side, those of the MLP turned: a copy."""
    layers = jax.vmap(partial(fused_layer, together=True))(policy.layers)
    turned = {
        name: jax.tree.map(lambda x, dims=dims: x.transpose(dims), getattr(layers, name))
        for name, dims in TURNED.items()
    }
    return FusedDecoder(
        config=policy.config,
        embedding=policy.embedding,
        layers=replace(layers, **turned, turned=True),
        final_norm=policy.final_norm,
        head=policy.head,
    )


def fused_layer(layer: Layers | AdaptedLayers | FusedLayer, *, together: bool) -> FusedLayer:
    """A layer's weights side by side, or apart, which copies nothing; one that is stored so as it is."""
    if isinstance(layer, FusedLayer):
        return layer
    plain = layer.frozen if isinstance(layer, AdaptedLayers) else layer
    q, k, v, gate, up = (weight_of(layer, name) for name in ("q", "k", "v", "gate", "up"))
    qkv = (q, grown(k, 2), grown(v, 2))
    bias = None
    if plain.q_bias is not None and plain.k_bias is not None and plain.v_bias is not None:
        bias = (plain.q_bias, plain.k_bias[:, None], plain.v_bias[:, None])
    gate_up = tuple(grown(w, 1) for w in (gate, up) if w is not None)
    if together:
        qkv = (side_by_side(qkv, 2),)
        bias = None if bias is None else (jnp.concatenate(bias, axis=1),)
        gate_up = (side_by_side(gate_up, 1),)
    return FusedLayer(
        attention_norm=plain.attention_norm,
        qkv=qkv,
        qkv_bias=bias,
        q_norm=plain.q_norm,
        k_norm=plain.k_norm,
        attention_out=weight_of(layer, "attention_out"),
        mlp_norm=plain.mlp_norm,
        gate_up=gate_up,
        down=weight_of(layer, "down"),
    )


def split_layers(policy: Policy) -> tuple[FusedLayer, ...]:
    """The layers one by one, ready to compute with: a copy of their parameters."""
    stacked = policy.layers
    return tuple(
        fused_layer(jax.tree.map(lambda x, i=i: x[i], stacked), together=True)
        for i in range(policy.config.num_layers)
    )


def can_view(config: ModelConfig, device: Any, devices: int) -> bool:
    """Whether a sampler on `devices` devices like this one reads its layers where they lie in one stack: on a
    single CPU, where an array can be part of another. Under an adapter the frozen layers are the learner's
    own, and not side by side."""
    return device.platform == "cpu" and devices == 1 and config.lora is None


def viewed_layers(policy: FusedDecoder, place: jax.sharding.Sharding) -> tuple[FusedLayer, ...]:
    """The layers one by one, as arrays within the memory of the stacks, which they keep alive.

    place: the single device. Only where `can_view`; a layer that begins off the alignment that XLA wants is
    copied.
    """
    on_host = jax.tree.map(np.asarray, policy.layers)  # shares the memory
    return tuple(
        jax.tree.map(lambda x, i=i: jax.device_put(x[i], place), on_host)
        for i in range(policy.config.num_layers)
    )
