"""What a process does with its memory: the host's around compilation, a GPU's."""

import os
import sys

import jax
import numpy as np
import pytest

from jaxrl import devices
from roofline import machine
from roofline.datasheets import datasheet


def test_memory_that_a_long_compilation_frees_is_given_back_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[str] = []
    monkeypatch.setattr(machine, "give_back_freed_memory", lambda: given.append("back"))
    devices.give_back_after_compiling()
    devices.give_back_after_compiling()  # listens no second time
    x = jax.numpy.zeros(3)
    given.clear()
    monkeypatch.setattr(devices, "_LONG_S", 1e6)
    jax.jit(lambda x: x + 1)(x).block_until_ready()
    assert not given
    monkeypatch.setattr(devices, "_LONG_S", 0.0)
    jax.jit(lambda x: x + 2)(x).block_until_ready()
    assert given == ["back"]


def test_a_program_runs_on_when_what_it_was_compiled_from_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forgotten: list[str] = []
    forget = devices.forget_lowered
    monkeypatch.setattr(devices, "forget_lowered", lambda: (forget(), forgotten.append("module")))
    devices.give_back_after_compiling()
    x = jax.numpy.zeros(3)
    program = jax.jit(lambda x: x + 3)
    forgotten.clear()
    program(x).block_until_ready()
    assert forgotten == ["module"]
    caches = [getattr(sys.modules[module], name) for module, name in devices._LOWERED]
    held = [cache.cache_info().currsize for cache in caches]
    assert held == [0, 0]
    assert np.asarray(program(x)).tolist() == [3.0] * 3
    assert forgotten == ["module"]  # not compiled again


@pytest.mark.parametrize(
    "told", [None, "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"]
)
def test_a_gpu_gives_what_a_plan_counts_on_unless_jax_was_told(
    monkeypatch: pytest.MonkeyPatch, told: str | None
) -> None:
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    monkeypatch.setattr(os, "environ", {told: "0.5"} if told else {})
    machine.take_gpu_memory(os.environ)
    asked = {name: os.environ[name] for name in names if name in os.environ}
    assert asked == ({told: "0.5"} if told else {"XLA_CLIENT_MEM_FRACTION": "0.95"})


@pytest.mark.parametrize(
    ("name", "driver_mib"),
    [("a100-sxm-80gb", 81920), ("h100-sxm", 81559), ("h200", 143771), ("b200", 183359)],
)
def test_the_memory_share_holds_the_datasheets_memory(name: str, driver_mib: int) -> None:
    """MiB as nvidia-smi shows them."""
    assert datasheet(name).hbm_bytes <= float(machine.MEMORY_SHARE) * driver_mib * 2**20
