"""Text to token ids and back: characters for models from scratch, sentencepiece for checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

from jaxrl.errors import UserError


class Tokenizer(Protocol):
    """Turns text into ids and ids into text."""

    @property
    def name(self) -> str:
        """For messages and reports."""
        ...

    @property
    def vocab_size(self) -> int:
        """V; every id lies in 0..V-1 [tokens]."""
        ...

    @property
    def bos_id(self) -> int | None:
        """Token that starts a text, None where there is none."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion, ascending."""
        ...

    @property
    def pad_id(self) -> int:
        """Fills unused places; always masked, so it may be a real token."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text from its beginning, without start or stop tokens."""
        ...

    def decode(self, ids: Iterable[int], *, continues: bool = False) -> str:
        """Text of the ids; start, stop and pad tokens give no text.

        continues: the ids follow other text (a completion after its prompt), so that a leading
        space is text and prompt + decode(completion, continues=True) is the whole; without it
        decode(encode(text)) == text.
        """
        ...


class CharTokenizer:
    """One token per character of an alphabet: 0 pad, 1 stop, then the characters by code point."""

    name = "characters"
    bos_id = None
    stop_ids = (1,)
    pad_id = 0

    def __init__(self, alphabet: str) -> None:
        """Raises: UserError for an empty alphabet."""
        if not alphabet:
            raise UserError(
                "the alphabet of the character tokenizer is empty; give at least one character"
            )
        self._characters = sorted(set(alphabet))
        self._ids = {character: i for i, character in enumerate(self._characters, start=2)}

    @property
    def vocab_size(self) -> int:
        """V: the characters, pad and stop [tokens]."""
        return 2 + len(self._characters)

    def encode(self, text: str) -> list[int]:
        """One id per character. Raises: UserError for a character outside the alphabet."""
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise UserError(
                f"character {error.args[0]!r} of {text[:60]!r} is not in the tokenizer's alphabet "
                f"{''.join(self._characters)!r}; remove it from the text or add it to the alphabet"
            ) from error

    def decode(self, ids: Iterable[int], *, continues: bool = False) -> str:
        """The characters; `continues` changes nothing. Raises: ValueError for an id beyond V."""
        del continues
        characters = []
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} lies outside 0..{self.vocab_size - 1}")
            if i >= 2:
                characters.append(self._characters[i - 2])
        return "".join(characters)


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


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the checkpoint in `folder`: its tokenizer.model, or its only tok*.model.

    Raises: UserError if there is none, more than one, or only a kind that is not supported.
    """
    files: Sequence[Path] = sorted(folder.glob("tok*.model"))
    if len(files) > 1:
        files = [file for file in files if file.name == "tokenizer.model"] or files
    if len(files) == 1:
        return SentencePieceTokenizer(files[0])
    supported = "supported now: one sentencepiece file, tokenizer.model or tok*.model"
    if files:
        names = ", ".join(file.name for file in files)
        raise UserError(
            f"{folder} holds several tokenizers ({names}); {supported}; remove the others"
        )
    if (folder / "tokenizer.json").exists():
        raise UserError(
            f"{folder} has its tokenizer only as tokenizer.json (Hugging Face tokenizers); "
            f"{supported}; use a checkpoint that ships one"
        )
    raise UserError(f"{folder} has no tokenizer; {supported}; copy it there from the checkpoint")
