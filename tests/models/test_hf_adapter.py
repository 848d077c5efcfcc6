"""Exported adapters and merged weights mean what the trained policy computed, here and in peft."""

import dataclasses
import importlib.util
import json
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from models.config import Lora
from models.decoder import Decoder, hidden_states
from models.head import head_logits
from models.hf import describe_model, described_lora, export_policy, load_policy
from models.hf.adapter import read_lora, save_adapter, write_adapter_config
from models.lora import AdaptedDecoder, adapter_table

DATA = Path(__file__).resolve().parents[1] / "data"
PEERS = Path(__file__).resolve().parents[2] / ".venv-peers" / "bin" / "python"
F32_ATOL = 1e-4  # float32 sums in another order, as for whole checkpoints
SCRIPT = """
import sys, numpy as np, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager")
model = PeftModel.from_pretrained(base, sys.argv[2])
with torch.no_grad():
    logits = model.eval()(torch.tensor(np.load(sys.argv[3]))).logits
np.save(sys.argv[4], logits.numpy())
"""


def _module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hf_cases = _module(DATA / "hf_cases.py")


def make_policy(folder: Path, name: str, targets: str = "all-linear") -> AdaptedDecoder:
    """A checkpoint of `name`'s family under an adapter that changes it."""
    hf_cases.write(folder, hf_cases.CONFIGS[name])
    config = dataclasses.replace(load_policy(folder).config, lora=Lora.of(3, 6.0, targets))
    table = adapter_table(config)
    keys = jax.random.split(jax.random.key(0), len(table))
    adapter = {
        n: 0.1 * jax.random.normal(k, p.shape)
        for (n, p), k in zip(table.items(), keys, strict=True)
    }
    return AdaptedDecoder(base=load_policy(folder, config), adapter=adapter)


def logits(policy: Decoder | AdaptedDecoder) -> np.ndarray:
    tokens = jnp.array(hf_cases.TOKENS)
    positions = jnp.arange(tokens.shape[1])[None]
    hidden = hidden_states(
        policy,
        tokens,
        positions,
        jnp.ones_like(tokens),
        dtype=jnp.float32,
    )
    return np.asarray(head_logits(policy, hidden, dtype=jnp.float32))


def test_the_merged_export_computes_what_the_adapted_policy_does(tmp_path: Path):
    policy = make_policy(tmp_path / "base", "qwen2")
    describe_model(policy.config, tmp_path / "run", tmp_path / "base", "the/base")
    assert described_lora(tmp_path / "run") == policy.config.lora
    export_policy(policy, tmp_path / "out", run=tmp_path / "run", dtype="float32")
    got, plain = logits(load_policy(tmp_path / "out")), logits(policy.base)
    expected = logits(policy)
    assert np.abs(expected - plain).max() > 100 * F32_ATOL
    np.testing.assert_allclose(got, expected, atol=F32_ATOL, rtol=0)


def test_an_adapters_files_have_pefts_names_shapes_and_settings(tmp_path: Path):
    policy = make_policy(tmp_path / "base", "qwen2", "q_proj,o_proj")
    write_adapter_config(policy.config, tmp_path, "the/base")
    save_adapter(policy.config, policy.adapter, tmp_path)
    assert read_lora(tmp_path) == policy.config.lora
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (content["r"], content["lora_alpha"]) == (3, 6.0)
    assert content["target_modules"] == ["o_proj", "q_proj"]
    found = load_file(tmp_path / "adapter_model.safetensors")
    start = "base_model.model.model.layers.1.self_attn."
    assert len(found) == 2 * 2 * 2
    assert found[start + "q_proj.lora_A.weight"].shape == (3, 32)
    a, b = (found[f"{start}o_proj.lora_{x}.weight"] for x in "AB")
    ours = policy.adapter["attention_out_a"][1].reshape(-1, 3), policy.adapter["attention_out_b"][1]
    np.testing.assert_allclose(b @ a, np.asarray(ours[0] @ ours[1]).T, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3"])
def test_peft_computes_the_same_with_the_exported_adapter(name: str, tmp_path: Path):
    if not PEERS.exists() or not list(PEERS.parents[1].glob("lib/python*/site-packages/peft")):
        pytest.skip("needs peft: `make peers`, then .venv-peers/bin/pip install peft")
    policy = make_policy(tmp_path / "base", name)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter_config(policy.config, adapter, str(tmp_path / "base"))
    save_adapter(policy.config, policy.adapter, adapter)
    np.save(tmp_path / "tokens.npy", hf_cases.TOKENS)
    words = [tmp_path / "base", adapter, tmp_path / "tokens.npy", tmp_path / "logits.npy"]
    done = subprocess.run(
        [str(PEERS), "-c", SCRIPT, *map(str, words)], capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = np.load(tmp_path / "logits.npy")
    ours = logits(policy)
    assert np.abs(ours - logits(policy.base)).max() > 100 * F32_ATOL
    np.testing.assert_allclose(ours, theirs, atol=F32_ATOL, rtol=0)
