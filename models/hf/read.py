"""Finds a checkpoint, reads its configuration and the headers of its files; no weights yet."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
from safetensors import SafetensorError, safe_open

from models.config import ModelConfig
from models.families import parse_config
from models.hf.names import HFTensor, tensors_of

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
COMPANIONS = (
    GENERATION_FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "tok*.model",
)  # fmt: skip
"""Files that belong to a model beside its configuration and weights: tokenizer, templates, stop tokens."""
SUPPORTED_DTYPES = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes per value of the dtypes that are read, by their name in safetensors."""
_MAKE_IT = " if it is to be a random one make it first: `python -m models.hf new --out FOLDER ...`"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor of a checkpoint is, and in which form."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: F32, BF16, ..."""


def checkpoint_folder(name: Path | str) -> Path:
    """The local folder of a checkpoint: `name` itself, or what a hub id stands for.

    A hub id (owner/name) is fetched from huggingface.co, or taken from the local cache (HF_HOME).
    Raises: ValueError if there is no such folder and it cannot be fetched, or it is a run's.
    """
    folder = Path(name)
    if folder.is_dir():
        if (folder / "checkpoints").is_dir() and not (folder / CONFIG_FILE).exists():
            raise ValueError(
                f"{name} is the folder of a run; write one of its checkpoints as a folder of its own first: "
                f"`python -m models.hf export --run {name} --step STEP --out FOLDER`"
            )
        return folder
    if not _HUB_ID.fullmatch(str(name)):
        raise ValueError(
            f"{name} is no folder and no hub id; give a folder that holds {CONFIG_FILE} and "
            "safetensors, or an id like Qwen/Qwen3-0.6B"
        )
    wanted = [CONFIG_FILE, "*.safetensors", INDEX_FILE, *COMPANIONS]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                str(name), allow_patterns=wanted, ignore_patterns=["*/*"]
            )
        )
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{name} is no folder here and huggingface.co has no such checkpoint for you "
            f"({_first_line(error)}); check the name, log in with `hf auth login`, or{_MAKE_IT}"
        ) from error
    except OSError as error:
        raise ValueError(
            f"{name} is no folder here, it is not in the local cache, and huggingface.co cannot be "
            f"reached ({_first_line(error)}); download it where there is a network "
            f"(`hf download {name} --local-dir FOLDER`) and give that folder, or{_MAKE_IT}"
        ) from error


def read_config(folder: Path | str) -> ModelConfig:
    """The architecture in folder/config.json.

    Raises: ValueError for a missing or malformed file, or an architecture this code does not
    compute.
    """
    return parse_config(read_json(Path(folder) / CONFIG_FILE))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: ValueError naming the file if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; give the folder of a checkpoint") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object; fetch it again")
    return content


def companions(folder: Path) -> list[Path]:
    """The folder's files that belong to the model beside configuration and weights."""
    return sorted(path for pattern in COMPANIONS for path in folder.glob(pattern))


def checked_tensors(folder: Path, config: ModelConfig) -> list[tuple[HFTensor, Stored]]:
    """Every tensor the architecture needs, with where it is stored. Reads headers only.

    Raises: ValueError naming the first tensor that is missing, unexpected, or of another shape or
    dtype, or the file that cannot be read.
    """
    stored = stored_tensors(folder)
    tensors = tensors_of(config)
    _check_names(folder, config, {tensor.name for tensor in tensors}, set(stored))
    for tensor in tensors:
        found = stored[tensor.name]
        if found.shape != tensor.shape:
            raise ValueError(
                f"tensor {tensor.name} in {found.file} has shape {list(found.shape)}, "
                f"but config.json implies {list(tensor.shape)}"
            )
        if found.dtype not in SUPPORTED_DTYPES:
            raise ValueError(
                f"tensor {tensor.name} in {found.file} has dtype {found.dtype}; supported are "
                f"{sorted(SUPPORTED_DTYPES)}: use a checkpoint that is not quantised"
            )
    return [(tensor, stored[tensor.name]) for tensor in tensors]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder by name, from the headers of its files.

    Raises: ValueError naming a file that is absent or cannot be read, or a tensor that the index
    promises and its file does not hold.
    """
    if not (folder / INDEX_FILE).exists():
        if not (folder / SINGLE_FILE).exists():
            raise ValueError(
                f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; "
                "give a folder with safetensors weights"
            )
        return _header(folder / SINGLE_FILE)
    listed = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise ValueError(f"{folder / INDEX_FILE} has no weight_map of file names; fetch it again")
    headers = {file: _header(folder / file) for file in sorted(set(listed.values()))}
    for name, file in listed.items():
        if name not in headers[file]:
            raise ValueError(f"tensor {name} is missing from {folder / file}; fetch it again")
    return {name: headers[file][name] for name, file in listed.items()}


def _header(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Stored(path, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def read_tensor(path: Path, name: str, rows: slice = slice(None)) -> np.ndarray:
    """Rows of a tensor, in the file's dtype and layout.

    The file is mapped only for this long: mapped pages count as this process's memory.
    """
    try:
        with safe_open(path, framework="np") as file:
            return file.get_slice(name)[rows]
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    """The error for a weight file that is absent or damaged."""
    return ValueError(f"{path} cannot be read as safetensors ({error}); fetch it again")


def _check_names(
    folder: Path, config: ModelConfig, expected: set[str], found: Iterable[str]
) -> None:
    """Refuse missing and unexpected tensors. A head stored beside tied embeddings is the same
    matrix again, and old checkpoints carry their rotary frequencies."""
    harmless = {"lm_head.weight"} if config.tied_embeddings else set()
    found = {name for name in found if not name.endswith("rotary_emb.inv_freq")}
    for problem, names in (
        ("is missing from the checkpoint", expected - found),
        ("is in the checkpoint but not in the model", found - expected - harmless),
    ):
        if names:
            first = min(names)
            raise ValueError(
                f"tensor {first} {problem} {folder} ({len(names)} such tensors); "
                f"check that config.json (family {config.family}, {config.num_layers} layers) "
                "fits the weights"
            )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
