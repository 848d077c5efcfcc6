"""Rewards that depend on the completion's length or repetitions, on the host, any shape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def soft_overlong(
    lengths: np.ndarray, *, longest: int, buffer: int, penalty: float = 1.0, floor: bool = True
) -> np.ndarray:
    """Penalty of long completions, to be added to the reward (DAPO arXiv:2503.14476 eq. 13).

    0 up to longest - buffer, then linear down to -penalty at `longest`. Beyond it stays there with
    `floor` (the paper, TRL, Magistral) and goes on falling without (verl, NeMo RL, tunix).

    Args:
        lengths: tokens of each completion.
        longest: the limit [tokens].
        buffer: tokens before the limit over which the penalty grows, > 0.
        penalty: size at the limit; 1 in DAPO, 0.1 in Magistral (arXiv:2506.10910 section 2.2).
        floor: bound the penalty.

    Returns:
        float64 <= 0, shape of lengths.
    """
    over = np.maximum((np.asarray(lengths, np.float64) - (longest - buffer)) / buffer, 0.0)
    return -penalty * (np.minimum(over, 1.0) if floor else over)


def cosine_scaled(lengths: np.ndarray, correct: np.ndarray, *, longest: int) -> np.ndarray:
    """Reward by correctness and length, in place of the task's (arXiv:2502.03373 eq. 1, TRL's bounds).

    Correct: from 1 at length 0 to 0.5 at `longest`; wrong: from -1 to -0.5, so that a wrong answer
    costs less the longer it tried. Longer completions count as `longest`.

    Returns:
        float64, shape of lengths.
    """
    progress = np.minimum(np.asarray(lengths, np.float64) / longest, 1.0)
    fading = 0.25 * (1.0 + np.cos(np.pi * progress))
    return np.where(correct, 0.5 + fading, -0.5 - fading)


def repeated_share(tokens: Sequence[int], ngram: int) -> float:
    """Share of the n-grams that occurred before in the same completion (arXiv:2502.03373).

    Returns:
        1 - distinct / all n-grams, in [0, 1); 0 if the completion is shorter than n.
    """
    count = len(tokens) - ngram + 1
    if count <= 0:
        return 0.0
    distinct = {tuple(tokens[i : i + ngram]) for i in range(count)}
    return 1.0 - len(distinct) / count
