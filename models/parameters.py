"""Every parameter of a decoder, declared once: shape, logical axes, initialiser.

Initial values, abstract shapes, shardings and the weight-decay mask all derive from these two
tables.
Letters: L layers, D width, K kv heads, G query heads per kv head, H head size, F ffw, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Parameter:
    """One array of the model."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Logical axis of each dimension; `models.sharding` maps them to mesh axes."""
    stddev: float | None = None
    """Standard deviation of a normal initial value; None: the constant `fill`."""
    fill: float = 0.0
    decayed: bool = False
    """True for the matrices that weight decay applies to."""

    def init(self, key: jax.Array, dtype: Any) -> jax.Array:
        """A fresh value."""
        if self.stddev is None:
            return jnp.full(self.shape, self.fill, dtype)
        return (jax.random.normal(key, self.shape, jnp.float32) * self.stddev).astype(dtype)


def _matrix(shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int, depth: int = 1):
    """A matrix with standard deviation 1 / sqrt(fan_in * depth)."""
    return Parameter(shape, axes, stddev=(fan_in * depth) ** -0.5, decayed=True)


def layer_table(config: ModelConfig) -> dict[str, Parameter]:
    """Parameters of one layer, by attribute name of `models.decoder.Layers`.

    Query heads are grouped by the kv head they share, so that a split over kv heads keeps each
    group on one device. Projections into the residual stream start 1 / sqrt(2 L) smaller (GPT-2,
    section 2.3).
    Raises: ValueError for a mixture of experts.
    """
    if config.num_experts:
        raise ValueError(
            f"num_experts={config.num_experts}: this architecture is known for predictions only; dense "
            "decoders (num_experts=0) can be computed"
        )
    d, k, h, f = config.width, config.num_kv_heads, config.head_size, config.ffw_size
    g, depth = config.num_heads // k, 2 * config.num_layers
    table = {
        "attention_norm": Parameter((d,), (None,), fill=1.0),
        "q": _matrix((d, k, g, h), ("width", "kv_heads", None, None), d),
        "k": _matrix((d, k, h), ("width", "kv_heads", None), d),
        "v": _matrix((d, k, h), ("width", "kv_heads", None), d),
        "attention_out": _matrix((k, g, h, d), ("kv_heads", None, None, "width"), k * g * h, depth),
        "mlp_norm": Parameter((d,), (None,), fill=1.0),
        "up": _matrix((d, f), ("width", "ffw"), d),
        "down": _matrix((f, d), ("ffw", "width"), f, depth),
    }
    if config.gated_mlp:
        table["gate"] = _matrix((d, f), ("width", "ffw"), d)
    if config.qkv_bias:
        table["q_bias"] = Parameter((k, g, h), ("kv_heads", None, None))
        table["k_bias"] = Parameter((k, h), ("kv_heads", None))
        table["v_bias"] = Parameter((k, h), ("kv_heads", None))
    if config.qk_norm:
        table["q_norm"] = Parameter((h,), (None,), fill=1.0)
        table["k_norm"] = Parameter((h,), (None,), fill=1.0)
    return table


def input_dims(name: str) -> int:
    """How many leading dims of a weight [I..., O...] are its input: K, G, H of attention_out, else one."""
    return 3 if name == "attention_out" else 1


def stacked_layer_table(config: ModelConfig) -> dict[str, Parameter]:
    """`layer_table` with the leading dimension L over which layers are scanned."""
    return {
        name: replace(p, shape=(config.num_layers, *p.shape), axes=(None, *p.axes))
        for name, p in layer_table(config).items()
    }


def outer_table(config: ModelConfig) -> dict[str, Parameter]:
    """Parameters outside the layers, by attribute name of `models.decoder.Decoder`."""
    shape, axes = (config.vocab_size, config.width), ("vocab", "width")
    stddev = config.width**-0.5
    table = {
        "embedding": Parameter(shape, axes, stddev=stddev),
        "final_norm": Parameter((config.width,), (None,), fill=1.0),
    }
    if not config.tied_embeddings:
        table["head"] = Parameter(shape, axes, stddev=stddev)
    return table
