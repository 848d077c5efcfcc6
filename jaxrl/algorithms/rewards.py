"""From verdicts to the rewards of an optimizer batch: controls, shaping, which groups have signal.

P prompts, G samples per prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from jaxrl.algorithms.advantages import zero_variance
from jaxrl.algorithms.config import GrpoConfig
from jaxrl.algorithms.shaping import cosine_scaled, repeated_share, soft_overlong
from jaxrl.types import Finish, Rollout, RolloutGroup


def shaped_rewards(
    groups: Sequence[RolloutGroup], settings: GrpoConfig, max_new_tokens: int
) -> np.ndarray:
    """Rewards [P, G] float64 of the samples, as the advantages see them.

    In this order: the verdict (or a control's), reward_shift and reward_scale, length, repetitions.

    Args:
        groups: P groups, all of the same G.
        settings: the reward's options.
        max_new_tokens: the limit that soft_overlong and cosine measure lengths by.
    """
    rewards = np.array([[_verdict(group, r, settings) for r in group.rollouts] for group in groups])
    if settings.reward_shift != 0 or settings.reward_scale != 1:
        rewards = (rewards + settings.reward_shift) * settings.reward_scale
    lengths = np.array([[len(r.completion.tokens) for r in group.rollouts] for group in groups])
    if settings.length_reward == "cosine":
        rewards = cosine_scaled(lengths, correctness(groups), longest=max_new_tokens)
    elif settings.length_reward == "soft_overlong":
        penalty = soft_overlong(
            lengths, longest=max_new_tokens,
            buffer=settings.overlong_buffer or -(-max_new_tokens // 5),
            penalty=settings.overlong_penalty,
        )  # fmt: skip
        pays = correctness(groups) | (settings.overlong_on == "all")
        rewards = rewards + np.where(pays, penalty, 0.0)
    if settings.repetition_ngram > 0:
        shares = [
            [
                repeated_share(r.completion.tokens.tolist(), settings.repetition_ngram)
                for r in g.rollouts
            ]
            for g in groups
        ]
        rewards = rewards - settings.repetition_penalty * np.array(shares)
    return rewards


def _verdict(group: RolloutGroup, rollout: Rollout, settings: GrpoConfig) -> float:
    if settings.reward_from == "random":
        coin = f"{group.prompt.index}/{rollout.completion.sample_index}".encode()
        return float(hashlib.blake2b(coin, digest_size=1).digest()[0] % 2)
    if settings.reward_from == "format":
        ended = float(rollout.completion.finish is Finish.STOP)
        return rollout.reward.parts.get("format", ended)
    return rollout.reward.total


def correctness(groups: Sequence[RolloutGroup]) -> np.ndarray:
    """Correctness of each sample before any shaping, [P, G] bool."""
    return np.array([[r.reward.correct for r in group.rollouts] for group in groups])


def without_signal(
    groups: Sequence[RolloutGroup], rewards: np.ndarray, settings: GrpoConfig
) -> np.ndarray:
    """Groups whose samples are all alike [P] bool: in the shaped reward, or in correctness (DAPO).

    By correctness, a group of all-correct samples with different length penalties has no signal.
    """
    if settings.signal_from == "correct":
        return zero_variance(correctness(groups))
    return zero_variance(rewards)
