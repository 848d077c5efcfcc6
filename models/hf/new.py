"""A checkpoint with random weights around a given tokenizer: to try things out, or to train from scratch."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import tokenizers

from models.config import ModelConfig
from models.families import FAMILIES
from models.hf.read import companions, read_json
from models.hf.save import save_policy, write_json
from models.sharding import init_sharded, make_mesh

_TOKENIZER, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"


def new_checkpoint(
    tokenizer: Path,
    out: Path,
    *,
    family: str,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    ffw: int,
    positions: int,
    eos: str | None = None,
    chat_template: Path | None = None,
    seed: int,
) -> ModelConfig:
    """Write a checkpoint with float32 weights drawn from `seed` to the new folder `out`.

    tokenizer: folder with tokenizer.json and what belongs to it, or a tokenizer.json, also gzipped; it
    decides V. eos: token that ends a completion; None: the one in the folder's tokenizer_config.json.
    chat_template: jinja file to go along. The head is the transposed embedding.
    Raises: ValueError if a file cannot be used, no stop token is known, the shape is none of a
    decoder, or `out` exists and is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; give a new folder")
    if family not in FAMILIES:
        raise ValueError(f"family {family} is not supported; supported are {sorted(FAMILIES)}")
    source = tokenizer / _TOKENIZER if tokenizer.is_dir() else tokenizer
    content, vocabulary = _read_tokenizer(source)
    settings = read_json(tokenizer / _SETTINGS) if (tokenizer / _SETTINGS).is_file() else {}
    eos = _stop_token(settings) if eos is None else eos
    stop = vocabulary.get(eos or "")
    if stop is None:
        raise ValueError(f"{source} has no stop token {eos!r}; name one of its tokens with --eos")
    config = ModelConfig(
        family=family, vocab_size=1 + max(vocabulary.values()), width=width, num_layers=layers,
        num_heads=heads, num_kv_heads=kv_heads, head_size=head_size, ffw_size=ffw,
        max_positions=positions, qk_norm=FAMILIES[family].qk_norm,
        qkv_bias=FAMILIES[family].qkv_bias, tied_embeddings=True, eos_token_ids=(stop,),
    )  # fmt: skip
    policy = init_sharded(config, jax.random.key(seed), make_mesh(jax.devices()[:1]), jnp.float32)
    out.mkdir(parents=True, exist_ok=True)
    for path in companions(tokenizer) if tokenizer.is_dir() else ():
        shutil.copyfile(path, out / path.name)
    (out / _TOKENIZER).write_bytes(content)
    fallback = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(out / _SETTINGS, {**fallback, **settings, "eos_token": eos})
    if chat_template is not None:
        shutil.copyfile(chat_template, out / _TEMPLATE)
    save_policy(policy, out)
    return config


def _read_tokenizer(path: Path) -> tuple[bytes, dict[str, int]]:
    """A tokenizer.json, unpacked, and its ids by token."""
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        vocabulary = tokenizers.Tokenizer.from_buffer(content).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} cannot be read as a tokenizer ({error})") from error
    return content, vocabulary


def _stop_token(settings: dict) -> str | None:
    token = settings.get("eos_token")
    return token.get("content") if isinstance(token, dict) else token
