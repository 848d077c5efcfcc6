"""From groups of rollouts to the micro-batches of every optimizer update of one step.

    groups --> rewards, group advantages, filters          (jaxrl.packing, from the rewards alone)
           --> scores under the weights before the first update      only where something needs them
           --> what rejection sampling keeps, of stored log-probabilities alone
           --> advantages per token: KL in the reward, critic, token spread
           --> minibatches of whole groups, their spreads, tokens of high entropy and denominators
           --> packed micro-batches

Every denominator, quantile and spread is over a whole batch or minibatch, never over a micro-batch.
Minibatches are made in the order of the groups, the same in every epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from jaxrl.algorithms.advantages import (
    discounted_returns,
    gae,
    group_advantages,
    high_entropy_mask,
    masked_moments,
    token_rewards,
    whiten,
)
from jaxrl.algorithms.aggregation import token_weights
from jaxrl.algorithms.config import GrpoConfig
from jaxrl.algorithms.contradictions import GROUP_BASELINES
from jaxrl.algorithms.kl import adapted_kl_weight, host_kl
from jaxrl.algorithms.loss import kept_tokens
from jaxrl.batch import Batch
from jaxrl.learner.learner import Scores
from jaxrl.packing import PackingStats, TrainSequence, groups_to_sequences, pack, unpack
from jaxrl.types import RolloutGroup
from models.rows import SharedPrompts

Curves = dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The shape of a micro-batch and the limit of a completion."""

    row_tokens: int
    rows_per_microbatch: int
    max_new_tokens: int
    shared: SharedPrompts | None = None
    """How a row is divided where samples share their prompts."""

    def pack(self, sequences: Sequence[TrainSequence]) -> tuple[list[Batch], PackingStats]:
        """Micro-batches of this shape."""
        return pack(
            sequences, row_tokens=self.row_tokens, rows_per_microbatch=self.rows_per_microbatch,
            shared=self.shared,
        )  # fmt: skip


class Scorer(Protocol):
    """What `jaxrl.learner.learner.Learner` is to this file."""

    @property
    def kl_weight(self) -> float:
        """Weight of the KL in the reward."""
        ...

    def set_kl_weight(self, weight: float) -> None:
        """Replace it for the steps to come."""
        ...

    def score_batches(self, batches: Sequence[Batch]) -> list[Scores]:
        """Every micro-batch under the present weights, and under the reference if there is one."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What the learner trains on in one step."""

    minibatches: list[list[Batch]]
    """Micro-batches of each minibatch; none if every sample was left out."""
    padding_ratio: float
    """Positions without a token / all positions of all micro-batches."""
    metrics: Curves


def prepare(
    groups: Sequence[RolloutGroup], settings: GrpoConfig, rows: Rows, learner: Scorer
) -> Prepared:
    """Everything between the buffer and the first update; runs the learner's forward if needed."""
    sequences, metrics = groups_to_sequences(groups, settings, rows.max_new_tokens)
    if sequences and settings.scores_first:
        sequences = _scored(sequences, learner, rows)
    if sequences and settings.correction_denominator == "kept":
        sequences = _rejected(sequences, settings, rows)
    if sequences and (settings.token_rewards or settings.kl_in == "reward"):
        sequences, curves = _rewarded(sequences, settings, learner.kl_weight)
        metrics |= curves
        if settings.kl_target > 0:
            weight = adapted_kl_weight(
                learner.kl_weight, curves["reward/kl"], target=settings.kl_target,
                horizon=settings.kl_horizon, num_samples=len(sequences),
            )  # fmt: skip
            learner.set_kl_weight(weight)
    if settings.advantage_scale == "token_std":
        sequences = _whitened(sequences, settings.advantage_ddof)
    made = _minibatches(sequences, settings, rows.max_new_tokens)
    packed = [rows.pack(chosen) for chosen, _ in made]
    of_minibatches = [curves for _, curves in made]
    metrics |= {
        name: float(np.mean([curves[name] for curves in of_minibatches]))
        for name in (of_minibatches[0] if made else {})
    }
    return Prepared(
        minibatches=[batches for batches, _ in packed],
        padding_ratio=_padding_ratio([stats for _, stats in packed]),
        metrics=metrics,
    )


def _padding_ratio(packing: Sequence[PackingStats]) -> float:
    positions = [stats.microbatches for stats in packing]
    if not positions:
        return 0.0
    if len(positions) == 1:
        return packing[0].padding_ratio
    return float(np.average([stats.padding_ratio for stats in packing], weights=positions))


def _scored(sequences: list[TrainSequence], learner: Scorer, rows: Rows) -> list[TrainSequence]:
    """The sequences with the scores of a forward pass over all of them."""
    batches, _ = rows.pack(sequences)
    scores = learner.score_batches(batches)

    def per_sequence(arrays: Sequence[np.ndarray | None]) -> Sequence[np.ndarray | None]:
        found = [array for array in arrays if array is not None]
        if not found:
            return [None] * len(sequences)
        return unpack(sequences, found, row_tokens=rows.row_tokens, shared=rows.shared)

    logprobs = per_sequence([s.logprobs for s in scores])
    entropy = per_sequence([s.entropy for s in scores])
    reference = per_sequence([s.reference_logprobs for s in scores])
    values = per_sequence([s.values for s in scores])
    return [
        replace(
            s, learner_logprobs=logprobs[n], learner_entropy=entropy[n],
            reference_logprobs=reference[n], values=values[n],
        )
        for n, s in enumerate(sequences)
    ]  # fmt: skip


def _rejected(
    sequences: list[TrainSequence], settings: GrpoConfig, rows: Rows
) -> list[TrainSequence]:
    """The sequences with what is left of them, by the equations that the loss masks with."""
    batches, _ = rows.pack(sequences)
    kept = [np.asarray(kept_tokens(b.learner_logprobs, b, settings)) for b in batches]
    flags = unpack(sequences, kept, row_tokens=rows.row_tokens, shared=rows.shared)
    return [replace(s, kept=flag > 0) for s, flag in zip(sequences, flags, strict=True)]


def _rewarded(
    sequences: list[TrainSequence], settings: GrpoConfig, kl_weight: float
) -> tuple[list[TrainSequence], Curves]:
    """Advantages from rewards in which the KL stands, or from a critic."""
    kl = [
        _kl_of(s, settings) if settings.kl_in == "reward" else np.zeros(s.loss_mask.sum())
        for s in sequences
    ]
    totals = np.array([k.sum() for k in kl])
    curves = {"reward/kl": float(totals.mean()), "reward/kl_weight": kl_weight}
    if settings.advantage_baseline in GROUP_BASELINES:
        rewards = np.array([s.reward for s in sequences]) - kl_weight * totals
        advantages = _of_groups(sequences, rewards, settings)
        return [_with(s, a) for s, a in zip(sequences, advantages, strict=True)], curves
    made = []
    for s, of_tokens in zip(sequences, kl, strict=True):
        rewards = token_rewards(s.reward, of_tokens, kl_weight)
        discounts = np.append(np.full(len(rewards) - 1, settings.gamma), 0.0)
        if settings.advantage_baseline != "value" or s.values is None:
            made.append(_with(s, discounted_returns(rewards, discounts)))
            continue
        values = s.values[s.loss_mask].astype(np.float64)
        advantages = gae(rewards, np.append(values, 0.0), discounts, settings.gae_lambda)
        made.append(replace(_with(s, advantages), returns=_spread(s, advantages + values)))
    return made, curves


def _kl_of(sequence: TrainSequence, settings: GrpoConfig) -> np.ndarray:
    """The estimate of each loss token, of the learner against the reference."""
    learner, reference = sequence.learner_logprobs, sequence.reference_logprobs
    if learner is None or reference is None:
        raise ValueError("kl_in=reward needs scores under the learner and under the reference")
    difference = (learner - reference)[sequence.loss_mask].astype(np.float64)
    return host_kl(difference, settings.kl_estimator)


def _of_groups(
    sequences: list[TrainSequence], rewards: np.ndarray, settings: GrpoConfig
) -> np.ndarray:
    """Group advantages [N] of rewards [N]; groups that lost samples compare those that are left."""
    scale, baseline = settings.advantage_scale, settings.advantage_baseline
    if baseline not in GROUP_BASELINES:
        raise ValueError(f"advantage_baseline={baseline} is not a group's")
    of_group = scale if scale == "group_std" or scale == "group_mean" else "none"
    groups = np.array([s.group for s in sequences])
    advantages = np.zeros(len(rewards))
    for group in np.unique(groups):
        mine = groups == group
        advantages[mine] = group_advantages(
            rewards[mine][None], baseline=baseline, scale=of_group, eps=settings.advantage_eps,
            ddof=settings.advantage_ddof,
        )[0]  # fmt: skip
    if scale == "batch_std" or scale == "batch_reward_std":
        spread = (advantages if scale == "batch_std" else rewards).std(ddof=settings.advantage_ddof)
        advantages /= spread + settings.advantage_eps
    return advantages


def _with(sequence: TrainSequence, advantages: float | np.ndarray) -> TrainSequence:
    return replace(sequence, advantages=_spread(sequence, advantages))


def _spread(sequence: TrainSequence, values: float | np.ndarray) -> np.ndarray:
    """[T] float32 with `values` on the loss tokens, 0 elsewhere."""
    spread = np.zeros(len(sequence.tokens), np.float32)
    spread[sequence.loss_mask] = values
    return spread


def _whitened(sequences: list[TrainSequence], ddof: int) -> list[TrainSequence]:
    """Advantages whitened over the counted tokens of the whole batch."""
    if not sequences:
        return []
    mask = np.concatenate([s.counted for s in sequences])
    white = whiten(np.concatenate([s.advantages for s in sequences]), mask, ddof)
    ends = np.cumsum([len(s.tokens) for s in sequences])
    parts = np.split(white, ends[:-1])
    return [_with(s, part[s.loss_mask]) for s, part in zip(sequences, parts, strict=True)]


def _high_entropy(
    sequences: list[TrainSequence], settings: GrpoConfig
) -> tuple[list[np.ndarray], Curves]:
    """The tokens of high entropy of each sequence, and the threshold."""
    mask = np.concatenate([s.counted for s in sequences])
    entropy = np.concatenate([_entropy_of(s) for s in sequences])
    flags = high_entropy_mask(entropy, mask, settings.top_entropy_share)
    kept = np.split(flags, np.cumsum([len(s.tokens) for s in sequences])[:-1])
    return kept, {
        "filter/entropy_threshold": float(entropy[flags].min()),
        "filter/frac_tokens_kept": float(flags.sum() / mask.sum()),
    }


def _entropy_of(sequence: TrainSequence) -> np.ndarray:
    if sequence.learner_entropy is None:
        raise ValueError("top_entropy_share < 1 needs scores under the learner")
    return sequence.learner_entropy


def _minibatches(
    sequences: list[TrainSequence], settings: GrpoConfig, max_new_tokens: int
) -> list[tuple[list[TrainSequence], Curves]]:
    """Whole groups, about equally many in each; and the curves of each minibatch."""
    groups = np.array([s.group for s in sequences])
    shares = np.array_split(np.unique(groups), settings.minibatches)
    chosen = [np.flatnonzero(np.isin(groups, share)) for share in shares]
    return [
        _minibatch([sequences[n] for n in where], settings, max_new_tokens)
        for where in chosen
        if any(sequences[n].counted.any() for n in where)
    ]


def _minibatch(
    sequences: list[TrainSequence], settings: GrpoConfig, max_new_tokens: int
) -> tuple[list[TrainSequence], Curves]:
    """One optimizer batch with its own denominators, spread and entropy quantile; only tokens of high
    entropy keep their advantages, which are standardised before."""
    kept, curves = [s.counted for s in sequences], {}
    if settings.top_entropy_share < 1:
        kept, curves = _high_entropy(sequences, settings)
    of_kept = settings.top_entropy_denominator == "kept"
    if settings.minibatches > 1 or of_kept or settings.correction_denominator == "kept":
        masks = kept if of_kept else [s.counted for s in sequences]
        sequences = _weighed(sequences, masks, settings, max_new_tokens)
    if settings.advantage_scale == "minibatch_std":
        sequences = _standardised(sequences, settings)
    if settings.top_entropy_share < 1:
        sequences = [
            replace(s, advantages=np.where(mask, s.advantages, np.float32(0)))
            for s, mask in zip(sequences, kept, strict=True)
        ]
    return sequences, curves


def _weighed(
    sequences: list[TrainSequence],
    masks: list[np.ndarray],
    settings: GrpoConfig,
    max_new_tokens: int,
) -> list[TrainSequence]:
    """The sequences with token weights whose denominators are over `masks` alone."""
    weights = token_weights(
        np.array([mask.sum() for mask in masks]),
        np.array([s.group for s in sequences]),
        mode=settings.aggregation,
        constant=float(max_new_tokens),
    )
    return [
        replace(s, token_weights=np.where(s.counted, np.float32(weight), np.float32(0)))
        for s, weight in zip(sequences, weights, strict=True)
    ]


def _standardised(sequences: list[TrainSequence], settings: GrpoConfig) -> list[TrainSequence]:
    """Advantages minus their mean over the counted sequences, divided by their standard deviation."""
    advantages = np.array([s.advantages[s.loss_mask][0] for s in sequences], np.float64)
    mean, variance = masked_moments(
        advantages, np.array([s.counted.any() for s in sequences]), settings.advantage_ddof
    )
    white = (advantages - mean) / (np.sqrt(variance) + settings.advantage_eps)
    return [_with(s, float(a)) for s, a in zip(sequences, white, strict=True)]
