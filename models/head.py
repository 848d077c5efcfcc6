"""From hidden states to logits and to the log-probability and entropy of chosen tokens.

The [B, T, V] logits of a batch are larger than everything else in the step, so they exist only for
a chunk of tokens at a time, in forward and in backward. Letters: B rows, T tokens, D width, V
vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from models.activations import gather_width
from models.decoder import Policy


def _head_matrix(policy: Policy) -> jax.Array:
    return policy.embedding if policy.head is None else policy.head


def _logits(matrix: jax.Array, hidden: jax.Array) -> jax.Array:
    """float32 [..., V] of hidden [..., D] and matrix [V, D], multiplied in hidden's dtype."""
    with jax.named_scope("head"):
        return jnp.einsum(
            "...d,vd->...v", hidden, matrix.astype(hidden.dtype), preferred_element_type=jnp.float32
        )


def head_logits(policy: Policy, hidden: jax.Array, *, dtype: Any) -> jax.Array:
    """Logits float32 [..., V] of final hidden states [..., D], multiplied in `dtype`."""
    return _logits(_head_matrix(policy), hidden.astype(dtype))


def target_logprobs(
    policy: Policy,
    hidden: jax.Array,
    targets: jax.Array,
    *,
    temperature: float | jax.Array,
    chunk_tokens: int,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of targets [B, T] and entropy of their distribution, both float32 [B, T].

    The distribution is softmax(logits / temperature); hidden is [B, T, D]. At most about
    `chunk_tokens` tokens (at least one per row) have logits at the same time: chunks run along T,
    so rows stay where they are sharded.
    """
    rows, tokens = targets.shape
    chunks = -(-tokens // max(1, chunk_tokens // rows))
    size = -(-tokens // chunks)
    padding = chunks * size - tokens

    def split(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [chunks, B, size, ...]
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, chunks, size, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(rows, chunks * size)[:, :tokens]

    scale = 1.0 / jnp.asarray(temperature, jnp.float32)
    matrix = gather_width(_head_matrix(policy), dtype)
    logprobs, entropy = _chunked(matrix, split(hidden.astype(dtype)), split(targets), scale)
    return join(logprobs), join(entropy)


@jax.custom_vjp
def _chunked(
    matrix: jax.Array, hidden: jax.Array, targets: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies [C, B, t] of C chunks: hidden [C, B, t, D], matrix [V, D]."""
    logprobs, entropy, _ = jax.lax.map(partial(_chunk, matrix, scale), (hidden, targets))
    return logprobs, entropy


def _chunk(
    matrix: jax.Array, scale: jax.Array, chunk: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability, entropy and log-sum-exp [B, t] of one chunk.

    With m = max z, e = exp(z - m): log-sum-exp = m + log(sum e), entropy = log-sum-exp - sum e z / sum e. The
    sums follow from the logits and m alone, so that a GPU makes all of them in one pass over the logits.
    """
    hidden, targets = chunk
    logits = _logits(matrix, hidden) * scale
    peak = jnp.max(logits, axis=-1)
    below = logits - peak[..., None]
    masses = jnp.exp(below)
    total = jnp.sum(masses, axis=-1)
    mean = jnp.sum(masses * logits, axis=-1) / total
    chosen = jnp.sum(jnp.where(_is_target(logits, targets), below, 0.0), axis=-1)
    log_total = jnp.log(total)
    return chosen - log_total, peak + log_total - mean, peak + log_total


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """[B, t, V] bool; a comparison instead of a gather, so that a vocabulary split over devices
    stays split."""
    vocabulary = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    return vocabulary == targets[..., None]


def _chunked_forward(matrix: jax.Array, hidden: jax.Array, targets: jax.Array, scale: jax.Array):
    logprobs, entropy, log_sum = jax.lax.map(partial(_chunk, matrix, scale), (hidden, targets))
    return (logprobs, entropy), (matrix, hidden, targets, scale, log_sum, entropy)


def _chunked_backward(saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]):
    """Recompute each chunk's logits z; with p = softmax(z): dz = a (onehot - p) - b p (log p +
    entropy).

    a and b are the cotangents of log-probability and entropy. `scale` takes no gradient:
    temperature is a setting.
    """
    matrix, hidden, targets, scale, log_sum, entropy = saved

    def step(d_matrix: jax.Array, chunk: tuple[jax.Array, ...]):
        h, target, lse, ent, a, b = chunk
        logits = _logits(matrix, h) * scale
        logp = logits - lse[..., None]
        weight = a[..., None] + b[..., None] * (logp + ent[..., None])
        d_logits = jnp.where(_is_target(logits, target), a[..., None], 0.0) - jnp.exp(logp) * weight
        d_logits = (d_logits * scale).astype(h.dtype)
        with jax.named_scope("head"):
            d_hidden = jnp.einsum("btv,vd->btd", d_logits, matrix)
            d_matrix = d_matrix + jnp.einsum(
                "btv,btd->vd", d_logits, h, preferred_element_type=jnp.float32
            )
        return d_matrix, d_hidden

    xs = (hidden, targets, log_sum, entropy, *cotangents)
    d_matrix, d_hidden = jax.lax.scan(step, jnp.zeros(matrix.shape, jnp.float32), xs)
    return d_matrix.astype(matrix.dtype), d_hidden, None, jnp.zeros_like(scale)


_chunked.defvjp(_chunked_forward, _chunked_backward)
