"""What a checkpoint remembers beside the arrays, as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jaxrl.buffer import BufferState
from jaxrl.types import RolloutGroup


@dataclass(kw_only=True, slots=True)
class RunRecord:
    """Counters and positions of a run after optimizer step `step`. Mutable: one per process, owned by main."""

    step: int = 0
    buffer: BufferState = field(default_factory=lambda: BufferState(next_index=0, outstanding=()))
    before: dict[str, float] = field(default_factory=dict)
    """Held-out curves before reinforcement learning."""
    samples: int = 0
    """Completions consumed by the learner."""
    generated_tokens: int = 0
    """Completion tokens sampled for the steps so far, whether trained on or not."""
    curricula: dict[str, Any] = field(default_factory=dict)
    """State of the curricula, empty before the first step."""
    nonfinite_steps: int = 0
    staleness: dict[int, int] = field(default_factory=dict)
    """Consumed samples by staleness of their oldest token."""
    wall_s: float = 0.0
    """Time spent by all starts of the run up to this step, from their first weights on [s]."""

    def consume(self, groups: Sequence[RolloutGroup], version: int) -> list[int]:
        """Count the samples that weights `version` are about to learn from; returns their staleness."""
        staleness = [
            version - rollout.completion.oldest_version
            for group in groups
            for rollout in group.rollouts
        ]
        self.samples += len(staleness)
        for value in staleness:
            self.staleness[value] = self.staleness.get(value, 0) + 1
        return staleness

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary with string keys."""
        tree = asdict(self)
        tree["buffer"]["outstanding"] = list(self.buffer.outstanding)
        tree["staleness"] = {str(k): v for k, v in self.staleness.items()}
        return tree

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> RunRecord:
        """Read what `to_json` wrote."""
        fields = dict(tree)
        fields["buffer"] = BufferState(
            next_index=tree["buffer"]["next_index"],
            outstanding=tuple(tree["buffer"]["outstanding"]),
        )
        fields["staleness"] = {int(k): v for k, v in tree["staleness"].items()}
        return cls(**fields)
