"""The groups of one step: votes counted, groups without signal replaced (DAPO arXiv:2503.14476 section 3.2).

Departures: refilled groups come from the buffer, finished in the meantime or sampled by the present
weights, and the staleness bound holds for them too; after `grpo.refill_rounds` rounds the step goes on
with what it has (DAPO's code stops the run). P prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxrl.algorithms.config import GrpoConfig
from jaxrl.algorithms.rewards import shaped_rewards, without_signal
from jaxrl.algorithms.votes import pay_majority, vote_curves
from jaxrl.types import RolloutGroup


class GroupSource(Protocol):
    """What `jaxrl.buffer.GroupBuffer` is to this file."""

    def take(self, number: int | None = None) -> list[RolloutGroup]:
        """So many finished groups, P by default."""
        ...

    def discard(self, number: int) -> None:
        """So many of the groups taken are not trained on."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What one step got, and what that cost."""

    groups: list[RolloutGroup]
    """The P groups to train on, in stream order."""
    sampled: list[RolloutGroup]
    """All groups taken from the source as they were sampled: those of no use and every vote among them."""
    refilled: int
    """Groups that were thrown away for want of signal and replaced."""
    curves: dict[str, float]

    @property
    def generated_tokens(self) -> int:
        """Completion tokens of all samples taken."""
        return sum(len(r.completion.tokens) for group in self.sampled for r in group.rollouts)


def take_batch(source: GroupSource, settings: GrpoConfig, max_new_tokens: int) -> Taken:
    """The P groups of one step."""
    sampled = source.take()
    groups, refilled = _paid(sampled, settings), 0
    for _ in range(settings.refill_rounds):
        rewards = shaped_rewards(groups, settings, max_new_tokens)
        flags = without_signal(groups, rewards, settings)
        if not flags.any():
            break
        kept = [group for group, flat in zip(groups, flags, strict=True) if not flat]
        number = len(groups) - len(kept)
        source.discard(number)
        refilled += number
        fresh = source.take(number)
        sampled = [*sampled, *fresh]
        groups = sorted([*kept, *_paid(fresh, settings)], key=lambda group: group.prompt.index)
    curves = {"filter/refilled_groups": float(refilled)}
    if settings.reward_from == "majority":
        curves |= vote_curves(sampled)
    return Taken(groups=groups, sampled=sampled, refilled=refilled, curves=curves)


def _paid(groups: Sequence[RolloutGroup], settings: GrpoConfig) -> list[RolloutGroup]:
    if settings.reward_from != "majority":
        return [*groups]
    return [pay_majority(group, settings.group_size) for group in groups]
