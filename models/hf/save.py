"""A policy as a Hugging Face folder, one file of weights at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from models.config import ModelConfig
from models.decoder import Decoder
from models.families import render_config
from models.hf.names import HFTensor, tensors_of
from models.hf.read import CONFIG_FILE, GENERATION_FILE, INDEX_FILE, SINGLE_FILE
from models.sharding import parameters_by_name

MAX_FILE_BYTES = 5 * 10**9
"""Most bytes of weights in one file; what the host holds while saving."""


def save_policy(
    policy: Decoder,
    folder: Path | str,
    *,
    dtype: Any = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the policy as a Hugging Face folder: config.json, generation_config.json and safetensors
    files in `dtype` (None: the policy's own).

    The host holds one stacked parameter and one file at a time.
    Raises: ValueError when the family has no such architecture.
    """
    arrays = parameters_by_name(policy)
    dtype = policy.embedding.dtype if dtype is None else dtype
    write_checkpoint(
        policy.config, lambda name: np.asarray(arrays[name]), folder, dtype, max_file_bytes
    )


def write_checkpoint(
    config: ModelConfig,
    parameter: Callable[[str], np.ndarray],
    folder: Path | str,
    dtype: Any,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """`save_policy` of the weights that `parameter` gives by name; each is asked for once per file."""
    folder, dtype = Path(folder), jnp.dtype(dtype)
    content = render_config(config, dtype.name)
    kept: dict[str, np.ndarray] = {}

    def value(tensor: HFTensor) -> np.ndarray:
        if tensor.parameter not in kept:
            kept.clear()
            kept[tensor.parameter] = parameter(tensor.parameter)
        whole = kept[tensor.parameter]
        return tensor.write(whole if tensor.layer is None else whole[tensor.layer])

    folder.mkdir(parents=True, exist_ok=True)
    write_weights(tensors_of(config), value, folder, dtype, max_file_bytes)
    write_json(folder / CONFIG_FILE, content)
    write_json(folder / GENERATION_FILE, generation_config(config))


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """What transformers, vLLM and `jaxrl.tokenizer` take start and stop tokens from."""
    content = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids)}
    return {key: ids for key, ids in content.items() if ids not in (None, [])}


def write_weights(
    tensors: list[HFTensor],
    value: Callable[[HFTensor], np.ndarray],
    folder: Path,
    dtype: np.dtype,
    max_file_bytes: int,
) -> None:
    """Safetensors files of at most max_file_bytes (or one tensor), with an index if there are several.

    Tensors of one parameter follow one another, so that `value` needs few parameters at a time.
    """
    order: dict[str, list[HFTensor]] = {}
    for tensor in tensors:
        order.setdefault(tensor.parameter, []).append(tensor)
    files: list[list[HFTensor]] = [[]]
    room = max_file_bytes
    for tensor in (tensor for group in order.values() for tensor in group):
        size = int(np.prod(tensor.shape)) * dtype.itemsize
        if files[-1] and size > room:
            files.append([])
            room = max_file_bytes
        files[-1].append(tensor)
        room -= size
    names = [SINGLE_FILE]
    if len(files) > 1:
        names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    for name, group in zip(names, files, strict=True):
        out = {tensor.name: np.ascontiguousarray(value(tensor), dtype=dtype) for tensor in group}
        save_tensors(out, folder / name)
    if len(files) > 1:
        size = sum(int(np.prod(tensor.shape)) for tensor in tensors) * dtype.itemsize
        listed = {t.name: name for name, group in zip(names, files, strict=True) for t in group}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": listed})


def save_tensors(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """One safetensors file with the permissions of any other new file; the library's are the owner's alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file({**tensors}, path, metadata={"format": "pt"})
    path.chmod(mode)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """An indented JSON file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
