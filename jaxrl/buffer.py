"""Hand-over of sample groups from the rollout to the learner, bounded by staleness, never by luck.

    rollout thread                          learner thread
    --------------                          --------------
    draw()  waits for a free ticket         take()  waits until P finished groups may leave
      | ticket = (prompt, birth version)      |
      v                                       v
    sample, verify -> put(group)            train, publish weights v+1
                                            release(v+1): P tickets are free again, all at once

There are (max_staleness + 1) * P tickets. A ticket is taken before a prompt is sampled and freed only
after the weights that its group helped to train are published, so no sample is born stale. Finished
groups may overtake unfinished ones, oldest first, as long as every group that stays behind can still be
consumed within the bound (an earliest-deadline-first argument, `_may_leave`).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxrl.types import Prompt, RolloutGroup


class PromptSource(Protocol):
    """What the buffer draws prompts from: random access by position in the stream."""

    def at(self, index: int) -> Prompt:
        """The prompt at position `index` of the endless stream."""
        ...


class BufferClosed(Exception):
    """The run is over: whoever waits on the buffer should leave."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """The right to sample one group. No token of it is older than `birth_version`."""

    prompt: Prompt
    birth_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BufferState:
    """What a checkpoint needs: where the stream stands and which prompts are drawn again."""

    next_index: int
    outstanding: tuple[int, ...]


class GroupBuffer:
    """Tickets out, finished groups in, batches out. All methods may be called from any thread."""

    def __init__(
        self, source: PromptSource, *, prompts_per_step: int, max_staleness: int, version: int = 0,
        state: BufferState | None = None,
    ) -> None:  # fmt: skip
        self.prompts_per_step = prompts_per_step
        self.max_staleness = max_staleness
        self._source = source
        self._changed = threading.Condition()
        self._version = version
        self._next_index = state.next_index if state else 0
        self._again = sorted(state.outstanding) if state else []
        self._free_tickets = (max_staleness + 1) * prompts_per_step
        self._births: dict[int, int] = {}  # prompt index -> birth version, of every taken ticket
        self._finished: dict[int, RolloutGroup] = {}
        self._error: BaseException | None = None
        self._closed = False

    # -- rollout side ------------------------------------------------------------------------------

    def draw(self, most: int, *, wait: bool) -> list[Ticket]:
        """Up to `most` of the tickets that are free now, with their prompts; waits for one if `wait`."""
        with self._changed:
            while wait and self._free_tickets == 0:
                self.raise_if_over()
                self._changed.wait()
            self.raise_if_over()
            number = min(most, self._free_tickets)
            self._free_tickets -= number
            return [self._draw_one() for _ in range(number)]

    @property
    def has_tickets(self) -> bool:
        """A ticket could be drawn at once."""
        with self._changed:
            return self._free_tickets > 0

    def put(self, group: RolloutGroup) -> None:
        """Hand in the finished group of a ticket."""
        with self._changed:
            index = group.prompt.index
            if self._births.get(index) != group.birth_version:
                raise ValueError(
                    f"group of prompt {index}, born at version {group.birth_version}, has no ticket"
                )
            self._finished[index] = group
            self._changed.notify_all()

    # -- learner side ------------------------------------------------------------------------------

    def take(self, number: int | None = None) -> list[RolloutGroup]:
        """P (or `number`) finished groups in stream order; waits for them.

        The tickets of the P groups of a step stay taken until `release`. More than P in all may be taken
        for one step if the surplus is discarded first.
        """
        with self._changed:
            while (chosen := self._may_leave(number)) is None:
                self.raise_if_over()
                self._changed.wait()
            self.raise_if_over()
            groups = [self._finished.pop(index) for index in sorted(chosen)]
            for group in groups:
                staleness = self._version - self._births.pop(group.prompt.index)
                assert 0 <= staleness <= self.max_staleness, (staleness, group.prompt.index)
            return groups

    def discard(self, number: int) -> None:
        """`number` of the groups just taken are not trained on: their tickets are free at once."""
        with self._changed:
            self._free_tickets += number
            self._changed.notify_all()

    def release(self, version: int) -> None:
        """Weights `version`, trained on the groups last taken, are published: free their tickets."""
        with self._changed:
            if version != self._version + 1:
                raise ValueError(
                    f"released version {version} after {self._version}; steps by 1 only"
                )
            self._version = version
            self._free_tickets += self.prompts_per_step
            self._changed.notify_all()

    def state(self) -> BufferState:
        """Stream position and unfinished business, for a checkpoint between `release` and `take`."""
        with self._changed:
            return BufferState(
                next_index=self._next_index,
                outstanding=tuple(sorted([*self._births, *self._again])),
            )

    # -- either side -------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """Make every present and future wait raise `error`: a worker's failure reaches the main thread."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def close(self) -> None:
        """End the run: every wait raises BufferClosed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def raise_if_over(self) -> None:
        """Raise the error that another thread reported, or BufferClosed at the end of the run."""
        if self._error is not None:
            raise self._error
        if self._closed:
            raise BufferClosed

    def counts(self) -> dict[str, int]:
        """Groups being sampled or verified, and groups finished but not taken."""
        with self._changed:
            waiting = len(self._finished)
            return {"in_flight": len(self._births) - waiting, "in_queue": waiting}

    # -- inside the lock ---------------------------------------------------------------------------

    def _draw_one(self) -> Ticket:
        if self._again:
            index = self._again.pop(0)
        else:
            index, self._next_index = self._next_index, self._next_index + 1
        self._births[index] = self._version
        return Ticket(prompt=self._source.at(index), birth_version=self._version)

    def _may_leave(self, number: int | None = None) -> Sequence[int] | None:
        number = self.prompts_per_step if number is None else number
        by_age = sorted(self._finished, key=lambda index: (self._births[index], index))
        chosen = by_age[:number]
        if len(chosen) < number:
            return None
        leaving = set(chosen)
        staying = (birth for index, birth in self._births.items() if index not in leaving)
        return chosen if self._bound_can_hold(staying) else None

    def _bound_can_hold(self, births: Iterable[int]) -> bool:
        """Can groups with these births still be consumed in time, P per version from the next one on?

        A group born at b must be consumed at version b + max_staleness or before, so of those born at
        b or before there may be at most P * (b + max_staleness - current version) left.
        """
        count, left = 0, sorted(Counter(births).items())
        for birth, number in left:
            count += number
            if count > self.prompts_per_step * (birth + self.max_staleness - self._version):
                return False
        return True
