"""Devices to compile for: described GPUs of one node, or the host's own."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jax
from jax.experimental import topologies

from roofline.datasheets import datasheet
from roofline.names import meant

HOST = "cpu"
"""The host's devices: what CI compiles for."""
PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
"""One of them compiles for CUDA."""
_SUFFIX = ".textproto"


def target_names() -> tuple[str, ...]:
    """Cards that programs can be compiled for, by the names of `roofline.datasheets`."""
    files = resources.files("roofline").joinpath("targets").iterdir()
    names = (file.name for file in files)
    return tuple(sorted(n.removesuffix(_SUFFIX) for n in names if n.endswith(_SUFFIX)))


def can_compile_for_gpus() -> bool:
    """Whether this Python has a CUDA plug-in of jax."""
    return any(_installed(name) for name in PLUGINS)


def target_devices(name: str, count: int) -> Sequence[Any]:
    """`count` devices of one node, that programs can be compiled for but not run on.

    Raises:
        ValueError: no such card, more devices than a node has, or no CUDA plug-in.
    """
    if name == HOST:
        return _host_devices(count)
    known = target_names()
    hardware = datasheet(name)  # other names of the same card
    if hardware.name not in known:
        raise ValueError(
            f"no target description of {name!r}{meant(hardware.name, known)} Known: {', '.join(known)}"
        )
    if not 1 <= count <= hardware.node_devices:
        raise ValueError(
            f"{count} devices: a node of {hardware.name} has 1 to {hardware.node_devices}"
        )
    if not can_compile_for_gpus():
        raise ValueError(
            f"compiling for {hardware.name} needs jax's CUDA plug-in (no GPU): `make rehearse-setup` "
            "puts it into .venv-rehearse; then run .venv-rehearse/bin/python -m roofline.rehearse"
        )
    # a program for an absent device can be stored, but only a present one reads it back
    jax.config.update("jax_enable_compilation_cache", False)
    described = resources.files("roofline").joinpath("targets", hardware.name + _SUFFIX)
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=hardware.name, topology=f"1x1x{count}",
        target_config=described.read_text("utf-8"),
    )  # fmt: skip
    return topology.devices


def _host_devices(count: int) -> Sequence[Any]:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"{count} devices, but the host poses as {len(devices)}; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:count]


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package it is part of
        return False
