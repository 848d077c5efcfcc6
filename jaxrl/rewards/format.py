"""Format gates: has the completion the form that was asked for? (Magistral, arXiv:2506.10910 section 2.2)

<think> thoughts </think> answer with \\boxed{...}, or with a fenced block that names its language
"""

from __future__ import annotations

import re
from enum import StrEnum

from jaxrl.rewards.code import fenced_blocks

_OPEN, _CLOSE = "<think>", "</think>"
_TOKEN = re.compile(r"\\boxed\{|\\.|[{}]", re.DOTALL)
"""Boxes, escaped characters, braces."""


class Gate(StrEnum):
    """What must follow the thoughts."""

    THINK = "think"
    """Anything, as long as it is something."""
    BOXED = "boxed"
    """At least one closed \\boxed{...}."""
    CODE = "code"
    """At least one closed block between ``` whose opening names a language."""


def passes(completion: str, gate: Gate, opened: bool = False) -> bool:
    """Whether the completion starts with its only <think>, closes it once, and what follows has the form.

    opened: the prompt ends with <think> already, as some chat templates have it; the completion then
    holds none.
    """
    parts = split_thoughts(completion, opened)
    if parts is None:
        return False
    answer = parts[1]
    if gate is Gate.BOXED:
        return has_box(answer)
    if gate is Gate.CODE:
        return any(tag for tag, _ in fenced_blocks(answer))
    return bool(answer.strip())


def split_thoughts(completion: str, opened: bool = False) -> tuple[str, str] | None:
    """(thoughts, answer), or None unless there is exactly one pair of tags, the first at the start."""
    text = completion if not opened else _OPEN + completion
    if not text.startswith(_OPEN) or text.count(_OPEN) != 1 or text.count(_CLOSE) != 1:
        return None
    thoughts, answer = text.removeprefix(_OPEN).split(_CLOSE)
    return thoughts, answer


def has_box(text: str) -> bool:
    """Whether the text holds a closed \\boxed{...}. Linear in the text."""
    open_braces: list[bool] = []  # True: opened by a box
    for token in _TOKEN.findall(text):
        if token == "}":
            if open_braces and open_braces.pop():
                return True
        elif token.endswith("{") and token != "\\{":
            open_braces.append(token != "{")
    return False
