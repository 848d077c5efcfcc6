"""Sentencepiece models, as llama2.c and older Llama checkpoints ship them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from jaxrl.errors import UserError


class SentencePieceTokenizer:
    """The tokenizer of a checkpoint, from its sentencepiece model.

    Both the start and the end token stop a completion: checkpoints trained on texts that follow one
    another (llama2.c) end a text by starting the next.
    """

    def __init__(self, path: Path) -> None:
        """path: the .model file. Raises: UserError if it cannot be read."""
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{path} cannot be read as a sentencepiece model ({error}); "
                "copy the checkpoint's tokenizer file again"
            ) from error
        self.name = path.name
        special = (self._pieces.bos_id(), self._pieces.eos_id())
        self.stop_ids = tuple(sorted(i for i in special if i >= 0))
        self.bos_id = special[0] if special[0] >= 0 else None
        self.pad_id = max(self._pieces.pad_id(), 0)

    @property
    def vocab_size(self) -> int:
        """V [tokens]."""
        return self._pieces.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a text from its beginning, without start or stop tokens."""
        return self._pieces.encode(text)

    def decode(self, ids: Iterable[int], *, continues: bool = False) -> str:
        """Text of the ids; see Tokenizer.decode. Bytes that are no UTF-8 become U+FFFD."""
        plain = [int(i) for i in ids]
        text = self._pieces.decode(plain)
        first = next((i for i in plain if not self._pieces.is_control(i)), None)
        if continues and first is not None and self._pieces.id_to_piece(first).startswith("▁"):
            return " " + text
        return text
