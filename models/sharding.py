"""Where arrays live: one mesh, one table from logical axis to mesh axis, and what follows from
them.

Mesh axes: `data` replicates the parameters, `fsdp` splits parameters and rows, `tensor` splits
heads, ffw and vocabulary. Axes are Auto: shardings are given at the edges and by `constrain_rows`,
the compiler does the rest. Run programs that contain activations inside `jax.set_mesh(mesh)`, or
the constraints are not applied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from models.activations import ROW_AXES
from models.config import ModelConfig
from models.decoder import Decoder, Policy, abstract_decoder
from models.fused import FusedDecoder, FusedLayer, fused, split_layers
from models.lora import AdaptedDecoder, Adapter, adapter_table, init_adapter, merged
from models.parameters import (
    Parameter,
    input_dims,
    layer_table,
    outer_table,
    stacked_layer_table,
)

MESH_AXES = ("data", "fsdp", "tensor")
LOGICAL_TO_MESH: dict[str, str] = {
    "width": "fsdp",
    "kv_heads": "tensor",
    "ffw": "tensor",
    "vocab": "tensor",
}
"""The one place that says which logical axis is split over which mesh axis."""


def make_mesh(
    devices: Sequence[Any] | np.ndarray, *, data: int = 1, fsdp: int = 1, tensor: int = 1
) -> Mesh:
    """Mesh (data, fsdp, tensor) over exactly data * fsdp * tensor devices, tensor innermost, all
    axes Auto.

    Raises: ValueError when the product is not the number of devices.
    """
    grid = np.asarray(devices)
    if min(data, fsdp, tensor) < 1 or grid.size != data * fsdp * tensor:
        raise ValueError(
            f"a mesh of data={data} * fsdp={fsdp} * tensor={tensor} needs "
            f"{data * fsdp * tensor} devices, but {grid.size} were given; every factor is at least "
            f"1 and their product must be {grid.size}"
        )
    return Mesh(grid.reshape(data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _mesh_axis(name: str, dim: str | None, size: int, mesh: Mesh | AbstractMesh) -> str | None:
    """Mesh axis for one dimension of one parameter.

    A vocabulary that the axis does not divide is replicated: its size is given by the tokenizer, so
    there is nothing the user could choose. Any other indivisible dimension is an error.
    """
    if dim is None:
        return None
    axis = LOGICAL_TO_MESH[dim]
    count = mesh.shape[axis]
    if size % count == 0:
        return axis
    if dim == "vocab":
        return None
    valid = [n for n in range(1, size + 1) if size % n == 0]
    raise ValueError(
        f"{dim}={size} (of parameter {name}) cannot be split over mesh axis {axis}={count}; "
        f"set {axis} to one of {valid}"
    )


def _sharding(name: str, parameter: Parameter, mesh: Mesh | AbstractMesh) -> NamedSharding:
    dims = zip(parameter.axes, parameter.shape, strict=True)
    spec = PartitionSpec(*(_mesh_axis(name, dim, size, mesh) for dim, size in dims))
    return NamedSharding(mesh, spec)


def policy_shardings(config: ModelConfig, mesh: Mesh | AbstractMesh) -> Decoder:
    """A Decoder with a NamedSharding in place of each array; an AbstractMesh needs no devices.

    Raises: ValueError naming the first dimension that its mesh axis does not divide.
    """
    table = outer_table(config) | stacked_layer_table(config)
    return map_parameters(lambda name, _: _sharding(name, table[name], mesh), config)


def split_shardings(config: ModelConfig, mesh: Mesh | AbstractMesh) -> tuple[FusedLayer, ...]:
    """A NamedSharding for each array of `split_layers`: its dims lie as those of the parameters in it.

    Raises: ValueError naming the first dimension that its mesh axis does not divide.
    """
    table = layer_table(config)
    axes = {name: parameter.axes for name, parameter in table.items()}
    axes |= {"qkv": axes["q"], "qkv_bias": axes["q"][1:]}
    axes["gate_up"] = (axes["up"][0], None, *axes["up"][1:])

    def leaf(path: tuple[Any, ...], abstract: Any) -> NamedSharding:
        name, part = path[1].name, getattr(path[-1], "name", None)
        dims, split = axes[name], input_dims("q" if name == "qkv" else name)
        if part == "a":
            dims = (*dims[:split], None)
        elif part == "b":
            dims = (None, *dims[split:])
        return _sharding(name, Parameter(abstract.shape, dims), mesh)

    policy: Policy = abstract_decoder(config)
    if config.lora is not None:
        adapter = jax.eval_shape(partial(init_adapter, config), jax.random.key(0))
        policy = AdaptedDecoder(base=policy, adapter=adapter)
    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(split_layers, policy))


def fused_shardings(config: ModelConfig, mesh: Mesh | AbstractMesh) -> FusedDecoder:
    """A NamedSharding for each array of `fused`, whole: a single CPU samples from it."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda _: whole, jax.eval_shape(fused, abstract_decoder(config)))


def decay_mask(config: ModelConfig) -> Decoder:
    """A Decoder of bools: True for the matrices that weight decay applies to (not norms, biases,
    embeddings)."""
    table = outer_table(config) | stacked_layer_table(config)
    return map_parameters(lambda name, _: table[name].decayed, config)


def map_parameters(make: Callable[[str, Any], Any], config: ModelConfig) -> Any:
    """A Decoder whose leaves are make(parameter name, abstract array)."""

    def leaf(path: tuple[Any, ...], abstract: Any) -> Any:
        return make(jax.tree_util.keystr(path[-1:], simple=True), abstract)

    return jax.tree_util.tree_map_with_path(leaf, abstract_decoder(config))


def parameters_by_name(tree: Decoder) -> dict[str, Any]:
    """The leaves of a Decoder by parameter name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path[-1:], simple=True): leaf for path, leaf in leaves}


def init_sharded(config: ModelConfig, key: jax.Array, mesh: Mesh, dtype: Any) -> Decoder:
    """A fresh Decoder whose arrays are made on their own devices.

    The same values on every mesh, up to the last bit of float32.
    """
    make = partial(Decoder, config, dtype=dtype)
    return jax.jit(make, out_shardings=policy_shardings(config, mesh))(key)


def adapter_shardings(config: ModelConfig, mesh: Mesh | AbstractMesh) -> Adapter:
    """A NamedSharding for each array of the adapter: its dims lie as those of the weight it belongs to.

    Raises: ValueError naming the first dimension that its mesh axis does not divide.
    """
    return {name: _sharding(name, p, mesh) for name, p in adapter_table(config).items()}


def adapt(base: Decoder, key: jax.Array, mesh: Mesh) -> AdaptedDecoder:
    """`base` with a fresh float32 adapter of the shape in its configuration."""
    config = base.config
    places = adapter_shardings(config, mesh)
    adapter = jax.jit(partial(init_adapter, config), out_shardings=places)(key)
    return AdaptedDecoder(base=base, adapter=adapter)


def merge_adapter(config: ModelConfig, base: Decoder, adapter: Adapter) -> Decoder:
    """The weights of an adapted policy as one Decoder, in the dtypes and shardings of `base`.

    config: the architecture with the adapter's shape.
    """

    def sums(base: Decoder, adapter: Adapter) -> Decoder:
        def leaf(path: tuple[Any, ...], weight: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path[-1:], simple=True)
            return merged(config, name, weight, adapter).astype(weight.dtype)

        return jax.tree_util.tree_map_with_path(leaf, base)

    return jax.jit(sums, out_shardings=jax.tree.map(lambda x: x.sharding, base))(base, adapter)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch [B, ...], split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def cache_shardings(config: ModelConfig, mesh: Mesh) -> Any:
    """One NamedSharding for all keys and values: slots over data and fsdp, kv heads over tensor. A tree
    prefix of any KVCache.

    Raises: ValueError when the tensor axis does not divide the kv heads.
    """
    heads = _mesh_axis("cache", "kv_heads", config.num_kv_heads, mesh)
    return NamedSharding(mesh, PartitionSpec(ROW_AXES, heads))
