"""Advantages of grouped samples, on the host. Letters: P prompts, G samples per prompt."""

from __future__ import annotations

from typing import Literal

import numpy as np

Baseline = Literal["mean", "leave_one_out"]
Scale = Literal["group_std", "batch_std", "none"]


def zero_variance(rewards: np.ndarray) -> np.ndarray:
    """Groups that carry no signal, because all their samples got the same reward.

    Args:
        rewards: [P, G].

    Returns:
        [P] bool.
    """
    return np.max(rewards, axis=1) == np.min(rewards, axis=1)


def group_advantages(
    rewards: np.ndarray,
    *,
    baseline: Baseline = "mean",
    scale: Scale = "group_std",
    eps: float = 1e-6,
    ddof: int = 1,
) -> np.ndarray:
    """Reward minus a baseline from the sample's own group, divided by a spread.

    baseline: mean = group mean over G (GRPO arXiv:2402.03300 section 4.1.2); leave_one_out = mean
    over the other G - 1 samples (RLOO arXiv:2402.14740), which is G / (G - 1) times the former.
    scale: group_std = standard deviation of the group's rewards + eps (GRPO); batch_std = standard
    deviation of the advantages over all sequences of groups WITH signal + eps (Magistral
    arXiv:2506.10910 section 2.1, ScaleRL arXiv:2510.13786); none = 1 (Dr. GRPO arXiv:2503.20783).
    Every standard deviation divides by its count - ddof. Groups of equal rewards get exactly 0 and
    enter no spread; a group of one sample is such a group.

    Args:
        rewards: [P, G], finite.
        baseline: what is subtracted.
        scale: what divides.
        eps: added to the spread, in units of reward (batch_std, group_std).
        ddof: 1 for the unbiased variance, 0 for the maximum-likelihood one.

    Returns:
        [P, G] float64.

    Raises:
        ValueError: a reward is not finite, or the shape is not [P, G].
    """
    rewards = _checked(rewards)
    group_size = rewards.shape[1]
    flat = zero_variance(rewards)
    advantages = np.where(flat[:, None], 0.0, rewards - rewards.mean(axis=1, keepdims=True))
    if baseline == "leave_one_out" and group_size > 1:
        advantages = advantages * (group_size / (group_size - 1))
    if flat.all() or scale == "none":
        return advantages
    if scale == "group_std":
        spread = rewards[~flat].std(axis=1, ddof=ddof, keepdims=True)
    else:
        spread = advantages[~flat].std(ddof=ddof)
    advantages[~flat] /= spread + eps
    return advantages


def _checked(rewards: np.ndarray) -> np.ndarray:
    """Rewards as float64 [P, G]."""
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 2 or rewards.shape[1] == 0:
        raise ValueError(f"rewards have shape {rewards.shape}; give [prompts, samples per prompt]")
    bad = np.flatnonzero(~np.isfinite(rewards).all(axis=1)).tolist()
    if bad:
        raise ValueError(f"rewards of groups {bad} are not finite; a verifier must return a number")
    return rewards
