"""Where the tokens of sequences go in packed rows. Depends on nothing but the arguments.

Without shared prompts whole sequences go first-fit-decreasing into rows. With them (`models.rows`) a
row takes the prompt of a group once and the rest of its sequences part by part; a group that does not
fit one row has its prompt again in the next. N sequences, T tokens of one, M positions taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxrl.errors import UserError
from models.first_fit import first_fit_decreasing
from models.rows import SharedPrompts


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Indices between the tokens of all sequences, one after another in `order`, and the flattened rows."""

    order: np.ndarray  # [N] sequences
    sources: np.ndarray  # [M] tokens that are put in
    spots: np.ndarray  # [M] positions they are put at
    segments: np.ndarray  # [M] from 1 within the row
    prefixes: np.ndarray | None  # [M] segment of the shared prompt before them, 0 none
    positions: np.ndarray  # [M] from 0 within the sequence
    target_sources: np.ndarray  # tokens that are predicted
    target_spots: np.ndarray  # positions that predict them
    num_rows: int


def lay_out(
    tokens: Sequence[np.ndarray], prompt_lengths: np.ndarray, row_tokens: int,
    shared: SharedPrompts | None,
) -> Layout:  # fmt: skip
    """The layout of N sequences of tokens [T] in rows of row_tokens.

    Args:
        tokens: int32 [T] each, none empty.
        prompt_lengths: [N] tokens of each before its first target; at least 1.
        row_tokens: length of a row, the prompts in front included.
        shared: how a row is divided; None: whole sequences.

    Raises:
        UserError: a sequence does not fit.
    """
    lengths = np.array([len(one) for one in tokens], np.int64)
    if shared is None:
        _check_fits(lengths, row_tokens, "a training sequence", "train.row_tokens")
        return _whole(lengths, row_tokens)
    part = shared.part_tokens(row_tokens)
    _check_fits(lengths - prompt_lengths, part, "a completion", "each part of train.row_tokens")
    room = "train.shared_prompt_tokens"
    _check_fits(prompt_lengths - 1, shared.prompt_tokens, "the shared part of a prompt", room)
    return _sharing(tokens, lengths, prompt_lengths, row_tokens, shared)


def _check_fits(lengths: np.ndarray, room: int, what: str, where: str) -> None:
    longest = int(lengths.max())
    if longest > room:
        raise UserError(
            f"{what} has {longest} tokens, but {where}={room}; set {where} to at least {longest}, or "
            "shorten rollout.max_prompt_tokens or rollout.max_new_tokens"
        )


def _whole(lengths: np.ndarray, row_tokens: int) -> Layout:
    row_of, order = first_fit_decreasing(lengths, row_tokens)
    by_row = order[np.argsort(row_of[order], kind="stable")]
    placed, rows = lengths[by_row], row_of[by_row]
    starts = np.cumsum(placed) - placed
    first_of_row = np.searchsorted(rows, rows)
    positions = np.arange(int(placed.sum())) - np.repeat(starts, placed)
    within_row = starts - starts[first_of_row]
    spots = np.repeat(rows * row_tokens + within_row, placed) + positions
    predicted = np.flatnonzero(positions > 0)
    return Layout(
        order=by_row,
        sources=np.arange(len(positions)),
        spots=spots,
        segments=np.repeat(np.arange(len(rows)) - first_of_row + 1, placed),
        prefixes=None,
        positions=positions,
        target_sources=predicted,
        target_spots=spots[predicted] - 1,
        num_rows=int(rows[-1]) + 1,
    )


@dataclass(kw_only=True, slots=True)
class _Row:
    """A row being filled: the next free position of its prompts and of each part, and their ends."""

    prompt_at: int
    prompt_end: int
    at: list[int]
    ends: list[int]
    segments: int = 0

    @property
    def free(self) -> int:
        """Positions left in all parts."""
        return sum(self.ends) - sum(self.at)

    def takes(self, lengths: Sequence[int]) -> list[int] | None:
        """The part for each length, first fit in the given order; None where one finds no room."""
        at, chosen = list(self.at), []
        for length in lengths:
            part = next((i for i, end in enumerate(self.ends) if end - at[i] >= length), None)
            if part is None:
                return None
            at[part] += length
            chosen.append(part)
        return chosen


@dataclass(frozen=True, slots=True)
class _Run:
    """`size` tokens of a sequence, from its token `first`, at the flattened positions from `spot`."""

    sequence: int
    first: int
    size: int
    spot: int
    segment: int
    prefix: int
    predicts: bool


def _sharing(
    tokens: Sequence[np.ndarray], lengths: np.ndarray, prompt_lengths: np.ndarray, row_tokens: int,
    shared: SharedPrompts,
) -> Layout:  # fmt: skip
    """Groups of one prompt, those with most tokens first; each whole into the first row that takes it."""
    part = shared.part_tokens(row_tokens)
    own = lengths - prompt_lengths
    groups: dict[bytes, list[int]] = {}
    for n, one in enumerate(tokens):
        groups.setdefault(one[: prompt_lengths[n] - 1].tobytes(), []).append(n)
    members = [sorted(group, key=lambda n: -own[n]) for group in groups.values()]
    members.sort(key=lambda group: -own[group].sum())
    rows: list[_Row] = []
    runs: list[_Run] = []
    for group in members:
        prompt, left = int(prompt_lengths[group[0]]) - 1, group
        while left:
            row, parts = _row_for(
                rows, prompt, [int(own[n]) for n in left], part, row_tokens, shared
            )
            runs += _place(row, left[: len(parts)], parts, prompt, own)
            left = left[len(parts) :]
    return _gathered(runs, lengths, len(rows))


def _row_for(
    rows: list[_Row], prompt: int, lengths: list[int], part: int, row_tokens: int, shared: SharedPrompts
) -> tuple[_Row, list[int]]:  # fmt: skip
    """A row that takes all lengths, or a new one, and the parts of as many as it takes."""
    total = sum(lengths)
    for row in rows:
        if row.prompt_end - row.prompt_at >= prompt and row.free >= total:
            parts = row.takes(lengths)
            if parts is not None:
                return row, parts
    start = len(rows) * row_tokens
    end = start + shared.prompt_tokens
    ends = [end + (i + 1) * part for i in range(shared.parts)]
    row = _Row(prompt_at=start, prompt_end=end, at=[e - part for e in ends], ends=ends)
    rows.append(row)
    taken = next(n for n in range(len(lengths), 0, -1) if row.takes(lengths[:n]) is not None)
    return row, row.takes(lengths[:taken]) or []


def _place(
    row: _Row, group: Sequence[int], parts: Sequence[int], prompt: int, own: np.ndarray
) -> list[_Run]:
    """The prompt of `group` once, then the rest of each of its sequences."""
    runs, prefix = [], 0
    if prompt:
        row.segments += 1
        prefix = row.segments
        runs.append(
            _Run(group[0], 0, prompt, row.prompt_at, segment=prefix, prefix=0, predicts=False)
        )
        row.prompt_at += prompt
    for n, part in zip(group, parts, strict=True):
        row.segments += 1
        size = int(own[n])
        runs.append(
            _Run(n, prompt, size, row.at[part], segment=row.segments, prefix=prefix, predicts=True)
        )
        row.at[part] += size
    return runs


def _gathered(runs: list[_Run], lengths: np.ndarray, num_rows: int) -> Layout:
    begins = np.cumsum(lengths) - lengths
    sizes = np.array([run.size for run in runs])

    def each(values: list[int]) -> np.ndarray:
        return np.repeat(np.array(values, np.int64), sizes)

    within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    positions = each([run.first for run in runs]) + within
    sources = each([int(begins[run.sequence]) for run in runs]) + positions
    spots = each([run.spot for run in runs]) + within
    predicts = each([run.predicts for run in runs]) > 0
    return Layout(
        order=np.arange(len(lengths)),
        sources=sources,
        spots=spots,
        segments=each([run.segment for run in runs]),
        prefixes=each([run.prefix for run in runs]),
        positions=positions,
        target_sources=sources[predicts] + 1,
        target_spots=spots[predicts],
        num_rows=num_rows,
    )
