"""Dynamic sampling (DAPO arXiv:2503.14476 section 3.2): groups without signal are replaced before the step.

Departures: refilled groups come from the buffer, finished in the meantime or sampled by the present
weights, and the staleness bound holds for them too; after `grpo.refill_rounds` rounds the step goes on
with what it has (DAPO's code stops the run). P prompts.
"""

from __future__ import annotations

from typing import Protocol

from jaxrl.algorithms.config import GrpoConfig
from jaxrl.algorithms.rewards import shaped_rewards, without_signal
from jaxrl.types import RolloutGroup


class GroupSource(Protocol):
    """What `jaxrl.buffer.GroupBuffer` is to this file."""

    def take(self, number: int | None = None) -> list[RolloutGroup]:
        """So many finished groups, P by default."""
        ...

    def discard(self, number: int) -> None:
        """So many of the groups taken are not trained on."""
        ...


def take_batch(
    source: GroupSource, settings: GrpoConfig, max_new_tokens: int
) -> tuple[list[RolloutGroup], list[RolloutGroup]]:
    """The P groups of one step in stream order, and those that were thrown away for want of signal."""
    groups, discarded = source.take(), []
    for _ in range(settings.refill_rounds):
        rewards = shaped_rewards(groups, settings, max_new_tokens)
        flags = without_signal(groups, rewards, settings)
        if not flags.any():
            break
        kept = [group for group, flat in zip(groups, flags, strict=True) if not flat]
        discarded += [group for group, flat in zip(groups, flags, strict=True) if flat]
        number = len(groups) - len(kept)
        source.discard(number)
        groups = sorted([*kept, *source.take(number)], key=lambda group: group.prompt.index)
    return groups, discarded
