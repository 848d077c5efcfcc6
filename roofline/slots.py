"""Completions in the slots of a simulated rollout, counted by the chunk in which they end.

Slots are filled first come, first served, and all advance together, so a completion's last chunk is known
when it enters: counts by chunk say all, at the price of a few array operations per refill, whether it
fills one slot or a million.
"""

from __future__ import annotations

from collections import Counter, deque

import numpy as np

FIRST_CHUNKS = 64
"""Chunks that are counted ahead at first; twice as many whenever they do not reach."""


class Slots:
    """Groups of `group_size` samples that wait for slots, are in them, or end in a later chunk."""

    def __init__(self, num_slots: int, chunk_steps: int, group_size: int) -> None:
        self.live = 0
        """Slots with a completion."""
        self._num_slots, self._chunk_steps, self._group_size = num_slots, chunk_steps, group_size
        self._chunk = 0
        self._waiting = np.zeros(0, np.int64)  # tokens of samples without a slot
        self._births: deque[list[int]] = deque()  # [version, groups not yet wholly in slots]
        self._entered, self._entered_end = 0, 0  # of the group that is partly in slots
        self._ending = np.zeros(FIRST_CHUNKS, np.int64)  # samples by last chunk
        self._last_steps = np.zeros(FIRST_CHUNKS, np.int64)  # until the last of them ends
        self._complete: dict[int, np.ndarray] = {}  # groups by last chunk, of each birth version

    def wanted(self) -> int:
        """Groups that would fill the free slots."""
        short = self._num_slots - self.live - self._waiting.size
        return -(-max(0, short) // self._group_size)

    def queue(self, version: int, tokens: np.ndarray) -> None:
        """Let whole groups wait: drawn at `version`, with tokens [groups * group_size]."""
        self._births.append([version, tokens.size // self._group_size])
        self._waiting = np.concatenate([self._waiting, tokens])

    def enter(self) -> int:
        """Give free slots to the samples that waited longest; how many."""
        room = self._num_slots - self.live
        tokens, self._waiting = self._waiting[:room], self._waiting[room:]
        if tokens.size == 0:
            return 0
        self.live += tokens.size
        chunks, rest = np.divmod(tokens - 1, self._chunk_steps)
        counts = np.bincount(chunks)
        steps = np.zeros(counts.size, np.int64)
        np.maximum.at(steps, chunks, rest + 1)
        ahead = slice(self._chunk, self._chunk + counts.size)
        self._ending = _long_enough(self._ending, ahead.stop)
        self._last_steps = _long_enough(self._last_steps, ahead.stop)
        self._ending[ahead] += counts
        self._last_steps[ahead] = np.maximum(self._last_steps[ahead], steps)
        self._close_groups(self._chunk + chunks)
        return tokens.size

    def steps(self) -> int:
        """Decode steps of this chunk: fewer than all where the last completion ends."""
        if self._ending[self._chunk] == self.live:
            return int(self._last_steps[self._chunk])
        return self._chunk_steps

    def end_chunk(self) -> Counter[int]:
        """Free the slots of what ended; complete groups by birth version."""
        self.live -= int(self._ending[self._chunk])
        complete: Counter[int] = Counter()
        for version, groups in self._complete.items():
            if self._chunk < groups.size and groups[self._chunk]:
                complete[version] = int(groups[self._chunk])
        self._chunk += 1
        self._ending = _long_enough(self._ending, self._chunk + 1)
        self._last_steps = _long_enough(self._last_steps, self._chunk + 1)
        return complete

    def _close_groups(self, ends: np.ndarray) -> None:
        """Count groups whose samples are all in slots: each ends with the last of them."""
        size = self._group_size
        if self._entered:
            ends = np.concatenate([np.full(self._entered, self._entered_end), ends])
        whole = ends.size // size
        closed = ends[: whole * size].reshape(whole, size).max(axis=1)
        partly = ends[whole * size :]
        self._entered, self._entered_end = partly.size, int(partly.max(initial=0))
        while closed.size:
            version, groups = self._births[0]
            part, closed = closed[:groups], closed[groups:]
            self._births[0][1] -= part.size
            if self._births[0][1] == 0:
                self._births.popleft()
            counts = np.bincount(part)
            known = self._complete.get(version, np.zeros(FIRST_CHUNKS, np.int64))
            known = self._complete[version] = _long_enough(known, counts.size)
            known[: counts.size] += counts


def _long_enough(counts: np.ndarray, size: int) -> np.ndarray:
    """The counts, with zeros behind them where there are fewer than `size`."""
    if counts.size >= size:
        return counts
    return np.concatenate([counts, np.zeros(max(size, 2 * counts.size) - counts.size, np.int64)])
