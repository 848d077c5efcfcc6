"""A checkpoint with random weights around a given tokenizer: to try things out, or to train from scratch."""

from __future__ import annotations

import gzip
import shutil
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import tokenizers

from models.config import ModelConfig
from models.families import FAMILIES
from models.hf.read import companions, read_json
from models.hf.save import write_checkpoint, write_json
from models.parameters import outer_table, stacked_layer_table

_TOKENIZER, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, as Qwen writes it, without modes."""
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def train_tokenizer(text: Path, folder: Path, size: int) -> None:
    """Write a byte-level BPE of at most `size` tokens, learnt from a file, and ChatML to `folder`.

    text: any text, JSON lines too, also gzipped. Stop token: <|im_end|>.
    Raises: ValueError for a file that is no text, or a size below that of the bytes.
    """
    least = len(_SPECIAL) + 256
    if size < least:
        raise ValueError(f"a tokenizer of {size} tokens cannot hold all bytes; at least {least}")
    try:
        opened = gzip.open if text.suffix == ".gz" else open
        with opened(text, "rt", encoding="utf-8") as file:
            lines = file.read().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is no UTF-8 text ({error.reason}); give another file") from error
    if not any(line.strip() for line in lines):
        raise ValueError(f"{text} holds no text to learn tokens from; give another file")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    bpe.decoder = tokenizers.decoders.ByteLevel()  # type: ignore
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(_SPECIAL), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(lines, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / _TOKENIZER))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _SPECIAL[-1]}
    write_json(folder / _SETTINGS, settings)
    (folder / _TEMPLATE).write_text(CHAT_TEMPLATE)


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
    decides V. family: one of FAMILIES; the head is the transposed embedding. eos: token that ends a
    completion; None: the one in the folder's tokenizer_config.json. chat_template: a jinja file.
    Raises: ValueError if a file cannot be used, no stop token is known, the shape is none of a
    decoder, or `out` exists and is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; give a new folder")
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
    out.mkdir(parents=True, exist_ok=True)
    for path in companions(tokenizer) if tokenizer.is_dir() else ():
        shutil.copyfile(path, out / path.name)
    (out / _TOKENIZER).write_bytes(content)
    fallback = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(out / _SETTINGS, {**fallback, **settings, "eos_token": eos})
    if chat_template is not None:
        shutil.copyfile(chat_template, out / _TEMPLATE)
    write_checkpoint(config, partial(_draw, config, seed), out, np.float32)
    return config


def _draw(config: ModelConfig, seed: int, name: str) -> np.ndarray:
    """The first value of a parameter; numpy's streams stay the same across versions and machines."""
    parameter = (outer_table(config) | stacked_layer_table(config))[name]
    if parameter.stddev is None:
        return np.full(parameter.shape, parameter.fill, np.float32)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return parameter.stddev * rng.standard_normal(parameter.shape, np.float32)


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
