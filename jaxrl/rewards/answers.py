r"""Finding the final answer in a completion. Text only: nothing here evaluates or parses mathematics.

What stands after the last `</think>` counts; if `<think>` is opened and never closed, there is no
answer. There, the first of these that is present decides, and the last of its kind counts:

    \boxed{7}  \fbox{7}  \boxed 7     boxes with only "," "and" "or" between them are one list
    #### 7                            on the last line, or alone with a number on any line
    <answer>7</answer>
    so the answer is 7.   Answer: 7   said: the rest of that line
    7                                 plain: the end of the text

An answer that is longer than `MAX_ANSWER` is none, and a box that never closes is none: a completion
that was cut off inside its box has not answered. All searches are linear in the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

MAX_ANSWER = 1000
"""Longest answer [characters]; the longest of MATH's 12,500 has 159."""
_TAIL = 1000
"""End of a text without a box, #### or tag that is searched for an answer [characters]."""
_MAX_BOXES = 32
"""Most boxes in one list."""

_BOX = re.compile(r"\\f?box(?:ed)?(?![A-Za-z])\s*")
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;.&~]|\\[()\[\],;!]|\\q?quad|\\(?:text|mbox|mathrm)\{\s*(?:and|or|,)\s*\}|and|or)*"
)
_HASHES = re.compile(r"#### *:? *(\S[^\n]*)")
_BARE_NUMBER = re.compile(r"[-+]?\$? ?\d[\d,]*(?:\.\d+)?%?\.?")
_SAID = re.compile(r"\banswer(?: is)?\b[: ]*", re.IGNORECASE)
_NOISE = re.compile(r"[\s*]+|<\|\w+\|>")

Mark = Literal["boxed", "hashes", "tag", "said", "plain"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a completion gives as its final answer."""

    text: str
    mark: Mark
    """How it was found. Of `plain`, and of the others where they hold a sentence, the text contains
    the answer rather than being it."""


def final_answer(completion: str) -> Answer | None:
    """The final answer of a completion, or None if it has none."""
    text = after_thinking(completion)
    if text is None:
        return None
    boxes = list(_BOX.finditer(text))
    if boxes:
        return _checked(_boxed(text, [box.span() for box in boxes[-_MAX_BOXES:]]), "boxed")
    if hashes := _hashes(text):
        return _checked(hashes, "hashes")
    if tagged := _tagged(text):
        return _checked(_said(tagged[-_TAIL:]) or tagged, "tag")
    tail = text.strip()[-_TAIL:]
    return _checked(_said(tail), "said") or _checked(tail, "plain")


def after_thinking(completion: str) -> str | None:
    """What follows the last `</think>`; all of it without tags; None if thinking never ends."""
    _, end, rest = completion.rpartition("</think>")
    return None if "<think>" in (rest if end else completion) else rest


def _checked(text: str | None, mark: Mark) -> Answer | None:
    text = (text or "").strip()
    return Answer(text=text, mark=mark) if 0 < len(text) <= MAX_ANSWER else None


def _boxed(text: str, starts: list[tuple[int, int]]) -> str | None:
    """Content of the last box, joined with that of the boxes listed right before it."""
    contents: list[str] = []
    next_start = None
    for start, inner in reversed(starts):
        content, end = _box_content(text, inner)
        if content is None:
            break
        if next_start is not None and (
            end > next_start or not _BETWEEN_BOXES.fullmatch(text[end:next_start])
        ):
            break
        contents.insert(0, content)
        next_start = start
    return ", ".join(contents) or None


def _box_content(text: str, inner: int) -> tuple[str | None, int]:
    """What a box holds whose brace, or first character without one, is at `inner`; and its end."""
    if text[inner : inner + 1] != "{":
        bare = re.compile(r"[^\s$\\{}]+").match(text, inner)
        return (bare.group().rstrip(".,"), bare.end()) if bare else (None, inner)
    depth = 0
    for at in range(inner, min(len(text), inner + MAX_ANSWER + 2)):
        if text[at] in "{}" and text[at - 1] != "\\":
            depth += 1 if text[at] == "{" else -1
            if depth == 0:
                return text[inner + 1 : at], at + 1
    return None, inner


def _hashes(text: str) -> str | None:
    """Answer behind the last `####` that is no heading: last line of the text, or only a number."""
    last = text.rstrip().rpartition("\n")[2]
    found = [match.group(1).strip() for match in _HASHES.finditer(last)]
    found = found or [
        match.group(1).strip()
        for match in _HASHES.finditer(text)
        if _BARE_NUMBER.fullmatch(match.group(1).strip())
    ]
    return found[-1] if found else None


def _said(text: str) -> str | None:
    """Rest of the line behind the last "answer is" or "answer:", without emphasis and full stop."""
    for match in reversed(list(_SAID.finditer(text))):
        line = text[match.end() :].partition("\n")[0]
        said = _NOISE.sub(" ", line).strip().removesuffix(".")
        if re.search(r"\w", said):
            return said
    return None


def _tagged(text: str) -> str | None:
    head, end, _ = text.rpartition("</answer>")
    return head.rpartition("<answer>")[2] if end and "<answer>" in head else None
