"""Logits of every family beside transformers': golden values, and transformers itself where it is installed."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from models.decoder import hidden_states
from models.head import head_logits
from models.hf import load_policy, save_policy

DATA = Path(__file__).resolve().parents[1] / "data"
PEERS = Path(__file__).resolve().parents[2] / ".venv-peers" / "bin" / "python"
F32_ATOL = 2e-5  # float32, other order of sums; logits have a standard deviation near 1
BF16_ATOL = 0.15  # both sides round to 8 bits after each operation, in another order
BF16_MEAN = 0.02  # mean deviation of the same

spec = importlib.util.spec_from_file_location("hf_cases", DATA / "hf_cases.py")
assert spec is not None
assert spec.loader is not None
hf_cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hf_cases)


@partial(jax.jit, static_argnames=("dtype",))
def _logits(policy, tokens, *, dtype):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = hidden_states(policy, tokens, positions, jnp.ones_like(tokens), dtype=dtype)
    return head_logits(policy, hidden, dtype=dtype)


def logits_of(policy, dtype):
    return np.asarray(_logits(policy, jnp.asarray(hf_cases.TOKENS, jnp.int32), dtype=dtype)[0])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(folder as transformers names things, the policy loaded from it) by case."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, config in hf_cases.CONFIGS.items():
        hf_cases.write(root / name, config)
    return {name: (root / name, load_policy(root / name)) for name in hf_cases.CONFIGS}


@pytest.fixture(scope="module")
def goldens():
    with np.load(DATA / "hf_goldens.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", hf_cases.CONFIGS)
def test_logits_equal_golden_values_of_transformers(name, checkpoints, goldens):
    assert np.std(goldens[name]) > 0.5
    got = logits_of(checkpoints[name][1], jnp.float32)
    np.testing.assert_allclose(got, goldens[name], atol=F32_ATOL, rtol=0)


@pytest.mark.parametrize(
    "name",
    [n if n == "qwen3" else pytest.param(n, marks=pytest.mark.slow) for n in hf_cases.CONFIGS],
)
def test_bfloat16_logits_stay_near_those_of_transformers(name, checkpoints, goldens):
    check_bfloat16(checkpoints[name][1], goldens[f"{name}/bfloat16"])


def check_bfloat16(policy, expected):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), policy)
    error = np.abs(logits_of(half, jnp.bfloat16) - expected)
    assert error.max() < BF16_ATOL
    assert error.mean() < BF16_MEAN


def test_golden_values_depend_on_the_rope_scaling(checkpoints, goldens):
    folder, policy = checkpoints["llama3"]
    plain = load_policy(folder, replace(policy.config, rope_scaling=None))
    assert np.abs(logits_of(plain, jnp.float32) - goldens["llama3"]).max() > 100 * F32_ATOL


@pytest.mark.parametrize("name", hf_cases.CONFIGS)
def test_saving_gives_back_the_very_tensors(name, checkpoints, tmp_path):
    folder, policy = checkpoints[name]
    save_policy(policy, tmp_path)
    saved, original = (load_file(path / "model.safetensors") for path in (tmp_path, folder))
    assert saved.keys() == original.keys()
    assert all(np.array_equal(saved[name], original[name]) for name in original)
    assert load_policy(tmp_path).config == policy.config


@pytest.fixture(scope="module")
def peer():
    """An interpreter that has torch and transformers."""
    if PEERS.exists():
        return str(PEERS)
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        return sys.executable
    pytest.skip("needs torch and transformers: `make peers` installs them into .venv-peers")


def test_transformers_loads_what_we_save_and_we_load_what_it_saves(peer, checkpoints, tmp_path):
    for name, (_, policy) in checkpoints.items():
        save_policy(policy, tmp_path / name, max_file_bytes=20_000)
    done = subprocess.run(
        [peer, str(DATA / "hf_reference.py"), str(tmp_path)], capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / "logits.npz") as file:
        theirs = dict(file)
    for name, (_, policy) in checkpoints.items():
        np.testing.assert_allclose(
            logits_of(policy, jnp.float32), theirs[name], atol=F32_ATOL, rtol=0, err_msg=name
        )
        back = load_policy(tmp_path / name / "theirs")
        assert back.config == policy.config, name
        assert jax.tree.all(jax.tree.map(np.array_equal, back, policy)), name
    check_bfloat16(checkpoints["qwen3"][1], theirs["qwen3/bfloat16"])
