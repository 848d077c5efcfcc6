"""Where activations live: rows are split over the data and fsdp axes of the mesh in context."""

from __future__ import annotations

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


@jax.custom_vjp
def gather_width(matrix: jax.Array) -> jax.Array:
    """matrix [V, D] with D whole on every device and V split over the tensor axis where it divides.

    Looking rows up in a matrix whose D is split would move activations between devices instead of
    weights, and not as the rows are split. Its gradient comes back split as it is stored: a constraint's
    own gradient would be whole on every device. The matrix itself outside a mesh.
    """
    return _constrain(matrix, width=None)


def scatter_width(matrix: jax.Array) -> jax.Array:
    """matrix [V, D] with D split over the fsdp axis where it divides, as parameters are stored: what is
    summed over devices is then scattered to them, not summed whole on each."""
    return _constrain(matrix, width="fsdp")


def _constrain(matrix: jax.Array, *, width: str | None) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not {"fsdp", "tensor"} <= set(mesh.axis_names):
        return matrix
    split = "tensor" if matrix.shape[0] % mesh.shape["tensor"] == 0 else None
    if width is not None and matrix.shape[1] % mesh.shape[width]:
        width = None
    return jax.lax.with_sharding_constraint(matrix, PartitionSpec(split, width))


def _gather_forward(matrix: jax.Array) -> tuple[jax.Array, None]:
    return _constrain(matrix, width=None), None


def _gather_backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (scatter_width(gradient),)


gather_width.defvjp(_gather_forward, _gather_backward)
