"""Memory that loading takes beyond the arrays it makes, measured in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from models.config import ModelConfig
from models.families import render_config
from models.hf.names import tensors_of
from models.hf.read import stored_tensors
from models.hf.save import write_json, write_weights

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ModelConfig(
    vocab_size=32768, width=512, num_layers=4, num_heads=8, num_kv_heads=4, head_size=64,
    ffw_size=4096, tied_embeddings=False,
)  # fmt: skip
MAX_FILE_BYTES = 40_000_000
ALLOWED_TENSORS = 1.2  # plus one file: what is promised
PROGRAM = """
import sys
from pathlib import Path
import jax
from models.hf import load_policy

def memory(key):
    text = Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) * 1024

jax.block_until_ready(jax.numpy.zeros(8))
before = memory("VmRSS")
policy = jax.block_until_ready(load_policy(sys.argv[1]))
arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(policy))
print(memory("VmHWM") - before - arrays, arrays, float(policy.head[-1, -1]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_holds_little_more_than_the_arrays_it_makes(tmp_path):
    """Bound: 1.2 times the largest tensor (as stored, half of what it becomes) and one file."""

    def value(tensor):
        numbers = np.arange(np.prod(tensor.shape), dtype=np.uint32) % 251
        return (numbers / np.float32(4096)).astype(jnp.bfloat16).reshape(tensor.shape)

    write_weights(tensors_of(CONFIG), value, tmp_path, jnp.dtype("bfloat16"), MAX_FILE_BYTES)
    write_json(tmp_path / "config.json", render_config(CONFIG, "bfloat16"))
    files = {stored.file for stored in stored_tensors(tmp_path).values()}
    assert len(files) > 3
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True,
        timeout=120, check=True, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""},
    )  # fmt: skip
    beyond, arrays, last = done.stdout.split()
    largest = 2 * max(int(np.prod(tensor.shape)) for tensor in tensors_of(CONFIG))
    assert int(arrays) == 4 * CONFIG.num_parameters
    assert float(last) == (CONFIG.vocab_size * CONFIG.width - 1) % 251 / 4096
    assert int(beyond) <= ALLOWED_TENSORS * largest + max(file.stat().st_size for file in files)
