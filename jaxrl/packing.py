"""From rollouts and solutions to packed micro-batches of constant shape, on the host.

Rows are filled first-fit-decreasing; the result depends on nothing but the arguments. R rows,
T tokens (of a row or a sequence), P prompts, G samples per prompt, N sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from jaxrl.algorithms.advantages import group_advantages, selected_samples
from jaxrl.algorithms.aggregation import token_weights
from jaxrl.algorithms.rewards import correctness, shaped_rewards, without_signal
from jaxrl.batch import Batch
from jaxrl.config import GrpoConfig
from jaxrl.errors import UserError
from jaxrl.types import Finish, RolloutGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSequence:
    """One prompt with its completion. Entry t speaks of token t; entry 0 is never trained on."""

    tokens: np.ndarray  # [T] int32
    loss_mask: np.ndarray  # [T] bool
    sampler_logprobs: np.ndarray  # [T] float32, 0 outside loss_mask
    advantages: np.ndarray  # [T] float32, 0 outside loss_mask
    token_weights: np.ndarray  # [T] float32, 0 outside loss_mask
    group: int = 0
    """Position of its group in the batch."""
    reward: float = 0.0
    """Of the whole completion, after shaping."""
    learner_logprobs: np.ndarray | None = None  # [T] float32; these five as in Batch
    learner_entropy: np.ndarray | None = None  # [T] float32
    reference_logprobs: np.ndarray | None = None  # [T] float32
    values: np.ndarray | None = None  # [T] float32
    returns: np.ndarray | None = None  # [T] float32


_SCORES = ("learner_logprobs", "learner_entropy", "reference_logprobs", "values", "returns")


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingStats:
    """How well the sequences filled the micro-batches."""

    padding_ratio: float
    """Positions without a token / all positions of all micro-batches, empty rows included."""
    rows: int
    """Rows that hold a sequence."""
    microbatches: int
    tokens: int
    """Tokens of all sequences."""
    loss_tokens: int
    """Those trained on."""


def _first_fit_decreasing(lengths: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Row of each sequence [N], and the order of placement [N]: longest first, ties by position."""
    order = np.argsort(-lengths, kind="stable")
    free = np.full(len(lengths), row_tokens, dtype=np.int64)
    rows = np.zeros(len(lengths), dtype=np.int64)
    opened = 1
    for n in order:
        fits = free[:opened] >= lengths[n]
        row = int(fits.argmax())
        if not fits[row]:
            row = opened
            opened += 1
        rows[n] = row
        free[row] -= lengths[n]
    return rows, order


def _checked_lengths(sequences: Sequence[TrainSequence], row_tokens: int) -> np.ndarray:
    """[N] tokens of each sequence; raises on what cannot be packed or trained on."""
    lengths = np.array([len(s.tokens) for s in sequences], dtype=np.int64)
    longest = int(lengths.max())
    if longest > row_tokens:
        raise UserError(
            f"a training sequence has {longest} tokens, but train.row_tokens={row_tokens}; set "
            f"train.row_tokens to at least {longest}, or shorten rollout.max_prompt_tokens or "
            "rollout.max_new_tokens"
        )
    unpredicted = [n for n, s in enumerate(sequences) if not len(s.tokens) or s.loss_mask[0]]
    if unpredicted:
        raise UserError(
            f"training sequences {unpredicted[:5]} have an empty prompt, so that no input predicts "
            "their first token; give each prompt at least one token, for instance a BOS token"
        )
    return lengths


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Where the tokens of all sequences go. M tokens in all, in the order of the rows."""

    sequence_order: np.ndarray  # [N] sequences row by row, in order of placement
    spots: np.ndarray  # [M] index into the flattened rows
    segments: np.ndarray  # [M] from 1 within the row
    positions: np.ndarray  # [M] from 0 within the sequence
    num_rows: int


def _lay_out(lengths: np.ndarray, row_tokens: int) -> _Layout:
    row_of, order = _first_fit_decreasing(lengths, row_tokens)
    by_row = order[np.argsort(row_of[order], kind="stable")]
    placed, rows = lengths[by_row], row_of[by_row]
    starts = np.cumsum(placed) - placed
    first_of_row = np.searchsorted(rows, rows)
    positions = np.arange(int(placed.sum())) - np.repeat(starts, placed)
    within_row = starts - starts[first_of_row]
    return _Layout(
        sequence_order=by_row,
        spots=np.repeat(rows * row_tokens + within_row, placed) + positions,
        segments=np.repeat(np.arange(len(rows)) - first_of_row + 1, placed),
        positions=positions,
        num_rows=int(rows[-1]) + 1,
    )


def pack(
    sequences: Sequence[TrainSequence], *, row_tokens: int, rows_per_microbatch: int
) -> tuple[list[Batch], PackingStats]:
    """Packs sequences into rows and rows into micro-batches, the last one filled with empty rows.

    Per-token fields move from the token they speak of to the position that predicts it.

    Args:
        sequences: N sequences, each at most row_tokens long; their token_weights are final.
        row_tokens: T.
        rows_per_microbatch: R.

    Returns:
        (micro-batches of numpy arrays [R, T], statistics); no micro-batch without sequences.

    Raises:
        UserError: a sequence is longer than row_tokens, or has an empty prompt.
    """
    if not sequences:
        return [], PackingStats(padding_ratio=0.0, rows=0, microbatches=0, tokens=0, loss_tokens=0)
    layout = _lay_out(_checked_lengths(sequences, row_tokens), row_tokens)
    num_microbatches = -(-layout.num_rows // rows_per_microbatch)
    arrays = _fields(sequences, layout, (num_microbatches, rows_per_microbatch, row_tokens))
    batches = [
        Batch(**{k: array[m] for k, array in arrays.items()}) for m in range(num_microbatches)
    ]
    num_tokens = len(layout.spots)
    return batches, PackingStats(
        padding_ratio=1.0 - num_tokens / arrays["tokens"].size,
        rows=layout.num_rows,
        microbatches=num_microbatches,
        tokens=num_tokens,
        loss_tokens=int(arrays["loss_mask"].sum()),
    )


def _fields(
    sequences: Sequence[TrainSequence], layout: _Layout, shape: tuple[int, int, int]
) -> dict[str, np.ndarray]:
    """The fields of Batch for all micro-batches, each of the given shape."""
    predicted = layout.positions > 0

    def lay(values: np.ndarray, spots: np.ndarray, dtype: DTypeLike) -> np.ndarray:
        flat = np.zeros(shape[0] * shape[1] * shape[2], dtype=dtype)
        flat[spots] = values
        return flat.reshape(shape)

    def join(name: str) -> np.ndarray:
        return np.concatenate([getattr(sequences[n], name) for n in layout.sequence_order])

    def of_target(values: np.ndarray, dtype: DTypeLike) -> np.ndarray:
        return lay(values[predicted], layout.spots[predicted] - 1, dtype)

    tokens = join("tokens")
    return {
        "tokens": lay(tokens, layout.spots, np.int32),
        "segment_ids": lay(layout.segments, layout.spots, np.int32),
        "positions": lay(layout.positions, layout.spots, np.int32),
        "targets": of_target(tokens, np.int32),
        "loss_mask": of_target(join("loss_mask"), np.bool_),
        "token_weights": of_target(join("token_weights"), np.float32),
        "advantages": of_target(join("advantages"), np.float32),
        "sampler_logprobs": of_target(join("sampler_logprobs"), np.float32),
    } | {
        name: of_target(join(name), np.float32)
        for name in _SCORES
        if getattr(sequences[0], name) is not None
    }


def unpack(
    sequences: Sequence[TrainSequence], scores: Sequence[np.ndarray], *, row_tokens: int
) -> list[np.ndarray]:
    """What the positions of packed micro-batches say of each sequence's tokens: the inverse of `pack`.

    Args:
        sequences: N sequences as they were given to `pack`.
        scores: [R, T] float32 of each micro-batch, position t speaking of its target.
        row_tokens: as given to `pack`.

    Returns:
        N arrays [T] float32; entry t speaks of token t, and is 0 outside loss_mask.
    """
    layout = _lay_out(_checked_lengths(sequences, row_tokens), row_tokens)
    flat = np.concatenate([np.asarray(score, np.float32).ravel() for score in scores])
    of_tokens = np.where(layout.positions > 0, flat[np.maximum(layout.spots - 1, 0)], 0.0)
    parts: dict[int, np.ndarray] = {}
    start = 0
    for n in layout.sequence_order:
        size = len(sequences[n].tokens)
        values = of_tokens[start : start + size]
        parts[n] = np.where(sequences[n].loss_mask, values, 0.0).astype(np.float32)
        start += size
    return [parts[n] for n in range(len(sequences))]


def groups_to_sequences(
    groups: Sequence[RolloutGroup], settings: GrpoConfig, max_new_tokens: int
) -> tuple[list[TrainSequence], dict[str, float]]:
    """Advantages, filters and token weights of one optimizer batch of complete groups.

    Groups without signal are left out if settings.drop_zero_advantage; completions that hit the
    limit are left out of the loss (not of the group's baseline) if settings.mask_truncated. Neither
    is in any denominator (the latter with settings.count_masked).

    Args:
        groups: P groups, all of the same G.
        settings: advantage, aggregation and filters.
        max_new_tokens: longest completion; the divisor of constant aggregation [tokens].

    Returns:
        (sequences to train on, curves over ALL samples); no sequence if every sample was left out.
        advantage/abs_mean is over the sequences trained on.
    """
    if not groups:
        return [], {}
    rewards = shaped_rewards(groups, settings, max_new_tokens)
    lengths = np.array([[len(r.completion.tokens) for r in group.rollouts] for group in groups])
    truncated = np.array(
        [[r.completion.finish is Finish.LENGTH for r in group.rollouts] for group in groups]
    )
    flat = without_signal(groups, rewards, settings)
    dropped = flat & settings.drop_zero_advantage
    counted = ~dropped[:, None] & selected_samples(
        rewards, correctness(groups), settings.keep_samples
    )
    masked = truncated & counted & settings.mask_truncated
    keep = counted & ~masked
    advantages = np.zeros(rewards.shape)
    if not dropped.all():
        advantages[~dropped] = _advantages(rewards[~dropped], settings)
    weights = np.zeros(rewards.shape)
    enters = counted if settings.count_masked else keep
    weights[enters] = token_weights(
        np.where(keep, lengths, 0)[enters],
        np.argwhere(enters)[:, 0],
        mode=settings.aggregation,
        constant=float(max_new_tokens),
        count_empty=settings.count_masked,
    )
    sequences = [
        _sequence(
            groups[p], g, p, float(advantages[p, g]), float(weights[p, g]), float(rewards[p, g])
        )
        for p, g in np.argwhere(keep)
    ]
    return sequences, {
        **_reward_metrics(groups, rewards),
        **_completion_metrics(groups, lengths, truncated),
        "filter/dropped_groups": float(dropped.sum()),
        "filter/frac_reward_zero_std": float(flat.mean()),
        "filter/masked_truncated": float(masked.sum()),
        "advantage/abs_mean": float(np.abs(advantages[keep]).mean()) if keep.any() else 0.0,
    }


def _advantages(rewards: np.ndarray, settings: GrpoConfig) -> np.ndarray:
    """What rewards [P, G] alone decide; token and minibatch spreads and values come later."""
    scale = settings.advantage_scale
    return group_advantages(
        rewards,
        baseline="none" if settings.advantage_baseline == "value" else settings.advantage_baseline,
        scale="none" if scale == "minibatch_std" or scale == "token_std" else scale,
        eps=settings.advantage_eps,
        ddof=settings.advantage_ddof,
    )


def _sequence(
    group: RolloutGroup, g: int, position: int, advantage: float, weight: float, reward: float
) -> TrainSequence:
    """Sample g of the group at `position`; every generated token has loss."""
    completion = group.rollouts[g].completion
    prompt = np.asarray(group.prompt.tokens, dtype=np.int32)
    size = len(completion.tokens)
    mask = np.concatenate([np.zeros(len(prompt), bool), np.ones(size, bool)])
    return TrainSequence(
        tokens=np.concatenate([prompt, completion.tokens]).astype(np.int32),
        loss_mask=mask,
        sampler_logprobs=np.concatenate(
            [np.zeros(len(prompt), np.float32), completion.sampler_logprobs]
        ).astype(np.float32),
        advantages=np.where(mask, np.float32(advantage), np.float32(0)),
        token_weights=np.where(mask, np.float32(weight), np.float32(0)),
        group=position,
        reward=reward,
    )


def _reward_metrics(groups: Sequence[RolloutGroup], rewards: np.ndarray) -> dict[str, float]:
    """Over all samples; a part that a sample does not name is not in that part's mean."""
    rollouts = [r for group in groups for r in group.rollouts]
    parts: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, value in rollout.reward.parts.items():
            parts.setdefault(name, []).append(value)
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/min": float(rewards.min()),
        "reward/max": float(rewards.max()),
        "train/accuracy": float(np.mean([r.reward.correct for r in rollouts])),
    } | {f"reward/{name}/mean": float(np.mean(values)) for name, values in sorted(parts.items())}


def _completion_metrics(
    groups: Sequence[RolloutGroup], lengths: np.ndarray, truncated: np.ndarray
) -> dict[str, float]:
    """Lengths in tokens over all samples; mean_terminated_length is 0 if none ended by itself."""
    terminated = lengths[~truncated]
    return {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(truncated.mean()),
        "completions/mean_terminated_length": float(terminated.mean()) if terminated.size else 0.0,
        "prompt_length/mean": float(np.mean([len(group.prompt.tokens) for group in groups])),
    }


def solutions_to_sequences(
    prompt_tokens: Sequence[Sequence[int]], solution_tokens: Sequence[Sequence[int]]
) -> list[TrainSequence]:
    """Prompts with worked solutions, for supervised training: loss on the solution tokens.

    Args:
        prompt_tokens: N prompts, each with at least one token.
        solution_tokens: N solutions, the stop token included.

    Returns:
        N sequences whose token_weights are 1 / (solution tokens of all N), a token mean; advantages
        and log-probabilities are 0.
    """
    total = sum(len(solution) for solution in solution_tokens)
    sequences = []
    for prompt, solution in zip(prompt_tokens, solution_tokens, strict=True):
        tokens = np.concatenate([np.asarray(prompt, np.int32), np.asarray(solution, np.int32)])
        mask = np.arange(len(tokens)) >= len(prompt)
        zeros = np.zeros(len(tokens), np.float32)
        sequences.append(
            TrainSequence(
                tokens=tokens,
                loss_mask=mask,
                sampler_logprobs=zeros,
                advantages=zeros,
                token_weights=mask.astype(np.float32) / np.float32(max(total, 1)),
            )
        )
    return sequences
