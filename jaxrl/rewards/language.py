"""Language consistency: problem, thoughts and answer are written in one language.

Magistral (arXiv:2506.10910 section 2.2) asks fastText; here py3langid answers, 5 MB and without a
compiler, among the languages that it trained on. LaTeX and code are taken out first: they look English.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

_LANGUAGES = ("en", "fr", "es", "it", "de", "zh", "ru")
"""English and the six that Magistral's problems were translated to."""
_LEAST_LETTERS = 20
"""A shorter text has no recognisable language, be it "42" or "x = y"; Chinese characters count 4."""
_MOST_CHARACTERS = 20_000
"""Enough to know; longer texts are judged by their beginning and their end."""
_NOT_PROSE = re.compile(
    r"```.*?(?:```|\Z)"  # code
    r"|`[^`\n]*`"
    r"|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)"  # mathematics
    r"|\\begin\{(?:equation|align|gather)\*?\}.*?\\end\{(?:equation|align|gather)\*?\}"
    r"|\\[A-Za-z]+(?:\{[^{}]*\})*"  # commands
    r"|</?\w+>",  # tags
    re.DOTALL,
)
_WORD = re.compile(r"[^\W\d_]+")


def consistent(problem: str, thoughts: str, answer: str) -> bool:
    """Whether all parts whose language can be told have the same, and at least two can be told.

    An answer that is nothing but \\boxed{4} neither helps nor harms.
    """
    told = [language for text in (problem, thoughts, answer) if (language := identify(text))]
    return len(told) > 1 and len(set(told)) == 1


def identify(text: str) -> str | None:
    """ISO 639-1 code of the prose in a text, one of seven; None if there is too little prose."""
    if len(text) > _MOST_CHARACTERS:
        text = text[: _MOST_CHARACTERS // 2] + text[-_MOST_CHARACTERS // 2 :]
    words = _WORD.findall(_NOT_PROSE.sub(" ", text))
    letters = sum(len(word) * (4 if word[0] >= "\u3040" else 1) for word in words)
    if letters < _LEAST_LETTERS:
        return None
    return str(_identifier().classify(" ".join(words).lower())[0])


@lru_cache(maxsize=1)
def _identifier() -> Any:
    """Loaded when first asked: 0.6 s and 100 MB."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # noqa: PLC0415

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(list(_LANGUAGES))
    return identifier
