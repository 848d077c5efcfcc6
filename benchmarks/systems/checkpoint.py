"""Writes the random checkpoint that all systems load: python -m benchmarks.systems.checkpoint SHAPE FOLDER.

Weights through jaxrl's Hugging Face export; beside them a word-level tokenizer, `w7` being token 7,
for the systems that take text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax

from benchmarks.workload import EOS, FIRST_WORD, PAD, SHAPES, Shape
from models.config import ModelConfig
from models.decoder import Decoder
from models.hf import save_policy

MAX_POSITIONS = 2048
ROPE_THETA = 1e6
"""Qwen3's own; google-tunix 0.1.7 computes Qwen3 with it whatever the configuration says."""


def model_config(shape: Shape) -> ModelConfig:
    """The architecture in jaxrl's words."""
    return ModelConfig(
        family="qwen3", vocab_size=shape.vocab_size, width=shape.width,
        num_layers=shape.num_layers, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_size, ffw_size=shape.ffw_size, max_positions=MAX_POSITIONS,
        rope_theta=ROPE_THETA, norm_eps=1e-6, qk_norm=True, tied_embeddings=False, eos_token_ids=(EOS,),
    )  # fmt: skip


def write_tokenizer(vocab_size: int, folder: Path) -> None:
    """A tokenizer in the format of the tokenizers library: words separated by spaces."""
    special = {"<pad>": PAD, "<eos>": EOS}
    words = {f"w{i}": i for i in range(FIRST_WORD - 1, vocab_size)}
    added = [
        {"id": i, "content": word, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for word, i in special.items()
    ]  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {**special, **words}, "unk_token": "<pad>"},
    }  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<eos>",
        "padding_side": "left", "model_max_length": MAX_POSITIONS,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def main() -> None:
    """Write SHAPE (a key of workload.SHAPES) to FOLDER."""
    shape, folder = SHAPES[sys.argv[1]], Path(sys.argv[2])
    config = model_config(shape)
    assert config.num_parameters == shape.parameters, (config.num_parameters, shape.parameters)
    save_policy(Decoder(config, jax.random.key(0)), folder)
    write_tokenizer(shape.vocab_size, folder)


if __name__ == "__main__":
    main()
