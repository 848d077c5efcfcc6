"""Architectures by name, for predictions without a checkpoint. Standard library only.

Numbers from the models' public config.json files, as collected in Lightning-AI/litgpt@26857050
litgpt/config.py, AI-Hypercomputer/maxtext@e591f30c hf_model_configs.py and mlc-ai/mlc-llm@79d603f0
model_preset.py (read November 2026); parameter counts checked against the published checkpoints.
Mixtures of experts: arXiv:2505.09388 table 2 (Qwen3), arXiv:2401.04088 table 1 (Mixtral) and the
config.json of the models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models.config import ModelConfig
from models.families import parse_config


@dataclass(frozen=True, kw_only=True, slots=True)
class ZooModel:
    """An architecture and what its shape leaves out."""

    config: ModelConfig
    norms_per_layer: int = 2
    """Gemma has four of the width: before and after attention and MLP."""

    @property
    def num_parameters(self) -> int:
        """All parameters of the language model; a tied head counts once, no vision tower."""
        more = (self.norms_per_layer - 2) * self.config.width * self.config.num_layers
        return self.config.num_parameters + more


def _model(
    family: str,
    num_layers: int,
    width: int,
    heads: tuple[int, int, int],
    ffw_size: int,
    vocab_size: int,
    *,
    tied: bool = True,
    theta: float = 1e6,
    eps: float = 1e-6,
    positions: int,
    experts: tuple[int, int] = (0, 0),
) -> ZooModel:
    """`heads`: query heads, kv heads, head size. `experts`: of a layer, and used by a token;
    `ffw_size` is that of one. Gemma: `family` gemma2 or gemma3, whose norms
    and activation only this module knows."""
    gemma = family.startswith("gemma")
    config = ModelConfig(
        family=family,
        vocab_size=vocab_size,
        width=width,
        num_layers=num_layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_size=heads[2],
        ffw_size=ffw_size,
        max_positions=positions,
        rope_theta=theta,
        norm_eps=eps,
        qk_norm=family in ("qwen3", "gemma3"),
        qkv_bias=family == "qwen2",
        tied_embeddings=tied,
        num_experts=experts[0],
        experts_per_token=experts[1],
    )
    return ZooModel(config=config, norms_per_layer=4 if gemma else 2)


_QWEN, _QWEN_LARGE, _LLAMA3, _SMOL2 = 151936, 152064, 128256, 49152
_GEMMA2, _GEMMA3 = 256000, 262144

ZOO: Mapping[str, ZooModel] = {
    "qwen3-0.6b": _model("qwen3", 28, 1024, (16, 8, 128), 3072, _QWEN, positions=40960),
    "qwen3-1.7b": _model("qwen3", 28, 2048, (16, 8, 128), 6144, _QWEN, positions=40960),
    "qwen3-4b": _model("qwen3", 36, 2560, (32, 8, 128), 9728, _QWEN, positions=40960),
    "qwen3-8b": _model(
        "qwen3", 36, 4096, (32, 8, 128), 12288, _QWEN, tied=False, positions=40960
    ),
    "qwen3-14b": _model(
        "qwen3", 40, 5120, (40, 8, 128), 17408, _QWEN, tied=False, positions=40960
    ),
    "qwen3-32b": _model(
        "qwen3", 64, 5120, (64, 8, 128), 25600, _QWEN, tied=False, positions=40960
    ),
    "qwen2.5-0.5b": _model("qwen2", 24, 896, (14, 2, 64), 4864, _QWEN, positions=32768),
    "qwen2.5-1.5b": _model("qwen2", 28, 1536, (12, 2, 128), 8960, _QWEN, positions=131072),
    "qwen2.5-3b": _model("qwen2", 36, 2048, (16, 2, 128), 11008, _QWEN, positions=32768),
    "qwen2.5-7b": _model(
        "qwen2", 28, 3584, (28, 4, 128), 18944, _QWEN_LARGE, tied=False, positions=131072
    ),
    "llama-3.2-1b": _model(
        "llama", 16, 2048, (32, 8, 64), 8192, _LLAMA3, theta=5e5, eps=1e-5, positions=131072
    ),
    "llama-3.2-3b": _model(
        "llama", 28, 3072, (24, 8, 128), 8192, _LLAMA3, theta=5e5, eps=1e-5, positions=131072
    ),
    "llama-3.1-8b": _model(
        "llama", 32, 4096, (32, 8, 128), 14336, _LLAMA3,
        tied=False, theta=5e5, eps=1e-5, positions=131072,
    ),
    "llama-3.1-70b": _model(
        "llama", 80, 8192, (64, 8, 128), 28672, _LLAMA3,
        tied=False, theta=5e5, eps=1e-5, positions=131072,
    ),
    "smollm3-3b": _model(
        "smollm3", 36, 2048, (16, 4, 128), 11008, _LLAMA3, theta=5e6, positions=65536
    ),
    "smollm2-135m": _model(
        "llama", 30, 576, (9, 3, 64), 1536, _SMOL2, theta=1e5, eps=1e-5, positions=8192
    ),
    "smollm2-360m": _model(
        "llama", 32, 960, (15, 5, 64), 2560, _SMOL2, theta=1e5, eps=1e-5, positions=8192
    ),
    "smollm2-1.7b": _model(
        "llama", 24, 2048, (32, 32, 64), 8192, _SMOL2, theta=1.3e5, eps=1e-5, positions=8192
    ),
    "gemma-2-2b": _model(
        "gemma2", 26, 2304, (8, 4, 256), 9216, _GEMMA2, theta=1e4, positions=8192
    ),
    "gemma-2-9b": _model(
        "gemma2", 42, 3584, (16, 8, 256), 14336, _GEMMA2, theta=1e4, positions=8192
    ),
    "gemma-2-27b": _model(
        "gemma2", 46, 4608, (32, 16, 128), 36864, _GEMMA2, theta=1e4, positions=8192
    ),
    "gemma-3-1b-it": _model("gemma3", 26, 1152, (4, 1, 256), 6912, _GEMMA3, positions=131072),
    "gemma-3-4b-it": _model("gemma3", 34, 2560, (8, 4, 256), 10240, _GEMMA3, positions=131072),
    "gemma-3-12b-it": _model("gemma3", 48, 3840, (16, 8, 256), 15360, _GEMMA3, positions=131072),
    "gemma-3-27b-it": _model(
        "gemma3", 62, 5376, (32, 16, 128), 21504, _GEMMA3, positions=131072
    ),
    "mistral-small-24b": _model(
        "mistral", 40, 5120, (32, 8, 128), 32768, 131072,
        tied=False, theta=1e9, eps=1e-5, positions=131072,
    ),
    "qwen3-30b-a3b": _model(
        "qwen3", 48, 2048, (32, 4, 128), 768, _QWEN,
        tied=False, positions=40960, experts=(128, 8),
    ),
    "qwen3-235b-a22b": _model(
        "qwen3", 94, 4096, (64, 4, 128), 1536, _QWEN,
        tied=False, positions=40960, experts=(128, 8),
    ),
    "mixtral-8x7b": _model(
        "mistral", 32, 4096, (32, 8, 128), 14336, 32000,
        tied=False, eps=1e-5, positions=32768, experts=(8, 2),
    ),
    "mixtral-8x22b": _model(
        "mistral", 56, 6144, (48, 8, 128), 16384, 32768,
        tied=False, eps=1e-5, positions=65536, experts=(8, 2),
    ),
}  # fmt: skip
"""Known models by lower-case name."""


def zoo_key(name: str) -> str:
    """The name in `ZOO` of a model as its hub calls it, if it is there: case, organisation and what further
    training adds to a name do not matter."""
    key = name.rpartition("/")[2].lower()
    return key if key in ZOO else key.removesuffix("-base").removesuffix("-instruct")


def find_model(name: str) -> ZooModel:
    """A model of `ZOO` by name (`zoo_key`), or the architecture of a Hugging Face config.json or of the folder
    that holds one.

    Raises:
        ValueError: neither a known name nor a readable configuration.
    """
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}); give a config.json") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds {type(content).__name__}, not one JSON object")
        return ZooModel(config=parse_config(content))
    key = zoo_key(name)
    if key not in ZOO:
        raise ValueError(
            f"no model {name!r}: give the path of a config.json or one of {', '.join(ZOO)}"
        )
    return ZOO[key]
