"""Hugging Face checkpoints in and out: `config.json` beside safetensors, read tensor by tensor.

Letters: L layers, D width, N query heads, K kv heads, G = N / K, H head size, F ffw, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.config import ModelConfig
from models.decoder import Decoder
from models.families import parse_config, render_config
from models.parameters import outer_table, stacked_layer_table
from models.sharding import map_parameters

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class HFTensor:
    """One tensor of a checkpoint and where it lives in ours."""

    name: str
    """Hugging Face name; `{i}` stands for the layer."""
    shape: tuple[int, ...]
    """Shape in the checkpoint."""
    parameter: str
    """Our parameter (one layer of it, if it is stacked)."""
    read: Callable[[np.ndarray], np.ndarray] = lambda x: x
    """Checkpoint layout -> ours."""
    write: Callable[[np.ndarray], np.ndarray] = lambda x: x
    """Ours -> checkpoint layout."""


def tensor_table(config: ModelConfig) -> list[HFTensor]:
    """Every tensor of a checkpoint of this architecture. All supported families use these names."""
    d, k, h, f = config.width, config.num_kv_heads, config.head_size, config.ffw_size
    g = config.num_heads // k
    table = [
        HFTensor("model.embed_tokens.weight", (config.vocab_size, d), "embedding"),
        HFTensor("model.norm.weight", (d,), "final_norm"),
    ]
    if not config.tied_embeddings:
        table.append(HFTensor("lm_head.weight", (config.vocab_size, d), "head"))
    layer = "model.layers.{i}."
    table += [
        HFTensor(layer + "input_layernorm.weight", (d,), "attention_norm"),
        HFTensor(layer + "post_attention_layernorm.weight", (d,), "mlp_norm"),
        HFTensor(
            layer + "self_attn.o_proj.weight",
            (d, k * g * h),
            "attention_out",
            read=lambda w: w.T.reshape(k, g, h, d),
            write=lambda w: w.reshape(k * g * h, d).T,
        ),
        HFTensor(
            layer + "mlp.down_proj.weight", (d, f), "down", read=np.transpose, write=np.transpose
        ),
    ]
    for name in ("gate", "up") if config.gated_mlp else ("up",):
        table.append(
            HFTensor(f"{layer}mlp.{name}_proj.weight", (f, d), name, np.transpose, np.transpose)
        )
    for name, heads in (("q", (k, g, h)), ("k", (k, h)), ("v", (k, h))):
        table.append(_projection(f"{layer}self_attn.{name}_proj.weight", name, heads, d))
        if config.qkv_bias:
            table.append(_bias(f"{layer}self_attn.{name}_proj.bias", f"{name}_bias", heads))
    if config.qk_norm:
        table += [
            HFTensor(layer + "self_attn.q_norm.weight", (h,), "q_norm"),
            HFTensor(layer + "self_attn.k_norm.weight", (h,), "k_norm"),
        ]
    return table


def _projection(name: str, parameter: str, heads: tuple[int, ...], width: int) -> HFTensor:
    """A q, k or v projection: [heads, D] there, [D, *heads] here."""
    size = math.prod(heads)
    return HFTensor(
        name,
        (size, width),
        parameter,
        read=lambda w: w.T.reshape(width, *heads),
        write=lambda w: w.reshape(width, size).T,
    )


def _bias(name: str, parameter: str, heads: tuple[int, ...]) -> HFTensor:
    """A q, k or v bias: flat there, by head here."""
    return HFTensor(
        name,
        (math.prod(heads),),
        parameter,
        read=lambda b: b.reshape(heads),
        write=lambda b: b.reshape(-1),
    )


def _expand(config: ModelConfig) -> Iterator[tuple[str, HFTensor, Any]]:
    """(full name, tensor, index into our stacked parameter) of every tensor of the checkpoint."""
    for tensor in tensor_table(config):
        if "{i}" not in tensor.name:
            yield tensor.name, tensor, ...
            continue
        for i in range(config.num_layers):
            yield tensor.name.format(i=i), tensor, i


def read_config(folder: Path | str) -> ModelConfig:
    """The architecture in folder/config.json.

    Raises: ValueError for a missing or malformed file, or an architecture this code does not
    compute.
    """
    return parse_config(_read_json(Path(folder) / "config.json"))


def load_policy(
    folder: Path | str,
    config: ModelConfig | None = None,
    *,
    dtype: Any = jnp.float32,
    shardings: Decoder | None = None,
) -> Decoder:
    """The policy in a checkpoint folder, in `dtype`, placed by `shardings` (a Decoder of
    NamedShardings).

    The host holds one stacked parameter at a time.
    Raises: ValueError naming the first tensor that is missing, unexpected or of the wrong shape, or
    the file that cannot be read.
    """
    folder = Path(folder)
    config = read_config(folder) if config is None else config
    files = _files_of_tensors(folder)
    tensors = list(_expand(config))
    _check_names(config, {name for name, _, _ in tensors}, files)
    table = outer_table(config) | stacked_layer_table(config)
    placement = {} if shardings is None else _by_name(shardings)

    def load(name: str, _: Any) -> jax.Array:
        host = np.empty(table[name].shape, jnp.dtype(dtype))
        for full, tensor, index in tensors:
            if tensor.parameter == name:
                host[index] = tensor.read(_read_tensor(files[full], full, tensor.shape))
        return jax.device_put(host, placement.get(name))

    return map_parameters(load, config)


def save_policy(policy: Decoder, folder: Path | str) -> None:
    """Write the policy as a Hugging Face folder: config.json and one safetensors file in the
    policy's dtype.

    Raises: ValueError when the family has no such architecture.
    """
    folder, config = Path(folder), policy.config
    content = render_config(config, str(policy.embedding.dtype))
    arrays = {name: np.asarray(value) for name, value in _by_name(policy).items()}
    out = {
        name: np.ascontiguousarray(tensor.write(arrays[tensor.parameter][index]))
        for name, tensor, index in _expand(config)
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(out, folder / SINGLE_FILE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def _by_name(tree: Decoder) -> dict[str, Any]:
    """Leaves by parameter name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path[-1:], simple=True): leaf for path, leaf in leaves}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; give the folder of a checkpoint") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object; fetch it again")
    return content


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor, from the index if there is one, else from the single file."""
    if (folder / INDEX_FILE).exists():
        listed = _read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(listed, dict):
            raise ValueError(f"{folder / INDEX_FILE} has no weight_map; fetch it again")
        return {name: folder / file for name, file in listed.items()}
    path = folder / SINGLE_FILE
    if not path.exists():
        raise ValueError(
            f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; "
            "give a folder with safetensors weights"
        )
    try:
        with safe_open(path, framework="np") as file:
            return dict.fromkeys(file.keys(), path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read as safetensors ({error}); fetch it again")


def _check_names(config: ModelConfig, expected: set[str], files: dict[str, Path]) -> None:
    """Refuse missing and unexpected tensors. A head stored beside tied embeddings is the same
    matrix again."""
    harmless = {"lm_head.weight"} if config.tied_embeddings else set()
    found = {name for name in files if not name.endswith("rotary_emb.inv_freq")}
    for problem, names in (
        ("is missing from the checkpoint", expected - found),
        ("is in the checkpoint but not in the model", found - expected - harmless),
    ):
        if names:
            first = min(names)
            raise ValueError(
                f"tensor {first} {problem} ({len(names)} such tensors); "
                f"check that config.json (family {config.family}, {config.num_layers} layers) "
                "fits the weights"
            )


def _read_tensor(path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    try:
        with safe_open(path, framework="np") as file:
            tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        if path.exists() and "does not contain tensor" in str(error):
            raise ValueError(f"tensor {name} is missing from {path}; fetch it again") from error
        raise _unreadable(path, error) from error
    if tensor.shape != shape:
        raise ValueError(
            f"tensor {name} in {path} has shape {list(tensor.shape)}, "
            f"but config.json implies {list(shape)}"
        )
    return tensor
