"""Which slot reads which row of prompts: the host's side of `models.prefixes`. No thread, no device.

A row belongs to one prompt as long as a slot reads it, and may take more of its samples until the weights
change or another prompt needs the room. Slots and rows are dealt to devices in equal runs; a slot reads rows
of its own device only, so a prompt may stand in several rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from models.rows import PrefixRows


@dataclass(frozen=True, kw_only=True, slots=True)
class MovedRows:
    """A table after a move, as arrays of `models.prefixes.Prefixes`."""

    sources: np.ndarray  # [R'] int32, the row that each was; -1: none
    members: np.ndarray  # [R', C] int32
    lanes: np.ndarray  # [B'] int32


class RowTable:
    """Slots in lanes of rows."""

    def __init__(self, table: PrefixRows, slots: int, devices: int) -> None:
        """devices: parts of the mesh that slots and rows are split over; divides both."""
        self._table, self._devices, self._none = table, devices, slots
        self._most_rows = table.rows
        self.members = np.full((table.rows, table.lanes), slots, np.int32)
        """[R, C] slot in each lane; `slots` where there is none."""
        self._slots_per_device, self._rows_per_device = slots // devices, table.rows // devices
        self._live = np.zeros(table.rows, np.int32)
        self._held: dict[int, int] = {}  # row -> stream, under the weights in use
        self._rows: dict[int, list[int]] = {}  # stream -> rows
        self._lane_of: dict[int, tuple[int, int]] = {}

    @property
    def has_room(self) -> bool:
        """Whether a prompt that stands in no row could enter one."""
        return bool((self._live == 0).any())

    def has_lane(self, stream: int) -> bool:
        """Whether one more sample of the prompt could read a row that holds it."""
        lanes = self.members.shape[1]
        return any(self._live[row] < lanes for row in self._rows.get(stream, ()))

    def seat(self, stream: int, slot: int) -> tuple[int, bool] | None:
        """(lane of `slot`, whether its row must first be filled), or None if its device has no row left."""
        device = slot // self._slots_per_device
        row, fills = self._row_with_room(stream, device), False
        if row is None:
            first = device * self._rows_per_device
            free = np.flatnonzero(self._live[first : first + self._rows_per_device] == 0) + first
            if not len(free):
                return None
            row, fills = min(map(int, free), key=lambda one: one in self._held), True
            self._give(row, stream)
        column = int(np.flatnonzero(self.members[row] == self._none)[0])
        self._sit(slot, row, column)
        return row * self.members.shape[1] + column, fills

    def leave(self, slot: int) -> None:
        """The sample in `slot` has ended."""
        row, column = self._lane_of.pop(slot)
        self.members[row, column] = self._none
        self._live[row] -= 1

    def forget(self) -> None:
        """The weights changed: rows serve the samples that read them, and no new ones."""
        self._held.clear()
        self._rows.clear()

    def moved(self, slots: Mapping[int, int], num_slots: int) -> tuple[RowTable, MovedRows]:
        """The same readers in a table for another number of slots, which has a row for each at most.

        slots: the new one of every slot that reads a row, on its device. Rows without a reader are forgotten.
        """
        rows, lanes = min(self._most_rows, num_slots), self._table.lanes
        made = RowTable(replace(self._table, rows=rows), num_slots, self._devices)
        made._most_rows = self._most_rows
        sources = np.full(rows, -1, np.int32)
        for device in range(self._devices):
            first = device * self._rows_per_device
            read = np.flatnonzero(self._live[first : first + self._rows_per_device]) + first
            for new, row in enumerate(read.tolist(), device * made._rows_per_device):
                sources[new] = row
                if row in self._held:
                    made._give(new, self._held[row])
                for column in np.flatnonzero(self.members[row] != self._none).tolist():
                    made._sit(slots[int(self.members[row, column])], new, column)
        of_slots = np.zeros(num_slots, np.int32)
        for slot, (row, column) in made._lane_of.items():
            of_slots[slot] = row * lanes + column
        return made, MovedRows(sources=sources, members=made.members.copy(), lanes=of_slots)

    def _sit(self, slot: int, row: int, column: int) -> None:
        self.members[row, column] = slot
        self._live[row] += 1
        self._lane_of[slot] = row, column

    def _row_with_room(self, stream: int, device: int) -> int | None:
        lanes = self.members.shape[1]
        fitting = (
            row
            for row in self._rows.get(stream, ())
            if row // self._rows_per_device == device and self._live[row] < lanes
        )
        return next(fitting, None)

    def _give(self, row: int, stream: int) -> None:
        before = self._held.pop(row, None)
        if before is not None:
            self._rows[before].remove(row)
        self._held[row] = stream
        self._rows.setdefault(stream, []).append(row)
