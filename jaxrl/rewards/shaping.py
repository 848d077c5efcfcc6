"""From a verdict to a shaped reward. Parts stay apart, and correctness stays what it was.

Filters (groups that are all right or all wrong) and pass@k read `Reward.correct`, never the total: DAPO
drops a group of eight right answers that differ in their length penalties alone.
"""

from __future__ import annotations

import numpy as np

from jaxrl.algorithms.shaping import soft_overlong
from jaxrl.errors import UserError
from jaxrl.types import Reward

_FORMAT, _CORRECT, _LENGTH, _LANGUAGE = 0.1, 0.9, 0.1, 0.1
"""Magistral's weights (arXiv:2506.10910 section 2.2)."""


def soft_length_penalty(num_tokens: int, max_tokens: int, soft_tokens: int) -> float:
    """0 up to max_tokens - soft_tokens, then linear, -1 from max_tokens on: DAPO, arXiv:2503.14476 eq. 13.

    num_tokens: length of the completion. max_tokens: DAPO 20480. soft_tokens: the interval in which the
    penalty grows, DAPO 4096. Raises: UserError unless 0 < soft_tokens <= max_tokens.
    """
    if not 0 < soft_tokens <= max_tokens:
        raise UserError(
            f"the length penalty grows over {soft_tokens} tokens; that must lie in 1..{max_tokens}, "
            "the longest completion; usual: a fifth of it"
        )
    penalty = soft_overlong(np.array(num_tokens), longest=max_tokens, buffer=soft_tokens)
    return float(penalty) + 0.0  # no -0.0 in samples.jsonl


def magistral_reward(
    formatted: bool, correct: bool, length_penalty: float, same_language: bool
) -> Reward:
    """0 without the format; with it 0.1 + 0.9 if correct + 0.1 * penalty + 0.1 if one language.

    Total in {0} and [0, 1.1] (arXiv:2506.10910 section 2.2). Length and language count for wrong answers
    too, as the text there reads.

    formatted: of `jaxrl.rewards.format.passes`. correct: the verifier's verdict; it is kept as it is,
    also where the format fails. length_penalty: of `soft_length_penalty`, in [-1, 0]. same_language: of
    `jaxrl.rewards.language.consistent`.
    Parts: `format`, `correct`, `length`, `language`; they add up to the total.
    """
    gate = float(formatted)
    parts = {
        "format": gate * _FORMAT,
        "correct": gate * _CORRECT * correct,
        "length": gate * _LENGTH * length_penalty,
        "language": gate * _LANGUAGE * same_language,
    }
    return Reward(total=sum(parts.values()), parts=parts, correct=correct)
