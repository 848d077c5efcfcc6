"""Text to token ids and back.

characters     one token per character, for models from scratch
pieces         sentencepiece models
hugging_face   tokenizer.json, the form in which nearly all checkpoints ship theirs
stream         text of a completion that is still growing
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxrl.errors import UserError
from jaxrl.tokenizer.base import Tokenizer
from jaxrl.tokenizer.characters import CharTokenizer
from jaxrl.tokenizer.hugging_face import TOKENIZER_FILE, HuggingFaceTokenizer
from jaxrl.tokenizer.pieces import SentencePieceTokenizer
from jaxrl.tokenizer.stream import StreamDecoder

__all__ = [
    "CharTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "load_tokenizer",
]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the checkpoint in `folder`: tokenizer.json, else tokenizer.model, else its only
    tok*.model.

    Raises: UserError if there is none, more than one, or only a kind that is not supported.
    """
    if (folder / TOKENIZER_FILE).exists():
        return HuggingFaceTokenizer(folder)
    files: Sequence[Path] = sorted(folder.glob("tok*.model"))
    if len(files) > 1:
        files = [file for file in files if file.name == "tokenizer.model"] or files
    if len(files) == 1:
        return SentencePieceTokenizer(files[0])
    supported = f"supported are {TOKENIZER_FILE}, tokenizer.model and one tok*.model"
    if files:
        names = ", ".join(file.name for file in files)
        raise UserError(
            f"{folder} holds several tokenizers ({names}); {supported}; remove the others"
        )
    if (folder / "vocab.json").exists():
        raise UserError(
            f"{folder} has its tokenizer only as vocab.json and merges.txt; {supported}; make the first "
            "with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    raise UserError(f"{folder} has no tokenizer; {supported}; copy it there from the checkpoint")
