"""How token losses become one number: a weight per token, made on the host.

loss = sum over all tokens of weight * token loss. The denominators below are counts over the WHOLE
optimizer batch, so micro-batches are summed and never averaged. Sequences without a loss token are
in no denominator, unless count_empty asks for it.
"""

from __future__ import annotations

from typing import Literal, assert_never

import numpy as np

Aggregation = Literal[
    "token_mean", "sequence_mean", "prompt_mean", "constant", "constant_sum", "sequence_sum"
]


def token_weights(
    num_loss_tokens: np.ndarray,
    group_ids: np.ndarray,
    *,
    mode: Aggregation,
    constant: float = 1.0,
    count_empty: bool = False,
) -> np.ndarray:
    """Weight of every loss token of each sequence. N sequences; n_i loss tokens in sequence i.

    With S = sequences of n_i > 0 and P = groups that have such a sequence:
    token_mean: 1 / sum_j n_j (DAPO and Magistral as implemented over a batch);
    sequence_mean: 1 / (S n_i) (GRPO arXiv:2402.03300 eq. 3, GSPO arXiv:2507.18071 eq. 5);
    prompt_mean: 1 / (P sum_{j in group of i} n_j) (DAPO arXiv:2503.14476 eq. 8, ScaleRL
    arXiv:2510.13786);
    constant: 1 / (S constant) (Dr. GRPO arXiv:2503.20783, constant = longest completion);
    constant_sum: 1 / constant, not divided by S (verl's seq-mean-token-sum-norm);
    sequence_sum: 1 / S (RLOO arXiv:2402.14740, PipelineRL arXiv:2509.19128).

    Args:
        num_loss_tokens: [N] tokens that carry loss.
        group_ids: [N] int, equal for samples of one prompt (used by prompt_mean).
        mode: which denominator.
        constant: tokens, > 0 (used by constant and constant_sum).
        count_empty: sequences without loss tokens count in S and P (TRL); verl leaves them out.

    Returns:
        [N] float64; 0 for a sequence without loss tokens.

    Raises:
        ValueError: shapes differ, or constant is not positive.
    """
    counts = np.asarray(num_loss_tokens, dtype=np.float64)
    group_ids = np.asarray(group_ids)
    if counts.ndim != 1 or counts.shape != group_ids.shape:
        raise ValueError(
            f"num_loss_tokens {counts.shape} and group_ids {group_ids.shape} must be [sequences]"
        )
    if mode in ("constant", "constant_sum") and not constant > 0:
        raise ValueError(
            f"constant={constant} must be positive: it divides the sum of token losses"
        )
    has_loss = counts > 0
    weights = np.zeros_like(counts)
    if has_loss.any():
        counted = np.ones_like(has_loss) if count_empty else has_loss
        denominators = _denominators(counts[counted], group_ids[counted], mode, constant)
        weights[has_loss] = 1 / denominators[has_loss[counted]]
    return weights


def _denominators(
    counts: np.ndarray, group_ids: np.ndarray, mode: Aggregation, constant: float
) -> np.ndarray:
    """[N] of the sequences that count."""
    if mode == "token_mean":
        return np.full_like(counts, counts.sum())
    if mode == "sequence_mean":
        return len(counts) * counts
    if mode == "prompt_mean":
        groups, inverse = np.unique(group_ids, return_inverse=True)
        return len(groups) * np.bincount(inverse, weights=counts)[inverse]
    if mode == "constant":
        return np.full_like(counts, len(counts) * constant)
    if mode == "constant_sum":
        return np.full_like(counts, constant)
    if mode == "sequence_sum":
        return np.full_like(counts, len(counts))
    assert_never(mode)
