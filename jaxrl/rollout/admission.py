"""What enters slots, as padded arrays: prompts each once, samples, and the rows that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxrl.rollout.sampling import Admission, Seats

SMALLEST_BUCKET = 8
"""Prompt lengths and numbers of samples are padded to powers of two from here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the samples of a request are drawn."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Samples `sample_indices` of one prompt. `stream` names the prompt's random stream within the run."""

    stream: int
    prompt: tuple[int, ...]
    sample_indices: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Entering:
    """A sample on its way into a slot."""

    slot: int
    request: Request
    sample_index: int
    lane: int = 0
    """With shared prefixes: row * C + lane."""
    fills: bool = False
    """Its row does not hold the prompt yet."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Distinct prompts, right-padded; their keys and values under the weights in use, once made."""

    keys_values: tuple[jax.Array, jax.Array] | None
    prompts: Any  # [P, T] int32
    lengths: Any  # [P] int32
    row_of: dict[int, int]  # stream -> row


def admission_of(
    row_of: dict[int, int], entering: Sequence[Entering], *, num_slots: int, num_stop_ids: int
) -> Admission:
    """The entering samples as arrays, padded to a power of two."""
    padding = bucket(len(entering), SMALLEST_BUCKET) - len(entering)
    requests = [one.request for one in entering]
    params = [request.params for request in requests]
    stop_ids = [p.stop_ids + (-1,) * (num_stop_ids - len(p.stop_ids)) for p in params]

    def column(values: Sequence[Any], dtype: type, fill: int = 0) -> np.ndarray:
        return np.array([*values, *[fill] * padding], dtype)

    indices = column([one.sample_index for one in entering], np.uint32)
    return Admission(
        slots=column([one.slot for one in entering], np.int32, num_slots),  # past the end: dropped
        rows=column([row_of[r.stream] for r in requests], np.int32),
        stream=np.stack([column([r.stream for r in requests], np.uint32), indices], axis=1),
        max_new_tokens=column([p.max_new_tokens for p in params], np.int32),
        temperature=column([p.temperature for p in params], np.float32, 1),
        top_p=column([p.top_p for p in params], np.float32, 1),
        top_k=column([p.top_k for p in params], np.int32),
        stop_ids=np.array([*stop_ids, *[(-1,) * num_stop_ids] * padding], np.int32).reshape(
            -1, num_stop_ids
        ),
    )


def seats_of(
    row_of: dict[int, int], entering: Sequence[Entering], members: np.ndarray
) -> tuple[Seats, int]:
    """Where the entering samples read their prompts, and how many rows are filled for them.

    The rows to fill are padded to a power of two; there are none where no sample fills one.
    """
    rows, lanes = members.shape
    filling = [one for one in entering if one.fills]
    extra = bucket(len(filling), 1) - len(filling) if filling else 0
    sources = [row_of[one.request.stream] for one in filling]
    padding = bucket(len(entering), SMALLEST_BUCKET) - len(entering)
    seats = Seats(
        members=members.copy(),
        lanes=np.array([*(one.lane for one in entering), *[0] * padding], np.int32),
        filled=np.array([*(one.lane // lanes for one in filling), *[rows] * extra], np.int32),
        sources=np.array([*sources, *[0] * extra], np.int32),
    )
    return seats, len(filling)


def pad_prompts(entering: Sequence[Entering], max_prompt_tokens: int, devices: int) -> Prefilled:
    """Each distinct prompt once, tokens padded to powers of two, prompts as `prompt_bucket` says."""
    distinct = list({one.request.stream: one.request for one in entering}.values())
    longest = max(len(request.prompt) for request in distinct)
    columns = min(bucket(longest, SMALLEST_BUCKET), max_prompt_tokens)
    prompts = np.zeros((prompt_bucket(len(distinct), devices), columns), np.int32)
    lengths = np.ones(len(prompts), np.int32)
    for row, request in enumerate(distinct):
        prompts[row, : len(request.prompt)] = request.prompt
        lengths[row] = len(request.prompt)
    row_of = {request.stream: row for row, request in enumerate(distinct)}
    return Prefilled(None, prompts, lengths, row_of)


def prompt_bucket(prompts: int, devices: int) -> int:
    """Rows that a prefill of so many prompts has: one alone is prefilled by every device; more are dealt, and
    rows that `devices` did not divide would be prefilled by each of them."""
    return bucket(prompts, 1 if prompts == 1 else devices)


def bucket(number: int, smallest: int) -> int:
    """The smallest power-of-two multiple of `smallest` that holds `number`."""
    return smallest << (-(-number // smallest) - 1).bit_length()
