"""Names that users mistype. Standard library only."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SIMILAR = 0.5
"""Share of letters in common, in order, from which one name is taken for another one misspelt."""


def meant(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: "; did you mean 'h200'?", or "." where no known name
    is like it."""
    near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=SIMILAR)
    return f"; did you mean {near[0]!r}?" if near else "."
