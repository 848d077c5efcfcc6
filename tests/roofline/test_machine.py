"""A process is set up before jax starts: freed memory is kept, on a CPU alone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from roofline.machine import _only_cpu

CALLS = """
import ctypes, resource, statistics, tempfile
from roofline.machine import keep_freed_memory
keep_freed_memory()
import jax
import jax.numpy as jnp

call = jax.jit(lambda x: jnp.sum((x @ x.T) @ x))
x = jnp.ones((5120, 64))

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = statistics.median([faults() for _ in range(15)][5:])
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
with tempfile.NamedTemporaryFile() as file:
    stream = libc.fopen(file.name.encode(), b"w")
    libc.malloc_info(0, ctypes.c_void_p(stream))
    libc.fclose(ctypes.c_void_p(stream))
    print(file.read().count(b"<heap "), found)
"""
"""Calls of a program with a temporary of 100 MiB; prints the heaps of the process and the page faults of a
call."""
TEMPORARY_PAGES = 5120 * 5120 * 4 // 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the options are those of glibc")
def test_all_threads_share_one_heap_in_which_temporaries_find_their_memory_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CALLS], cwd=Path(__file__).parents[2], check=True, text=True,
        capture_output=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    heaps, faults = done.stdout.split()
    assert int(heaps) == 1
    assert float(faults) < TEMPORARY_PAGES / 100


def test_what_the_environment_asks_for_decides_whether_programs_run_on_the_cpu() -> None:
    assert _only_cpu({"JAX_PLATFORMS": "cpu"})
    assert _only_cpu({"JAX_PLATFORMS": "cpu,cuda"})
    assert not _only_cpu({"JAX_PLATFORMS": "cuda,cpu"})


def test_without_a_word_a_plugin_of_an_accelerator_leaves_memory_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jax_plugins" / "xla_cuda").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert not _only_cpu({})
