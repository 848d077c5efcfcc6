"""What a micro-batch's loss reports: sums that merge over micro-batches, and the curves made of them.

R rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxrl.algorithms.correction import effective_sample_fraction, importance_weights
from jaxrl.algorithms.kl import k3
from jaxrl.algorithms.ratios import TokenLoss

_PRODUCT, _ADVANTAGES = "actor/logprob_times_advantage", "actor/advantage"


def keep(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Values of loss tokens, 0 elsewhere, so that nothing (not even a NaN) leaks from padding."""
    return jnp.where(mask, values, jnp.zeros((), values.dtype))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class LossMetrics:
    """What `finish_metrics` needs, mergeable over micro-batches. float32 scalars by curve name."""

    num_loss_tokens: jax.Array
    """Loss tokens seen: the denominator of `sums`."""
    weighted: dict[str, jax.Array]
    """Sums of token_weights * value: parts of the loss, aggregated as the loss is."""
    sums: dict[str, jax.Array]
    """Sums over loss tokens."""
    maxima: dict[str, jax.Array]
    """Maxima over loss tokens of values >= 0; 0 without loss tokens."""


def zero_metrics(like: LossMetrics) -> LossMetrics:
    """The neutral element of `merge_metrics`; `like` may hold arrays or jax.ShapeDtypeStruct."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def merge_metrics(a: LossMetrics, b: LossMetrics) -> LossMetrics:
    """Metrics of two micro-batches of one optimizer batch together."""
    return LossMetrics(
        num_loss_tokens=a.num_loss_tokens + b.num_loss_tokens,
        weighted=jax.tree.map(jnp.add, a.weighted, b.weighted),
        sums=jax.tree.map(jnp.add, a.sums, b.sums),
        maxima=jax.tree.map(jnp.maximum, a.maxima, b.maxima),
    )


def finish_metrics(metrics: LossMetrics) -> dict[str, float]:
    """Curves of one optimizer step from the merged metrics of its micro-batches; waits for them.

    `sums` are divided by the number of loss tokens; rl/ess is the effective sample fraction of the
    ratio policy / sampler, in (0, 1]. actor/logprob_advantage_cov is the covariance over loss tokens
    that drives the entropy down (arXiv:2505.22617). Without loss tokens every value is 0.
    """
    host = jax.device_get(metrics)
    tokens = float(host.num_loss_tokens)
    sums = {name: float(value) for name, value in host.sums.items()}
    squares = sums.pop("rl/importance_square")
    ess = effective_sample_fraction(sums["rl/importance_mean"], squares, tokens)
    product, advantages = sums.pop(_PRODUCT), sums.pop(_ADVANTAGES)
    count = max(tokens, 1.0)
    covariance = product / count - sums["actor/logprob_mean"] / count * advantages / count
    return {
        **{name: float(value) for name, value in host.weighted.items()},
        **{name: value / count for name, value in sums.items()},
        **{name: float(value) for name, value in host.maxima.items()},
        "rl/ess": ess,
        "actor/logprob_advantage_cov": covariance,
        "batch/loss_tokens": tokens,
    }


def ratio_curves(
    logprobs: jax.Array, old: jax.Array, token_loss: TokenLoss
) -> dict[str, jax.Array]:
    """Values to average over loss tokens, by curve name. All [R, T].

    pg_clipfrac counts tokens at a clip bound (PPO, GSPO: no policy gradient; CISPO: a clipped
    weight), pg_clipfrac_lower those at the dual bound; both names as in verl.
    """
    low, high, dual = token_loss.clipped_low, token_loss.clipped_high, token_loss.clipped_dual
    return {
        "actor/logprob_mean": logprobs,
        "actor/ppo_kl": old - logprobs,
        "actor/ratio_mean": token_loss.ratio,
        "actor/pg_clipfrac": (low | high).astype(jnp.float32),
        "actor/pg_clipfrac_low": low.astype(jnp.float32),
        "actor/pg_clipfrac_high": high.astype(jnp.float32),
        "actor/pg_clipfrac_lower": dual.astype(jnp.float32),
    }


def mismatch_curves(learner: jax.Array, sampler: jax.Array) -> dict[str, jax.Array]:
    """Learner against sampler on the tokens that the sampler drew. All [R, T].

    kl_mean (k1, may be negative) and k3_mean (never negative) both estimate KL(sampler || learner).
    """
    return {
        "mismatch/kl_mean": sampler - learner,
        "mismatch/k3_mean": k3(sampler, learner),
        "mismatch/logp_abs_diff_mean": jnp.abs(learner - sampler),
        "mismatch/prob_abs_diff_mean": jnp.abs(jnp.exp(learner) - jnp.exp(sampler)),
    }


def covariance_curves(logprobs: jax.Array, advantages: jax.Array) -> dict[str, jax.Array]:
    """What the covariance of log-probability and advantage is made from. All [R, T]."""
    return {_PRODUCT: logprobs * advantages, _ADVANTAGES: advantages}


def importance_curves(logprobs: jax.Array, sampler: jax.Array) -> dict[str, jax.Array]:
    """Ratio policy / sampler and its square, from which the effective sample fraction follows."""
    weights = importance_weights(logprobs, sampler)
    return {"rl/importance_mean": weights, "rl/importance_square": jnp.square(weights)}


_MAXIMA = {
    "actor/ratio_mean": "actor/ratio_max",
    "mismatch/logp_abs_diff_mean": "mismatch/logp_abs_diff_max",
    "rl/importance_mean": "rl/importance_max",
}
"""Curves >= 0 whose maximum is kept as well, and that one's name."""


def reduce_curves(
    parts: dict[str, jax.Array], curves: dict[str, jax.Array], mask: jax.Array
) -> LossMetrics:
    """Sums and maxima over the loss tokens of this micro-batch; `parts` are already sums."""
    return LossMetrics(
        num_loss_tokens=jnp.sum(mask, dtype=jnp.float32),
        weighted=parts,
        sums={name: jnp.sum(keep(value, mask)) for name, value in curves.items()},
        maxima={new: jnp.max(keep(curves[name], mask)) for name, new in _MAXIMA.items()},
    )
