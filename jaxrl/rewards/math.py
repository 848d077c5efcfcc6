r"""Reward for a final answer that is mathematically equal to the reference. Loads sympy: workers only.

The answer is found by `jaxrl.rewards.answers` and compared by math-verify
(github.com/huggingface/Math-Verify). It parses with sympy, whose parser evaluates Python, so this
module is imported by verifier processes and never by the trainer; the time limit is the pool's.
What counts as equal, and the rules of other graders that are not shared, are in README.md beside this.
"""

from __future__ import annotations

import logging
import re
import resource
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from jaxrl.rewards.answers import MAX_ANSWER, Answer, final_answer
from jaxrl.types import Reward

MEMORY_BYTES = 4 << 30
"""Address space of a verifier process: 9**9**9**9 ends in MemoryError, not in the trainer's death."""

# math-verify warns at each start that its own time limit is off; the pool has one.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_DIGIT_GROUPS = re.compile(r"(?<=\d)(?:\\[,!; ]|\{,\}|,? ?\\! ?| )(?=\d{3}(?!\d))")
_UNICODE = str.maketrans(
    {
        "−": "-",
        "°": r"^\circ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "×": r"\times ",
        "≤": r"\le ",
        "≥": r"\ge ",
    }
)
_PI = re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])")
_EXPONENT = re.compile(r"(?<=\d)[eE]([-+]?\d{1,3})$")
_NUMBER_AND_WORDS = re.compile(
    r"([-+]?\\?\$?\d[\d,]*(?:\.\d+)?)(?: (?!(?:pi|percent|pct)\b)[A-Za-z]{2,})+"
)
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{\w+\}")
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z][A-Za-z '-]*")
_SENTENCE = re.compile(
    r"(?<!\\)\$|\\\(|\\\[|(?<![A-Za-z\\])"
    r"(?!(?:arc)?(?:sin|cos|tan|cot|sec|csc)|sqrt|log|exp|and|inf|percent|pct)"
    r"(?:[A-Za-z]{3,}|(?:[Ss]o|[Ii]s|[Ii]t|[Ww]e|[Tt]o|[Oo]f|[Bb]y|[Aa]t)(?![A-Za-z]))"
)


def limit_memory() -> None:
    """Bound this process's address space to MEMORY_BYTES, for good. For verifier processes."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def score_math(prompt: str, completion: str, row: Mapping[str, Any]) -> Reward:
    """1 if the final answer of the completion equals row["answer"], else 0.

    Parts: `correct`; `answered`: an explicit mark was found (box, ####, tag).
    Raises: KeyError or TypeError for a row whose answer is missing or no text.
    """
    answer = final_answer(completion)
    correct = answer is not None and equivalent(row["answer"], answer)
    answered = answer is not None and answer.mark != "plain"
    parts = {"correct": float(correct), "answered": float(answered)}
    said = "" if answer is None else _words(answer.text) or _tidy(answer)
    return Reward(total=float(correct), parts=parts, correct=correct, answer=said)


def equivalent(gold: str, answer: Answer) -> bool:
    """Is the answer mathematically equal to the reference `gold`?

    gold: LaTeX or plain text, alone or as a worked solution with a marked final answer.
    """
    if not isinstance(gold, str):
        raise TypeError(f"the reference answer is {gold!r}; it must be a text")
    reference = _reference(gold)
    said, words = _tidy(answer), _words(answer.text)
    if said == _tidy(reference) or (words and words == _words(reference.text)):
        return True
    return verify(
        _parsed_reference(gold), _parsed(answer), allow_set_relation_comp=True, timeout_seconds=0
    )


def _reference(gold: str) -> Answer:
    return final_answer(gold) or Answer(text=gold[-MAX_ANSWER:], mark="plain")


@lru_cache(maxsize=512)
def _parsed_reference(gold: str) -> list[Any]:
    return _parsed(_reference(gold))


def _parsed(answer: Answer) -> list[Any]:
    """What math-verify makes of it: of a formula itself, of a sentence the formula found in it."""
    text = _tidy(answer)
    prose = _SENTENCE.search(_ENVIRONMENT.sub("", _WRAPPED.sub("", text)))
    if answer.mark == "boxed" or not prose:
        text = f"\\boxed{{{text}}}"
    elif answer.mark == "said":
        text = f"answer: {text}"
    return parse(text, parsing_timeout=0)


def _tidy(answer: Answer) -> str:
    r"""The text with numbers as the parser wants them: 1\,000 is 1000, 1e-6 is a power, 3 apples is 3."""
    text = _DIGIT_GROUPS.sub("", answer.text.translate(_UNICODE)).replace("\\mbox", "\\text")
    text = _PI.sub(r"\\pi", text.removesuffix("."))
    text = _EXPONENT.sub(r" \\times 10^{\1}", text)
    number = _NUMBER_AND_WORDS.fullmatch(text)
    return number.group(1) if number else text


def _words(text: str) -> str | None:
    r"""An answer in words, such as \text{Even}, without case and punctuation; None if it is no such."""
    plain = " ".join(_WRAPPED.sub(r"\1", text).strip("$ .!").split())
    return plain.casefold() if _WORDS.fullmatch(plain) else None
