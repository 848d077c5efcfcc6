"""Which machine this is, how a process is set up on it, and where its calibration is kept. Standard library
only.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from models.config import ModelConfig
from roofline.cost import Remat

FORMAT = 4
"""Raised when what a stored calibration means changes; older files are then not found."""
MEMORY_SHARE = "0.95"
"""Of a GPU's memory for arrays, which jax takes at its start; unasked it takes 0.75. What a plan counts on, a
datasheet's 80 GB or 141 GB, is 0.93 to 0.94 of what the driver has; the rest is for its context and NCCL."""
_SHARE_NAMES = frozenset({"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"})
_VECTOR_FLAG = "--xla_cpu_prefer_vector_width"
_MALLOC_OPTIONS = (
    (-4, 0),  # M_MMAP_MAX: no block gets a mapping of its own
    (-1, -1),  # M_TRIM_THRESHOLD: the heap's end is never given back
    (-8, 1),  # M_ARENA_MAX: one heap, since only the first may grow without limit
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Shapes of one run that calibration measures at, per device."""

    slots: int = 128
    """Sequences decoded at once."""
    kv_len: int = 32
    """Cached tokens that a decode step reads."""
    chunk_steps: int = 8
    """Decode steps per program."""
    rows: int = 64
    """Packed rows of a micro-batch."""
    row_tokens: int = 64
    """Length of a packed row [tokens]."""
    chunk_tokens: int = 4096
    """Tokens whose logits exist at once."""
    dtype: str = "float32"
    """Type of the matrix products, of the cache and of the rollout's weights."""
    remat: Remat = "none"
    """What backward recomputes."""
    reference: bool = False
    """Whether log-probabilities under a reference are part of a step."""
    mesh: str = ""
    """Devices of both lanes by axis, where the trainer's own lanes are measured."""


def prefer_wide_vectors() -> None:
    """Let XLA compile for all 512 bits of a CPU's vectors, where it has them and nobody said otherwise.

    Its own choice is 256 bits (benchmarks/LOG.md). Call before jax starts; without effect on accelerators.
    """
    flags, info = os.environ.get("XLA_FLAGS", ""), Path("/proc/cpuinfo")
    if _VECTOR_FLAG not in flags and info.exists() and " avx512f " in info.read_text():
        os.environ["XLA_FLAGS"] = f"{flags} {_VECTOR_FLAG}=512"


def keep_freed_memory() -> None:
    """On a CPU with glibc, let the process keep freed memory instead of giving it back to the system.

    XLA allocates the temporaries of every call anew; as fresh pages they fault one by one, which takes a
    quarter of a training step (benchmarks/LOG.md). Call before jax starts: threads that have got a heap of
    their own by then keep it, and it holds no block above 64 MiB. Nothing is done where jax might find an
    accelerator.
    """
    if not _only_cpu(os.environ) or platform.libc_ver()[0] != "glibc":
        return
    glibc = ctypes.CDLL(None)
    for option, value in _MALLOC_OPTIONS:
        glibc.mallopt(option, value)


def take_gpu_memory(environment: MutableMapping[str, str]) -> None:
    """Let a process that starts jax with `environment` have MEMORY_SHARE of each GPU's memory, unless it was
    told how much."""
    if not _SHARE_NAMES & set(environment):
        environment["XLA_CLIENT_MEM_FRACTION"] = MEMORY_SHARE


def _only_cpu(environment: Mapping[str, str]) -> bool:
    """Whether jax will run on the CPU for certain, asked before it starts: JAX_PLATFORMS says so, or no
    plugin for an accelerator is installed."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return find_spec("jax_plugins") is None and find_spec("libtpu") is None


def give_back_freed_memory() -> None:
    """With glibc, give back what `keep_freed_memory` has kept so far: for once, as after compiling a program,
    which takes more memory than the programs of a small model."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def processor() -> str:
    """Name and number of the processors this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name} x {usable_cores()}"


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def busy_core_s() -> float | None:
    """Seconds that the cores of this process have worked since boot, for any program; a virtual
    machine's cores also for other machines. None where the system does not tell."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
        usable = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    rows = [line.split() for line in lines]
    ticks = [row[1:] for row in rows if row and row[0] in usable]
    working = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal; not idle, iowait
    total = sum(int(row[i]) for row in ticks for i in working if i < len(row))
    return total / os.sysconf("SC_CLK_TCK") if total else None


def own_s() -> float:
    """Seconds that cores have worked for this process and for those of its children that have ended."""
    return sum(os.times()[:4])


def host_memory_bytes() -> int:
    """Physical memory of the host [bytes]."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cache_folder(name: str) -> Path:
    """$XDG_CACHE_HOME/jaxrl/NAME, or ~/.cache/jaxrl/NAME."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jaxrl" / name


def cache_file(
    model: ModelConfig | None, workload: Workload, versions: Mapping[str, str], devices: int
) -> Path:
    """Where the calibration for this machine, software, model and workload is kept."""
    key = {
        "format": FORMAT,
        "host": platform.node(),
        "processor": processor(),
        "versions": dict(versions),
        "devices": devices,
        "model": None if model is None else dataclasses.asdict(model),
        "workload": dataclasses.asdict(workload),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder("calibration") / f"{digest}.json"
