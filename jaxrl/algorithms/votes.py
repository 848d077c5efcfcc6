"""Majority vote as reward, without labels (TTRL, arXiv:2504.16084; its code: verl, reward_manager/ttrl.py).

The label of a prompt is the most frequent final answer of its samples, the first seen where several are;
a sample is paid 1 for that answer, else 0. Samples without a final answer neither vote nor are paid.
Correctness stays the verifier's, for the curves alone. G samples are trained on, V >= G vote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from jaxrl.types import RolloutGroup


def majority(group: RolloutGroup) -> tuple[str, int]:
    """The most frequent final answer and its votes; ("", 0) if no sample has one."""
    votes = Counter(r.reward.answer for r in group.rollouts if r.reward.answer)
    return votes.most_common(1)[0] if votes else ("", 0)


def pay_majority(group: RolloutGroup, group_size: int) -> RolloutGroup:
    """The group's first `group_size` samples, each paid its agreement with the majority of all."""
    label, _ = majority(group)
    rollouts = tuple(
        replace(r, reward=replace(r.reward, total=float(label != "" and r.reward.answer == label)))
        for r in group.rollouts[:group_size]
    )
    return replace(group, rollouts=rollouts)


def vote_curves(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """How good the votes are, over all voters. Uses the labels that the reward does without.

    majority/label_accuracy: prompts whose majority answer is correct; majority/reward_accuracy: samples
    whose reward is what the label would pay; majority/ratio: votes of the majority / samples;
    majority/ground_truth_ratio: correct samples / samples.
    """
    correct = [[r.reward.correct for r in group.rollouts] for group in groups]
    labels = [majority(group) for group in groups]
    paid = [
        [label != "" and r.reward.answer == label for r in group.rollouts]
        for group, (label, _) in zip(groups, labels, strict=True)
    ]
    right = [
        any(c and p for c, p in zip(*both, strict=True)) for both in zip(correct, paid, strict=True)
    ]
    shares = [votes / len(g.rollouts) for g, (_, votes) in zip(groups, labels, strict=True)]
    return {
        "majority/label_accuracy": float(np.mean(right)),
        "majority/reward_accuracy": float(np.mean(np.array(correct) == np.array(paid))),
        "majority/ratio": float(np.mean(shares)),
        "majority/ground_truth_ratio": float(np.mean(correct)),
    }
