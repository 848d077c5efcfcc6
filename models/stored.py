"""Numbers of the key and value cache: as they are, or in 8 bits with one scale per head and token.

The scale is the largest magnitude over the head size divided by the largest number of the 8-bit type, so
nothing overflows and a token's error does not depend on other tokens. int8 rounds to nearest in equal steps
(1/254 of the largest magnitude at most); float8_e4m3fn has 3 bits of mantissa (OCP 8-bit floating point
specification 1.0, section 5), so its error is relative, up to 1/16.
Letters: B slots, K kv heads, H head size, s tokens of a segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

SCALED_DTYPES = (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn))
"""Types whose numbers need a scale."""
LEAST_SCALE = 1e-30
"""Scale of a head that is all zeros."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Scaled:
    """numbers * scale."""

    numbers: Any  # [B, K, ..., H or blocks of H] int8 or float8_e4m3fn
    scale: Any  # [B, K, s] float32


Stored = jax.Array | Scaled
"""Keys or values of one segment of one layer."""


def is_scaled(dtype: Any) -> bool:
    """Whether numbers of this type are stored beside a scale."""
    return jnp.dtype(dtype) in SCALED_DTYPES


def num_tokens(values: Stored) -> int:
    """Tokens s of a segment of values [B, K, s, H]."""
    return values.scale.shape[2] if isinstance(values, Scaled) else values.shape[2]


def dtype_of(stored: Stored) -> jnp.dtype:
    """Type of the numbers."""
    return stored.numbers.dtype if isinstance(stored, Scaled) else stored.dtype


def scaled(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Numbers [..., H] of `dtype` and scales [...] of x [..., H]."""
    x = x.astype(jnp.float32)
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    largest = float(jnp.iinfo(dtype).max if is_integer else jnp.finfo(dtype).max)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1) / largest, LEAST_SCALE)
    numbers = x / scale[..., None]
    return (jnp.round(numbers) if is_integer else numbers).astype(dtype), scale
