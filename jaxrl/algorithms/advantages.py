"""Advantages of grouped samples and of tokens, on the host. P prompts, G samples per prompt, T tokens."""

from __future__ import annotations

from typing import Literal, assert_never

import numpy as np

Baseline = Literal["mean", "leave_one_out", "none"]
Scale = Literal["group_std", "batch_std", "batch_reward_std", "group_mean", "none"]

VARIANCE_FLOOR = 1e-8
"""Added to a variance before its root is divided by (OpenRLHF and verl whiten with it)."""


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
    singleton: Literal["zero", "reward"] = "zero",
) -> np.ndarray:
    """Reward minus a baseline from the sample's own group, divided by a spread.

    baseline: mean = group mean over G (GRPO arXiv:2402.03300 section 4.1.2); leave_one_out = mean
    over the other G - 1 samples (RLOO arXiv:2402.14740), which is G / (G - 1) times the former;
    none = 0, the reward itself.
    scale: group_std = standard deviation of the group's rewards + eps (GRPO); batch_std = standard
    deviation of the advantages over all sequences of groups WITH signal + eps (Magistral
    arXiv:2506.10910 section 2.1, ScaleRL arXiv:2510.13786); batch_reward_std = that of the rewards of all
    groups given + eps, so that prompts of different difficulty widen it (arXiv:2508.08221, TRL's
    scale_rewards=batch); group_mean = mean reward of the group (MaxRL; a group whose mean is not positive
    gets 0); none = 1 (Dr. GRPO arXiv:2503.20783).
    Every standard deviation divides by its count - ddof. With a group baseline, groups of equal
    rewards get exactly 0 and enter no spread; a group of one sample is such a group, unless
    singleton=reward (verl): then it keeps its reward, undivided by a group's spread.

    Args:
        rewards: [P, G], finite.
        baseline: what is subtracted.
        scale: what divides.
        eps: added to the spread, in units of reward (batch_std, batch_reward_std, group_std).
        ddof: 1 for the unbiased variance, 0 for the maximum-likelihood one.
        singleton: advantage of a group of one sample.

    Returns:
        [P, G] float64.

    Raises:
        ValueError: a reward is not finite, or the shape is not [P, G].
    """
    rewards = _checked(rewards)
    group_size = rewards.shape[1]
    if baseline == "none" or (group_size == 1 and singleton == "reward"):
        of_batch = scale == "batch_std" or scale == "batch_reward_std"
        return rewards / (rewards.std(ddof=ddof) + eps if of_batch else 1.0)
    flat = zero_variance(rewards)
    advantages = np.where(flat[:, None], 0.0, rewards - rewards.mean(axis=1, keepdims=True))
    if baseline == "leave_one_out" and group_size > 1:
        advantages = advantages * (group_size / (group_size - 1))
    if flat.all() or scale == "none":
        return advantages
    if scale == "group_mean":
        means = rewards.mean(axis=1, keepdims=True)
        return np.where(means > 0, advantages / np.where(means > 0, means, 1.0), 0.0)
    if scale == "group_std":
        spread = rewards[~flat].std(axis=1, ddof=ddof, keepdims=True)
    elif scale == "batch_reward_std":
        spread = rewards.std(ddof=ddof)
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


def token_rewards(reward: float, kl: np.ndarray, kl_weight: float) -> np.ndarray:
    """Rewards of one completion's tokens: -kl_weight * kl each, and the verdict at the last.

    Args:
        reward: verdict on the whole completion.
        kl: [T] estimate of log policy / reference of each token (k1).
        kl_weight: beta of arXiv:1909.08593 eq. 2.

    Returns:
        [T] float64.
    """
    rewards = -kl_weight * np.asarray(kl, dtype=np.float64)
    rewards[-1] += reward
    return rewards


def discounted_returns(
    rewards: np.ndarray, discounts: np.ndarray, bootstrap: float = 0.0
) -> np.ndarray:
    """G_t = r_t + discount_t G_{t+1}, from the right; G past the end is `bootstrap`.

    A discount of 0 ends an episode: after it, later rewards do not count (verl's reset after a
    masked token is discount_t = gamma * mask_{t+1}).

    Args:
        rewards: [T].
        discounts: [T], what the next return is worth at t.
        bootstrap: value after the last token; 0, a truncated completion is terminal.

    Returns:
        [T] float64.
    """
    returns = np.zeros(len(rewards))
    following = bootstrap
    for t in reversed(range(len(rewards))):
        following = rewards[t] + discounts[t] * following
        returns[t] = following
    return returns


def gae(
    rewards: np.ndarray, values: np.ndarray, discounts: np.ndarray, gae_lambda: float
) -> np.ndarray:
    """Generalised advantage estimation (arXiv:1506.02438 eq. 16).

    delta_t = r_t + discount_t V_{t+1} - V_t; A_t = delta_t + discount_t lambda A_{t+1}. The return
    that the critic learns is A_t + V_t, before any whitening.

    Args:
        rewards: [T].
        values: [T + 1]; the last one is the value after the end, 0 if that is terminal.
        discounts: [T].
        gae_lambda: 1 gives the return minus the value.

    Returns:
        [T] float64.
    """
    deltas = np.asarray(rewards) + np.asarray(discounts) * values[1:] - values[:-1]
    return discounted_returns(deltas, np.asarray(discounts) * gae_lambda)


def masked_moments(values: np.ndarray, mask: np.ndarray, ddof: int = 1) -> tuple[float, float]:
    """Mean and variance of values where mask is set; the variance divides by the count - ddof.

    Returns:
        (mean, variance); (0, 0) without values, variance 0 with not more than ddof values.
    """
    kept = np.asarray(values, dtype=np.float64)[np.asarray(mask, dtype=bool)]
    if kept.size == 0:
        return 0.0, 0.0
    return float(kept.mean()), float(kept.var(ddof=ddof)) if kept.size > ddof else 0.0


def whiten(values: np.ndarray, mask: np.ndarray, ddof: int = 1) -> np.ndarray:
    """(values - mean) / sqrt(variance + 1e-8), moments over the masked-in values (REINFORCE++
    arXiv:2501.03262, over the tokens of the whole batch).

    Every value is transformed, so that the caller decides what to do with masked-out ones. Fewer
    than two masked-in values are returned as they are.
    """
    mask = np.asarray(mask, dtype=bool)
    if mask.sum() < 2:
        return np.asarray(values, dtype=np.float64)
    mean, variance = masked_moments(values, mask, ddof)
    return (np.asarray(values, dtype=np.float64) - mean) / np.sqrt(variance + VARIANCE_FLOOR)


def high_entropy_mask(entropies: np.ndarray, mask: np.ndarray, share: float) -> np.ndarray:
    """Tokens among the `share` of highest entropy (arXiv:2506.01939 section 4).

    The threshold is the (1 - share) quantile over all masked-in tokens given (interpolated, as in
    TRL): give the whole optimizer batch, as the paper does; its code takes micro-batches.

    Args:
        entropies: any shape [nats].
        mask: same shape, tokens that count.
        share: in (0, 1]; 1 keeps every token.

    Returns:
        bool, same shape; False outside mask.
    """
    mask = np.asarray(mask, dtype=bool)
    if not mask.any():
        return mask
    kept = np.asarray(entropies)[mask]
    return mask & (np.asarray(entropies) >= np.quantile(kept, 1.0 - share))


def selected_samples(
    rewards: np.ndarray, correct: np.ndarray, which: Literal["all", "correct", "best"]
) -> np.ndarray:
    """Samples to train on [P, G] bool: all, the correct ones, or the first best of each group.

    Args:
        rewards: [P, G].
        correct: [P, G] bool.
        which: best is RAFT's choice (arXiv:2304.06767).
    """
    if which == "all":
        return np.ones(rewards.shape, dtype=bool)
    if which == "correct":
        return np.asarray(correct, dtype=bool)
    if which == "best":
        return np.arange(rewards.shape[1]) == rewards.argmax(axis=1)[:, None]
    assert_never(which)
