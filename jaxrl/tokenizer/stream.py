"""The text of a completion while it grows."""

from __future__ import annotations

from collections.abc import Iterable

from jaxrl.tokenizer.base import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class StreamDecoder:
    """Turns ids into text as they come; a character is given once all its bytes are there.

    Everything that `push` returned, then `finish`, is the text of all ids together.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues: bool = True) -> None:
        """continues: the ids follow other text, as in Tokenizer.decode."""
        self._tokenizer = tokenizer
        self._continues = continues
        self._held: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """Further ids; the text that they complete, perhaps none."""
        self._held.extend(ids)
        text = self._tokenizer.decode(self._held, continues=self._continues)
        return "" if text.endswith(_BROKEN) else self._give(text)

    def finish(self) -> str:
        """The rest: bytes that no character completes, as U+FFFD."""
        return self._give(self._tokenizer.decode(self._held, continues=self._continues))

    def _give(self, text: str) -> str:
        self._held.clear()
        self._continues = self._continues or bool(text)
        return text
