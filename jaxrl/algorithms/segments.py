"""Sums and means over the packed sequences of a row. R rows, T tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def segment_sum(
    values: jax.Array, segment_ids: jax.Array, mask: jax.Array, max_segments: int
) -> jax.Array:
    """Sum over each packed sequence's masked-in tokens, at every token of that sequence.

    Args:
        values: [R, T] float32.
        segment_ids: [R, T] int32, 0 padding, 1.. per sequence within its row.
        mask: [R, T] bool, tokens that count.
        max_segments: upper bound of segment_ids; T always suffices.

    Returns:
        [R, T]; 0 for a sequence without a masked-in token.
    """

    def row_sums(row: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(row, ids, num_segments=max_segments + 1)

    totals = jax.vmap(row_sums)(jnp.where(mask, values, 0.0), segment_ids)
    return jnp.take_along_axis(totals, segment_ids, axis=1)


def segment_mean(
    values: jax.Array, segment_ids: jax.Array, mask: jax.Array, max_segments: int
) -> jax.Array:
    """Mean over each packed sequence's masked-in tokens, at every token of that sequence.

    Arguments and shape as in `segment_sum`; 0 for a sequence without a masked-in token.
    """
    totals = segment_sum(values, segment_ids, mask, max_segments)
    ones = jnp.ones(values.shape, values.dtype)
    return totals / jnp.maximum(segment_sum(ones, segment_ids, mask, max_segments), 1.0)
