"""Which packed row takes which sequence, longest first: what the learner does and a plan counts on."""

from __future__ import annotations

import numpy as np

from models.rows import MAX_SEGMENTS


def first_fit_decreasing(lengths: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Row of each sequence [N], and the order of placement [N]: longest first, ties by position.

    A row takes MAX_SEGMENTS - 1 sequences at most.
    """
    order = np.argsort(-lengths, kind="stable")
    free = np.full(len(lengths), row_tokens, dtype=np.int64)
    rows, places = np.zeros(len(lengths), dtype=np.int64), np.full(len(lengths), MAX_SEGMENTS - 1)
    opened = 1
    for n in order:
        fits = free[:opened] >= lengths[n]
        row = int(fits.argmax())
        if not fits[row]:
            row = opened
            opened += 1
        rows[n] = row
        places[row] -= 1
        free[row] = free[row] - lengths[n] if places[row] else 0
    return rows, order
