"""Library kernels behind `models.attention`: cuDNN's fused attention and jax's Triton kernels.

Each runs on every device's own rows and kv heads (`jax.shard_map`), so that no kernel has to know how
the mesh divides its operands.
Letters: B rows or slots, T tokens, S cached keys, K kv heads, G query heads per kv head, H head size, M
segments of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental.pallas.ops.gpu import attention as triton_rows
from jax.experimental.pallas.ops.gpu import decode_attention as triton_cached
from jax.sharding import PartitionSpec

from models.activations import ROW_AXES, shares_work
from models.rows import MAX_SEGMENTS

BLOCK_TOKENS = 128
"""Rows are padded to a multiple of it for Triton, shorter ones to a power of two."""
LEAST_BLOCK = 16
"""Smallest side of a Triton product."""
KEY_BLOCKS = (128, 64, 32)
"""Keys that the decode kernel takes at a time: the most that keep the GPU busy."""
CUDNN_BROUGHT = 91000
"""The oldest cuDNN that jax[cuda12] 0.10 comes with: 9.10."""
_UNKNOWN_CAPABILITY = "0"
"""Of a device that does not say: no kernel that asks for one is chosen."""
DECODE_PROGRAMS = 264
"""Programs that keep a GPU busy in decode, two per multiprocessor of an H100 or H200: where slots times kv
heads are fewer, each slot's keys are split among several."""


def on_each_device(
    kernel: Callable[..., Any],
    heads: tuple[Any, ...],
    rows: tuple[jax.Array, ...],
    *,
    head_dim: int,
) -> Any:
    """kernel(*heads, *rows) on each device's part: all split in dimension 0, heads in `head_dim` too.

    heads: arrays or trees of them. The result is divided as the first, an array. Rows that the mesh does not
    divide stay whole.
    """
    if not shares_work():
        return kernel(*heads, *rows)
    mesh = jax.sharding.get_abstract_mesh()
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    split = ROW_AXES if heads[0].shape[0] % parts == 0 else None
    of_heads = PartitionSpec(split, *[None] * (head_dim - 1), "tensor")
    specs = (*[of_heads] * len(heads), *[PartitionSpec(split)] * len(rows))
    mapped = jax.shard_map(kernel, in_specs=specs, out_specs=of_heads, check_vma=False)
    return mapped(*heads, *rows)


def capability(device: Any) -> float:
    """Compute capability of a CUDA device: 9.0 is Hopper."""
    return float(getattr(device, "compute_capability", _UNKNOWN_CAPABILITY))


@contextmanager
def lowering_for(device: Any) -> Iterator[None]:
    """Within it, programs with cuDNN's kernels can be lowered for a device that is only described: jax asks
    the present device and library whether they take a kernel, and is told of `device`."""
    own = capability(device)
    with (
        patch.object(cudnn, "check_cudnn_version", lambda: CUDNN_BROUGHT),
        patch.object(cudnn, "check_compute_capability", lambda least: own >= float(least)),
    ):
        yield


def segment_spans(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the runs of equal ids of each row [B, T] are, padding among them.

    Returns: lengths [B, M] and starts [B, M + 1] int32, -1 where a row has fewer, as
    `fused_attention_stablehlo.dot_product_attention` takes them; and 1.0, or NaN for rows of more than M
    runs [B] float32. M is MAX_SEGMENTS, at most T, at least 2.
    """
    b, t = segment_ids.shape
    most = max(2, min(MAX_SEGMENTS, t))
    begins = jnp.concatenate(
        [jnp.ones((b, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    at = jnp.sort(jnp.where(begins, jnp.arange(t, dtype=jnp.int32)[None, :], t), axis=1)
    at = jnp.pad(at, ((0, 0), (0, max(0, most + 1 - t))), constant_values=t)[:, : most + 1]
    there = at[:, :most] < t
    lengths = jnp.where(there, at[:, 1:] - at[:, :-1], -1)
    starts = jnp.pad(jnp.where(there, at[:, :-1], -1), ((0, 0), (0, 1)), constant_values=-1)
    fits = jnp.where(jnp.sum(begins, axis=1) > most, jnp.nan, 1.0).astype(jnp.float32)
    return lengths, starts, fits


def _flat(q: jax.Array) -> jax.Array:
    """[B, T, K, G, H] -> [B, T, N, H]."""
    b, t, k, g, h = q.shape
    return q.reshape(b, t, k * g, h)


def cudnn_rows(
    q: jax.Array, k: jax.Array, v: jax.Array, spans: tuple[jax.Array, jax.Array, jax.Array]
) -> jax.Array:
    """Packed rows q [B, T, K, G, H], k and v [B, T, K, H] with the `segment_spans` of their ids.

    Work and memory follow the segments; there is no [T, T] mask. Every query head gets keys of its own:
    jax up to 0.11 scales the offsets of grouped keys by the number of query heads
    (github.com/jax-ml/jax/pull/39521), so that they would be read at the wrong place.
    """

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, starts: jax.Array, fits: jax.Array
    ) -> jax.Array:  # fmt: skip
        k = k * fits[:, None, None, None].astype(k.dtype)
        k, v = (jnp.repeat(x, q.shape[3], axis=2) for x in (k, v))
        heads: Any = cudnn.dot_product_attention(
            _flat(q), k, v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=starts,
            kv_offsets=starts, scale=q.shape[-1] ** -0.5, mask_type=cudnn.MaskType.PADDING_CAUSAL,
        )  # fmt: skip
        return heads.reshape(q.shape)

    with jax.named_scope("attention"):
        return on_each_device(attend, (q, k, v), spans, head_dim=2)


def cudnn_prompts(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention of q [B, T, K, G, H] over k and v [B, T, K, H]."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        heads: Any = cudnn.dot_product_attention(
            _flat(q), k, v, scale=q.shape[-1] ** -0.5, mask_type=cudnn.MaskType.CAUSAL
        )
        return heads.reshape(q.shape)

    with jax.named_scope("attention"):
        return on_each_device(attend, (q, k, v), (), head_dim=2)


def cudnn_cached(
    q: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array
) -> jax.Array:
    """One query per slot: q [B, K, G, H] over keys and values [B, K, S, H] up to positions [B]."""

    def attend(q: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array) -> jax.Array:
        b, k, g, h = q.shape
        heads: Any = cudnn.dot_product_attention(
            q.reshape(b, k * g, 1, h), keys, values, q_seqlen=jnp.ones_like(positions),
            kv_seqlen=positions + 1, scale=h**-0.5, mask_type=cudnn.MaskType.PADDING,
            qkv_layout="BNTH",
        )  # fmt: skip
        return heads.reshape(q.shape)

    return on_each_device(attend, (q, keys, values), (positions,), head_dim=1)


def pallas_rows(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, *, interpret: bool
) -> jax.Array:
    """Rows q [B, T, K, G, H], k and v [B, T, K, H]; segment_ids [B, T], None: each row is one segment.

    Every query block goes over all keys before it, of other segments too.
    """
    tokens = q.shape[1]
    block = min(BLOCK_TOKENS, max(LEAST_BLOCK, 1 << (tokens - 1).bit_length()))
    extra = -tokens % block

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> jax.Array:
        q, k, v = (jnp.pad(x, ((0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2))) for x in (q, k, v))
        of_rows = jnp.pad(ids[0], ((0, 0), (0, extra))) if ids else None
        k, v = (jnp.repeat(x, q.shape[3], axis=2) for x in (k, v))
        heads: Any = triton_rows.mha(
            _flat(q), k, v, of_rows, sm_scale=q.shape[-1] ** -0.5, causal=True, interpret=interpret
        )
        return heads.reshape(q.shape)[:, :tokens]

    rows = () if segment_ids is None else (segment_ids,)
    with jax.named_scope("attention"):
        return on_each_device(attend, (q, k, v), rows, head_dim=2)


def pallas_cached(
    q: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array, *, interpret: bool
) -> jax.Array:
    """One query per slot: q [B, K, G, H] over keys and values [B, K, S, H] up to positions [B]; S a
    multiple of 32. Blocks of keys past a slot's position are not read.

    jax's kernel divides bfloat16 sums by a float32 number and so answers in float32, up to 0.11: taken as it
    is, the next layer's queries would be float32 beside bfloat16 keys.
    """

    def attend(q: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array) -> jax.Array:
        b, k, g, h = q.shape
        block, splits = decode_blocks(b * k, keys.shape[2])
        heads: Any = triton_cached.gqa(
            q.reshape(b, k * g, h), keys.swapaxes(1, 2), values.swapaxes(1, 2),
            kv_seq_len=positions + 1, block_k=block, k_splits=splits, interpret=interpret,
        )  # fmt: skip
        return heads.reshape(q.shape).astype(q.dtype)

    return on_each_device(attend, (q, keys, values), (positions,), head_dim=1)


def decode_blocks(programs: int, keys: int) -> tuple[int, int]:
    """(keys of a block, parts that a slot's keys are split into) for so many slots times kv heads."""
    wanted = -(-DECODE_PROGRAMS // programs)
    sizes = [size for size in KEY_BLOCKS if keys % size == 0]
    block = next((size for size in sizes if keys // size >= wanted), sizes[-1])
    parts = [n for n in range(1, keys // block + 1) if keys // block % n == 0]
    return block, next((n for n in parts if n >= wanted), parts[-1])
