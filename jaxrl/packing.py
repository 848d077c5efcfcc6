"""From rollouts and solutions to packed micro-batches of constant shape, on the host.

Where tokens go is `jaxrl.row_layout`'s to say; the result depends on nothing but the arguments. R rows,
T tokens (of a row or a sequence), P prompts, G samples per prompt, N sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from jaxrl.algorithms.advantages import group_advantages, selected_samples
from jaxrl.algorithms.aggregation import token_weights
from jaxrl.algorithms.rewards import correctness, shaped_rewards, without_signal
from jaxrl.batch import Batch
from jaxrl.config import GrpoConfig
from jaxrl.errors import UserError
from jaxrl.row_layout import Layout, lay_out
from jaxrl.types import Finish, RolloutGroup
from models.rows import SharedPrompts


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
    kept: np.ndarray | None = None
    """[T] bool, the loss tokens that rejection sampling keeps; None: all. The others have weight 0."""

    @property
    def counted(self) -> np.ndarray:
        """[T] bool, the loss tokens in denominators and spreads."""
        return self.loss_mask if self.kept is None else self.kept


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


def _layout(
    sequences: Sequence[TrainSequence], row_tokens: int, shared: SharedPrompts | None
) -> Layout:
    """Raises UserError on what cannot be packed or trained on."""
    unpredicted = [n for n, s in enumerate(sequences) if not len(s.tokens) or s.loss_mask[0]]
    if unpredicted:
        raise UserError(
            f"training sequences {unpredicted[:5]} have an empty prompt, so that no input predicts "
            "their first token; give each prompt at least one token, for instance a BOS token"
        )
    prompts = [int(s.loss_mask.argmax()) or len(s.tokens) for s in sequences]
    return lay_out([s.tokens for s in sequences], np.array(prompts), row_tokens, shared)


def pack(
    sequences: Sequence[TrainSequence], *, row_tokens: int, rows_per_microbatch: int,
    shared: SharedPrompts | None = None,
) -> tuple[list[Batch], PackingStats]:  # fmt: skip
    """Packs sequences into rows and rows into micro-batches, the last one filled with empty rows.

    Per-token fields move from the token they speak of to the position that predicts it.

    Args:
        sequences: N sequences, each at most row_tokens long; their token_weights are final.
        row_tokens: T.
        rows_per_microbatch: R.
        shared: how rows are divided where sequences share their prompts; None: they do not.

    Returns:
        (micro-batches of numpy arrays [R, T], statistics); no micro-batch without sequences.

    Raises:
        UserError: a sequence is longer than row_tokens, or has an empty prompt.
    """
    if not sequences:
        return [], PackingStats(padding_ratio=0.0, rows=0, microbatches=0, tokens=0, loss_tokens=0)
    layout = _layout(sequences, row_tokens, shared)
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
    sequences: Sequence[TrainSequence], layout: Layout, shape: tuple[int, int, int]
) -> dict[str, np.ndarray]:
    """The fields of Batch for all micro-batches, each of the given shape."""

    def lay(values: np.ndarray, spots: np.ndarray, dtype: DTypeLike) -> np.ndarray:
        flat = np.zeros(shape[0] * shape[1] * shape[2], dtype=dtype)
        flat[spots] = values
        return flat.reshape(shape)

    def join(name: str) -> np.ndarray:
        return np.concatenate([getattr(sequences[n], name) for n in layout.order])

    def of_input(values: np.ndarray) -> np.ndarray:
        return lay(values, layout.spots, np.int32)

    def of_target(values: np.ndarray, dtype: DTypeLike) -> np.ndarray:
        return lay(values[layout.target_sources], layout.target_spots, dtype)

    tokens = join("tokens")
    fields = {
        "tokens": of_input(tokens[layout.sources]),
        "segment_ids": of_input(layout.segments),
        "positions": of_input(layout.positions),
        "targets": of_target(tokens, np.int32),
        "loss_mask": of_target(join("loss_mask"), np.bool_),
        "token_weights": of_target(join("token_weights"), np.float32),
        "advantages": of_target(join("advantages"), np.float32),
        "sampler_logprobs": of_target(join("sampler_logprobs"), np.float32),
    }
    if layout.prefixes is not None:
        fields["prefix_ids"] = of_input(layout.prefixes)
    scores = [name for name in _SCORES if getattr(sequences[0], name) is not None]
    return fields | {name: of_target(join(name), np.float32) for name in scores}


def unpack(
    sequences: Sequence[TrainSequence], scores: Sequence[np.ndarray], *, row_tokens: int,
    shared: SharedPrompts | None = None,
) -> list[np.ndarray]:  # fmt: skip
    """What the positions of packed micro-batches say of each sequence's tokens: the inverse of `pack`.

    Args:
        sequences: N sequences as they were given to `pack`.
        scores: [R, T] float32 of each micro-batch, position t speaking of its target.
        row_tokens: as given to `pack`.
        shared: as given to `pack`.

    Returns:
        N arrays [T] float32; entry t speaks of token t, and is 0 outside loss_mask.
    """
    layout = _layout(sequences, row_tokens, shared)
    flat = np.concatenate([np.asarray(score, np.float32).ravel() for score in scores])
    lengths = [len(sequences[n].tokens) for n in layout.order]
    of_tokens = np.zeros(sum(lengths), np.float32)
    of_tokens[layout.target_sources] = flat[layout.target_spots]
    parts = np.split(of_tokens, np.cumsum(lengths)[:-1])
    by_sequence = dict(zip(layout.order.tolist(), parts, strict=True))
    return [np.where(s.loss_mask, by_sequence[n], np.float32(0)) for n, s in enumerate(sequences)]


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
    completion, prompt = group.rollouts[g].completion, group.prompt.tokens
    start, size = len(prompt), len(prompt) + len(completion.tokens)

    def of_completion(values: ArrayLike, dtype: DTypeLike) -> np.ndarray:
        whole = np.zeros(size, dtype)
        whole[start:] = values
        return whole

    tokens = of_completion(completion.tokens, np.int32)
    tokens[:start] = prompt
    return TrainSequence(
        tokens=tokens,
        loss_mask=of_completion(True, np.bool_),
        sampler_logprobs=of_completion(completion.sampler_logprobs, np.float32),
        advantages=of_completion(advantage, np.float32),
        token_weights=of_completion(weight, np.float32),
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
