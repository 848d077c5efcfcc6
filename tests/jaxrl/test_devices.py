"""What a process does with its memory around compilation."""

import jax
import pytest

from jaxrl import devices
from roofline import machine


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
