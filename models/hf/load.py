"""Weights from safetensors files into sharded arrays, piece by piece.

A piece is some rows of one tensor, at most PIECE_BYTES. It is read, brought into our layout and dtype, and
sent to each device that holds part of it, where it is written into the shard in place. So the host never
holds more than a few pieces, whatever the size of a tensor, a file or a device's shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from models.config import ModelConfig
from models.decoder import Decoder, abstract_decoder
from models.fused import SIDE_BY_SIDE, TURNED, FusedDecoder, fused
from models.hf.names import HFTensor
from models.hf.read import Stored, checked_tensors, read_config, read_tensor
from models.parameters import input_dims, outer_table, stacked_layer_table
from models.sharding import map_parameters, parameters_by_name

PIECE_BYTES = 8 * 2**20
"""Most bytes of a piece, in the dtype it is loaded in; a parameter this small is put together on the
host."""
_Bounds = tuple[tuple[int, int], ...]
_Piece = tuple[tuple[int, ...], np.ndarray]
"""Where it begins in its array, and its values."""


def load_policy(
    folder: Path | str,
    config: ModelConfig | None = None,
    *,
    dtype: Any = jnp.float32,
    shardings: Decoder | None = None,
) -> Decoder:
    """The policy in a checkpoint folder, in `dtype`, placed by `shardings` (a Decoder of
    NamedShardings; None: the first device).

    Everything that can be told from the headers is checked before any weight is read. The host holds
    pieces of PIECE_BYTES, not tensors.
    Raises: ValueError naming the first tensor that is missing, unexpected or of the wrong shape or
    dtype, or the file that cannot be read.
    """
    folder = Path(folder)
    config = read_config(folder) if config is None else config
    sources = _sources(folder, config)
    table = outer_table(config) | stacked_layer_table(config)
    placement = {} if shardings is None else parameters_by_name(shardings)
    default = SingleDeviceSharding(jax.devices()[0])

    def load(name: str, _: Any) -> jax.Array:
        shape, sharding = table[name].shape, placement.get(name, default)
        return _assemble(
            shape, jnp.dtype(dtype), sharding, _of_parameter(sources[name], jnp.dtype(dtype))
        )

    return map_parameters(load, config)


def load_fused(
    folder: Path | str, config: ModelConfig, *, dtype: Any, shardings: FusedDecoder
) -> FusedDecoder:
    """As `load_policy`, but laid out as a sampler on one CPU holds it, without its parameters beside it."""
    sources = _sources(Path(folder), config)
    table = outer_table(config) | stacked_layer_table(config)

    def load(path: tuple[Any, ...], whole: Any, sharding: Sharding) -> jax.Array:
        name = next(key.name for key in reversed(path) if hasattr(key, "name"))
        dim, parts = SIDE_BY_SIDE.get(name, (0, (name,)))
        order = TURNED.get(name, range(len(whole.shape)))

        def pieces() -> Iterator[_Piece]:
            offset = 0
            for part in (part for part in parts if part in sources):
                own = table[part].shape
                for start, piece in _of_parameter(sources[part], jnp.dtype(dtype)):
                    if len(own) < len(whole.shape):
                        start = (*start[:dim], 0, *start[dim:])
                        piece = np.expand_dims(piece, dim)
                    start = (*start[:dim], start[dim] + offset, *start[dim + 1 :])
                    yield tuple(start[i] for i in order), piece.transpose(*order)
                offset += own[dim] if len(own) == len(whole.shape) else 1

        return _assemble(whole.shape, jnp.dtype(dtype), sharding, pieces())

    abstract = jax.eval_shape(fused, abstract_decoder(config))
    return jax.tree_util.tree_map_with_path(load, abstract, shardings)


def _sources(folder: Path, config: ModelConfig) -> dict[str, list[tuple[HFTensor, Stored]]]:
    """By parameter the tensors that it is made of, all of them checked."""
    sources: dict[str, list[tuple[HFTensor, Stored]]] = {}
    for tensor, stored in checked_tensors(folder, config):
        sources.setdefault(tensor.parameter, []).append((tensor, stored))
    return sources


def _of_parameter(sources: list[tuple[HFTensor, Stored]], dtype: np.dtype) -> Iterator[_Piece]:
    """Pieces of one parameter's tensors."""
    for tensor, stored in sources:
        for start, piece in _pieces(tensor, stored, dtype):
            if tensor.layer is None:
                yield start, piece
            else:
                yield (tensor.layer, *start), piece[None]


def _assemble(
    shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding, pieces: Iterator[_Piece]
) -> jax.Array:
    """One array: each shard filled from the pieces."""
    devices_of: dict[_Bounds, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = _bounds(() if index is None else index, shape)
        devices_of.setdefault(bounds, []).append(device)
    on_host = math.prod(shape) * dtype.itemsize <= PIECE_BYTES
    shards = [_Shard(devices, bounds, dtype, on_host) for bounds, devices in devices_of.items()]
    for start, piece in pieces:
        for shard in shards:
            shard.write(start, piece)
    parts = {device: array for shard in shards for device, array in shard.on_devices()}
    return jax.make_array_from_single_device_arrays(
        shape,
        sharding,
        [parts[device] for device in sharding.addressable_devices_indices_map(shape)],
    )


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> _Bounds:
    """(first, past the last) of each dimension."""
    index = index or (slice(None),) * len(shape)
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _pieces(tensor: HFTensor, stored: Stored, dtype: np.dtype) -> Iterator[_Piece]:
    """(first index in ours without L, piece in our layout and in `dtype`) of all rows of a tensor.

    Rows of the checkpoint's tensor run along one dimension of ours: the first, or, if it is
    transposed, the first of its output dims.
    """
    dim = input_dims(tensor.parameter) if tensor.transposed else 0
    count = tensor.own_shape[dim]
    rows_each = tensor.shape[0] // count
    row_bytes = math.prod(tensor.own_shape) // count * dtype.itemsize
    step = max(1, PIECE_BYTES // row_bytes)
    for begin in range(0, count, step):
        end = min(begin + step, count)
        raw = read_tensor(stored.file, tensor.name, slice(begin * rows_each, end * rows_each))
        piece = np.ascontiguousarray(raw.T if tensor.transposed else raw, dtype=dtype)
        own = (*tensor.own_shape[:dim], end - begin, *tensor.own_shape[dim + 1 :])
        yield (*(0,) * dim, begin, *(0,) * (len(own) - dim - 1)), piece.reshape(own)


class _Shard:
    """One part of a parameter, being filled on every device that holds it, or on the host for them."""

    def __init__(
        self, devices: Sequence[Any], bounds: _Bounds, dtype: np.dtype, on_host: bool
    ) -> None:
        self._devices = devices
        self._bounds = bounds
        shape = tuple(high - low for low, high in bounds)
        self._host = np.empty(shape, dtype) if on_host else None
        self._arrays = [] if on_host else [jnp.empty(shape, dtype, device=d) for d in devices]

    def write(self, start: tuple[int, ...], piece: np.ndarray) -> None:
        """The part of the piece that falls into this shard; start is the piece's place in the
        parameter."""
        inside = [
            (max(low, at), min(high, at + size))
            for (low, high), at, size in zip(self._bounds, start, piece.shape, strict=True)
        ]
        if any(low >= high for low, high in inside):
            return
        spans = zip(inside, start, strict=True)
        part = piece[tuple(slice(low - at, high - at) for (low, high), at in spans)]
        at = tuple(low - own for (low, _), (own, _) in zip(inside, self._bounds, strict=True))
        if self._host is not None:
            self._host[tuple(slice(i, i + n) for i, n in zip(at, part.shape, strict=True))] = part
            return
        pieces = [jax.device_put(part, device) for device in self._devices]
        filled = zip(self._arrays, pieces, strict=True)
        self._arrays = [_write(array, piece, at) for array, piece in filled]
        jax.block_until_ready(self._arrays)  # or pieces would queue up in memory

    def on_devices(self) -> Iterator[tuple[Any, jax.Array]]:
        """(device, the filled shard on it)."""
        if self._host is not None:
            self._arrays = [jax.device_put(self._host, device) for device in self._devices]
        return zip(self._devices, self._arrays, strict=True)


@partial(jax.jit, donate_argnums=(0,))
def _write(shard: jax.Array, piece: jax.Array, at: tuple[int, ...]) -> jax.Array:
    """The shard with the piece written into its own memory."""
    return jax.lax.dynamic_update_slice(shard, piece, at)
