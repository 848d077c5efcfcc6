"""What a tokenizer is to the rest of the program."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


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
