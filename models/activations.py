"""Where activations live: rows are split over the data and fsdp axes of the mesh in context."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec

ROW_AXES = ("data", "fsdp")
"""Mesh axes that rows of a batch and slots of a cache are split over."""


def constrain_rows(x: jax.Array) -> jax.Array:
    """x [B, ...] with its rows split over ROW_AXES and the rest replicated; x itself outside a
    mesh.

    Without it the compiler may follow the fsdp split of the weights and split D instead of B. The
    mesh is the one of `jax.set_mesh`; rows that its axes do not divide are left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(ROW_AXES) <= set(mesh.axis_names):
        return x
    if x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROW_AXES))


def shares_work() -> bool:
    """Whether the mesh in context has more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def gather_width(matrix: jax.Array, dtype: Any) -> jax.Array:
    """matrix [V, D] in `dtype` with D whole on every device and V split over the tensor axis where it divides.

    Looking rows up in a matrix whose D is split would move activations between devices instead of
    weights, and not as the rows are split. A cast comes first, on each device's part: left to the compiler,
    it would follow the gather. Outside a mesh the matrix is only cast.
    """
    cast = matrix.astype(dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or "tensor" not in mesh.axis_names:
        return cast
    split = "tensor" if matrix.shape[0] % mesh.shape["tensor"] == 0 else None
    if cast.dtype != matrix.dtype:
        cast = jax.lax.with_sharding_constraint(cast, PartitionSpec(split, "fsdp"))
    return jax.lax.with_sharding_constraint(cast, PartitionSpec(split, None))
