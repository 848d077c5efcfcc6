"""Tiny checkpoints of every family, the same on every machine: no random generator, only integers.

Read by the tests, and by hf_reference.py, which computes transformers' logits for them.
"""

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

TOKENS = np.array([[(7 * i + 3) % 61 for i in range(24)]])
_SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": [2, 5],
    "pad_token_id": None, "torch_dtype": "float32",
}  # fmt: skip
_LLAMA = {**_SHAPE, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
_QWEN2 = {**_SHAPE, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "head_dim": 8}
CONFIGS = {
    "llama2": {**_LLAMA, "num_key_value_heads": 4, "head_dim": 8},
    "llama3": {
        **_LLAMA, "tie_word_embeddings": True, "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama_linear": {**_LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "mistral": {
        **_SHAPE, "model_type": "mistral", "architectures": ["MistralForCausalLM"],
        "sliding_window": None, "rope_theta": 1e6,
    },
    "qwen2": {**_QWEN2, "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen2_yarn": {
        **_QWEN2, "rope_scaling": {
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
        },
    },
    "qwen3": {
        **_SHAPE, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"],
        "tie_word_embeddings": True, "rope_theta": 1e6, "attention_bias": False,
    },
    "smollm3": {
        **_SHAPE, "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"],
        "num_hidden_layers": 4, "head_dim": 8, "tie_word_embeddings": True, "rope_theta": 5e6,
        "no_rope_layers": [1, 1, 1, 0],
    },
}  # fmt: skip


def tensors(config: dict) -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint, float32."""
    return {name: _values(name, shape) for name, shape in _shapes(config).items()}


def _shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Written from transformers' own state dicts, not from jaxrl's table."""
    d, f, h = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    sizes = {"q": config["num_attention_heads"] * h, "k": config["num_key_value_heads"] * h}
    sizes["v"] = sizes["k"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (d,), p + "post_attention_layernorm.weight": (d,)}
        for name, size in sizes.items():
            shapes[f"{p}self_attn.{name}_proj.weight"] = (size, d)
            if config["model_type"] == "qwen2":
                shapes[f"{p}self_attn.{name}_proj.bias"] = (size,)
        shapes[p + "self_attn.o_proj.weight"] = (d, sizes["q"])
        if config["model_type"] == "qwen3":
            shapes |= {f"{p}self_attn.{name}_norm.weight": (h,) for name in ("q", "k")}
        shapes |= {f"{p}mlp.{name}_proj.weight": (f, d) for name in ("gate", "up")}
        shapes[p + "mlp.down_proj.weight"] = (d, f)
    return shapes


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Norms near one, the rest of variance 1 / (size of the last dimension); splitmix64 of the index."""
    count = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 20)
    with np.errstate(over="ignore"):
        z = count * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    uniform = (z >> np.uint64(11)).astype(np.float64) / 2**52 - 1
    value = 1 + 0.2 * uniform if "norm" in name else uniform * np.sqrt(3 / shape[-1])
    return value.reshape(shape).astype(np.float32)


def write(folder: Path, config: dict) -> None:
    """The checkpoint as a Hugging Face folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors(config), folder / "model.safetensors", metadata={"format": "pt"})
