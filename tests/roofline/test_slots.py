"""Slots of a simulated rollout: counts by chunk against samples followed one by one."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from roofline.slots import Slots

GROUPS = 12


def one_by_one(
    tokens: np.ndarray, num_slots: int, chunk_steps: int, size: int
) -> list[tuple[int, int]]:
    """(groups complete, decode steps) of each chunk, every sample followed on its own."""
    waiting, left, open_of = list(enumerate(tokens.tolist())), {}, Counter()
    for sample, _ in waiting:
        open_of[sample // size] += 1
    found = []
    while waiting or left:
        while waiting and len(left) < num_slots:
            sample, length = waiting.pop(0)
            left[sample] = length
        steps = min(chunk_steps, max(left.values()))
        ended = [sample for sample, length in left.items() if length <= chunk_steps]
        left = {
            sample: length - chunk_steps for sample, length in left.items() if length > chunk_steps
        }
        before = sum(n > 0 for n in open_of.values())
        open_of.subtract(sample // size for sample in ended)
        found.append((before - sum(n > 0 for n in open_of.values()), steps))
    return found


@settings(max_examples=60, deadline=None)
@given(
    num_slots=st.integers(1, 20), chunk_steps=st.integers(1, 7), size=st.integers(1, 5),
    longest=st.integers(1, 400), seed=st.integers(0, 99),
)  # fmt: skip
def test_counts_by_chunk_are_those_of_samples_followed_one_by_one(
    num_slots: int, chunk_steps: int, size: int, longest: int, seed: int
) -> None:
    tokens = np.random.default_rng(seed).integers(1, longest + 1, GROUPS * size)
    slots, found, births = Slots(num_slots, chunk_steps, size), [], Counter()
    slots.queue(0, tokens[: 5 * size])
    slots.queue(1, tokens[5 * size :])
    while slots.enter() or slots.live:
        steps, complete = slots.steps(), slots.end_chunk()
        found.append((complete.total(), steps))
        births += complete
    assert found == one_by_one(tokens, num_slots, chunk_steps, size)
    assert births == {0: 5, 1: GROUPS - 5}


def test_enough_groups_are_wanted_to_fill_the_free_slots() -> None:
    slots = Slots(10, 4, 3)
    assert slots.wanted() == 4
    slots.queue(0, np.full(12, 5))
    assert slots.enter() == 10
    assert slots.wanted() == 0
    slots.end_chunk()
    assert slots.live == 10
    slots.end_chunk()
    assert (slots.live, slots.wanted()) == (0, 3)  # two samples still wait
