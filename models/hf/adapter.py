"""A trained adapter in peft's form: adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [rank, in]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight [out, rank]

transformers (PeftModel.from_pretrained) and vLLM (--enable-lora) load it beside the base it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.config import LORA_TARGETS, Lora, ModelConfig
from models.hf.names import HFTensor, tensors_of
from models.hf.read import read_json
from models.hf.save import save_tensors, write_json
from models.lora import lora_of

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"


def write_adapter_config(config: ModelConfig, folder: Path, base: str | None) -> None:
    """folder/adapter_config.json; base: what PeftModel should find the frozen weights under."""
    lora = lora_of(config)
    ours = {own: theirs for theirs, own in LORA_TARGETS.items()}
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(ours[name] for name in lora.targets),
    }
    write_json(folder / ADAPTER_CONFIG, content)


def read_lora(folder: Path) -> Lora | None:
    """The adapter that folder/adapter_config.json describes; None without that file.

    Raises: ValueError for a malformed file, or an adapter that this code does not compute.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    content = read_json(folder / ADAPTER_CONFIG)
    try:
        names = ",".join(content["target_modules"])
        return Lora.of(content["r"], content["lora_alpha"], names)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} lacks r, lora_alpha or target_modules; write it again"
        ) from error


def save_adapter(config: ModelConfig, adapter: Mapping[str, Any], folder: Path) -> None:
    """folder/adapter_model.safetensors, in float32.

    adapter: arrays of `models.lora.adapter_table`; the host holds all of them.
    """
    out: dict[str, np.ndarray] = {}
    for tensor in tensors_of(config):
        if f"{tensor.parameter}_a" in adapter and tensor.transposed:
            out |= _tensors(tensor, config, adapter)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(out, folder / ADAPTER_FILE)


def _tensors(
    tensor: HFTensor, config: ModelConfig, adapter: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    rank = lora_of(config).rank
    a, b = (
        np.asarray(adapter[f"{tensor.parameter}_{part}"][tensor.layer], np.float32) for part in "ab"
    )
    name = f"base_model.model.{tensor.name.removesuffix('.weight')}"
    return {
        f"{name}.lora_A.weight": np.ascontiguousarray(a.reshape(-1, rank).T),
        f"{name}.lora_B.weight": np.ascontiguousarray(b.reshape(rank, -1).T),
    }
