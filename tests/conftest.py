"""One process with eight host devices serves every test; strict promotion keeps dtypes and ranks honest."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_cpu_collective_call_warn_stuck_timeout_seconds=60"
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["PJRT_NPROC"] = (
    "16"  # jax 0.10 starves collectives with fewer threads than waiting programs
)

import tempfile
from pathlib import Path

import hypothesis
import jax
import pytest

# The same examples in every run: a change decides, not a draw. HYPOTHESIS_PROFILE=default draws anew.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Many tests build the same small programs anew: compile each of them once per session.
_PROGRAMS = tempfile.TemporaryDirectory(prefix="jaxrl-programs-")
jax.config.update("jax_compilation_cache_dir", _PROGRAMS.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Compilation is most of the suite's time, and LLVM's passes are half of compilation; what XLA does before
# them, sharding and fusion, stays. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests the fully optimised programs.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)

_SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data beside the checkout; tests that need it are skipped where it is absent."""
    if not _SHARED_DATA.is_dir():
        pytest.skip(f"needs the reference data folder {_SHARED_DATA}, which is not here")
    return _SHARED_DATA
