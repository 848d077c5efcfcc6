"""Published values of token losses and importance weights, run through our functions.

../shared/data/goldens/losses.json holds cases with their sources. GOLDENS says which function or
option of ours gives each kind. The numbers of cases are asserted, so that coverage cannot shrink unseen.
"""

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.algorithms.advantages import high_entropy_mask
from jaxrl.algorithms.correction import (
    log_weights,
    masked_weights,
    off_policy_keep,
    sequence_keep,
    truncated_weights,
)
from jaxrl.algorithms.loss import policy_loss, sft_loss
from jaxrl.algorithms.loss_metrics import finish_metrics
from jaxrl.algorithms.preference import preference_loss
from jaxrl.algorithms.ratios import cispo, dppo, gspo, ppo_clip, reinforce, sapo
from jaxrl.algorithms.segments import segment_mean
from jaxrl.batch import Batch
from jaxrl.config import GrpoConfig
from models.head import target_logprobs

GROUPS = {"loss", "is_weight", "mask", "logprob"}
NO_CAP = 1e6  # far above every importance weight of the cases


def _f32(values) -> jax.Array:
    return jnp.atleast_2d(jnp.asarray(np.array(values, dtype=np.float32)))


def _bool(values) -> jax.Array:
    return jnp.atleast_2d(jnp.asarray(np.array(values, dtype=bool)))


def _batch(mask, *, advantages=0.0, sampler=0.0, weights=0.0) -> Batch:
    """One sequence per row, targets where the mask is set."""
    shape = mask.shape
    integers = jnp.zeros(shape, jnp.int32)
    return Batch(
        tokens=integers,
        segment_ids=integers + 1,
        positions=integers,
        targets=integers,
        loss_mask=mask,
        token_weights=jnp.broadcast_to(_f32(weights), shape),
        advantages=jnp.broadcast_to(_f32(advantages), shape),
        sampler_logprobs=jnp.broadcast_to(_f32(sampler), shape),
    )


def _average_logprobs(case):
    """Labels at positions >= 1 are the targets; -100 is ignored."""
    labels = np.array(case["inputs"]["labels"])[:, 1:]
    values = _f32(case["inputs"]["per_token_logps"])[:, :-1]
    return segment_mean(values, jnp.ones(labels.shape, jnp.int32), _bool(labels >= 0), 1)[:, 0]


def _reinforce_weighted(case):
    inputs = case["inputs"]
    logprobs = jax.nn.log_softmax(jnp.asarray(np.array(inputs["logits"], np.float32)))
    taken = jnp.take_along_axis(logprobs, jnp.array(inputs["actions"])[..., None], axis=-1)[..., 0]
    losses = reinforce(taken, taken, _f32(inputs["advantages"])).losses
    return jnp.mean(losses * _f32(inputs["weights"]), axis=1)


def _compose(case, *, aggregate_with=None, **settings):
    """policy_loss of one row with all tokens in the loss; returns (loss, metrics)."""
    inputs = case["inputs"]
    logprobs = _f32(inputs.get("curr_logprobs", inputs.get("logprobs")))
    sampler = inputs.get("generation_logprobs", inputs.get("rollout_logprobs", 0.0))
    learner = inputs.get("prev_logprobs")
    reference = inputs.get("ref_logprobs")
    weight = 1.0 if aggregate_with == "sum" else 1.0 / logprobs.size
    loss, metrics = policy_loss(
        logprobs,
        jnp.zeros(logprobs.shape),
        _batch(
            jnp.ones(logprobs.shape, bool),
            advantages=inputs["advantages"],
            sampler=sampler,
            weights=weight,
        ),
        learner_logprobs=None if learner is None else _f32(learner),
        reference_logprobs=None if reference is None else _f32(reference),
        settings=GrpoConfig(**settings),
    )
    return float(loss), finish_metrics(metrics)


def _clip(case):
    return {
        "clip_low": case["params"].get("eps_low", 0.2),
        "clip_high": case["params"].get("eps_high", 0.2),
    }


def _tokens(case):
    inputs = case["inputs"]
    return (
        _f32(inputs["curr_logprobs"]),
        _f32(inputs["prev_logprobs"]),
        _f32(inputs["advantages"]),
    )


def _ppo(case):
    loss, _ = _compose(case, ratio_from="learner", **_clip(case))
    return {"per_token": ppo_clip(*_tokens(case), **_clip(case)).losses, "loss": loss}


def _on_policy(case):
    inputs = {**case["inputs"], "prev_logprobs": None}
    return _compose({"inputs": inputs}, ratio_from="learner")[0]


def _cispo(case):
    how = case["params"]["agg"]
    return _compose(case, aggregate_with=how, ratio_from="learner", ratio="cispo", **_clip(case))[0]


def _cispo_sampler(case):
    loss, metrics = _compose(case, aggregate_with="sum", ratio="cispo", **_clip(case))
    logprobs, sampler = _f32(case["inputs"]["curr_logprobs"]), case["inputs"]["rollout_logprobs"]
    ones = jnp.ones(logprobs.shape)
    clamped = -jax.grad(lambda x: cispo(x, _f32(sampler), ones, **_clip(case)).losses.mean())(
        logprobs
    ).sum()
    return {
        "loss_sum": loss,
        "ratio_mean": metrics["actor/ratio_mean"],
        "ratio_max": metrics["actor/ratio_max"],
        "ratio_clamped_mean": clamped,
    }


def _ppo_corrected(case):
    learner = _f32(case["inputs"]["prev_logprobs"])
    sampler = _f32(case["inputs"]["generation_logprobs"])
    weights, _ = truncated_weights(learner - sampler, cap=NO_CAP)
    loss, _ = _compose(
        case,
        ratio_from="learner",
        correction="truncated",
        correction_cap=NO_CAP,
        **_clip(case),
    )
    losses = ppo_clip(*_tokens(case), **_clip(case)).losses
    return {"is_weights": weights, "weighted": weights * losses, "loss": loss}


def _gspo(case):
    """The tokens of their sequence have different advantages: gspo_token."""
    logprobs = _f32(case["inputs"]["curr_logprobs"])
    ids, mask = jnp.ones(logprobs.shape, jnp.int32), jnp.ones(logprobs.shape, bool)
    token_loss = gspo(*_tokens(case), ids, mask, per_token=True, **_clip(case))
    loss, _ = _compose(
        case, ratio_from="learner", ratio="gspo_token", aggregation="sequence_mean", **_clip(case)
    )
    return {"seq_ratio": token_loss.ratio, "per_token": token_loss.losses, "loss": loss}


def _icepop(case):
    learner = _f32(case["inputs"]["prev_logprobs"])
    sampler = _f32(case["inputs"]["generation_logprobs"])
    params = case["params"]
    weights, _ = masked_weights(learner - sampler, low=params["min"], high=params["max"])
    return jnp.mean(weights * ppo_clip(*_tokens(case), **_clip(case)).losses)


def _tis_bounds(case):
    ratio = _f32(case["inputs"]["is_ratio"])
    weights, outside = truncated_weights(
        jnp.log(ratio),
        cap=case["params"]["max"],
        floor=case["params"]["min"] or 0.0,
    )
    return {
        "weights": weights[0],
        "loss": -jnp.mean(weights * _f32(case["inputs"]["advantages"])),
        "oob_ratio": jnp.mean(outside, dtype=jnp.float32),
    }


def _dual_clip(case):
    inputs, c = case["inputs"], case["params"]["c"]
    if "ratios" in inputs:
        logprobs = jnp.log(_f32(inputs["ratios"]))
        advantages = _f32(inputs["advantages"])
        old = jnp.zeros(logprobs.shape)
        return ppo_clip(logprobs, old, advantages, dual_clip=c, **_clip(case)).losses[0]
    losses = ppo_clip(*_tokens(case), dual_clip=c, **_clip(case)).losses
    options: dict[str, Any] = {"ratio_from": "learner", "dual_clip": c, **_clip(case)}
    given = {
        "per_token": losses,
        "loss_mean": _compose(case, **options)[0],
        "loss_sum": _compose(case, aggregate_with="sum", **options)[0],
    }
    return {name: given[name] for name in case["expected"]}


def _tis_token(case):
    learner, sampler, _, _ = _programs(case)
    weights, outside = truncated_weights(learner - sampler, cap=case["params"]["max"])
    return {"weights": weights, "clip_frac": jnp.mean(outside, dtype=jnp.float32)}


def _programs(case):
    """Learner, sampler, one segment per row, mask."""
    inputs = case["inputs"]
    learner, mask = _f32(inputs["old_logprobs"]), _bool(inputs["mask"])
    ones = jnp.ones(learner.shape, jnp.int32)
    return learner, _f32(inputs["rollout_logprobs"]), ones, mask


def _token_mask(case):
    learner, sampler, _, mask = _programs(case)
    bounds = {"low": case["params"]["low"], "high": case["params"]["high"]}
    return ~(masked_weights(learner - sampler, **bounds)[1] & mask)


def _tis_sequence(case):
    ratios = log_weights(*_programs(case), level="sequence")
    return truncated_weights(ratios, cap=case["params"]["max"])[0][:, :1]


def _sequence_mask(kind):
    def run(case):
        low, high = case["params"]["low"] or 0.0, case["params"]["high"] or np.inf
        return sequence_keep(*_programs(case), kind=kind, low=low, high=high)[:, :1]

    return run


def _off_policy(case):
    """Our bound is on the mean over the completion's own tokens of log sampler - log policy."""
    inputs = case["inputs"]
    policy, mask = _f32(inputs["per_token_logps"]), _bool(inputs["mask"])
    return off_policy_keep(
        policy,
        _f32(inputs["sampling_per_token_logps"]),
        jnp.broadcast_to(_f32(inputs["advantages"]), policy.shape),
        jnp.ones(policy.shape, jnp.int32),
        mask,
        bound=case["params"]["threshold"],
    )[:, :1]


def _gspo_corrected(case):
    """correction_level=sequence is the product over the completion, as in NeMo RL."""
    cap = case["params"].get("tis_max", NO_CAP)
    learner = _f32(case["inputs"]["prev_logprobs"])
    sampler = _f32(case["inputs"]["generation_logprobs"])
    ids, mask = jnp.ones(learner.shape, jnp.int32), jnp.ones(learner.shape, bool)
    ratios = log_weights(learner, sampler, ids, mask, level="sequence")
    weights, _ = truncated_weights(ratios, cap=cap)
    losses = gspo(*_tokens(case), ids, mask, per_token=True, **_clip(case)).losses
    loss, _ = _compose(
        case, ratio_from="learner", ratio="gspo_token", aggregation="sequence_mean",
        correction="truncated", correction_level="sequence", correction_cap=max(cap, 1.0),
        **_clip(case),
    )  # fmt: skip
    if cap < 1:  # a cap below 1 is not among our settings
        loss = jnp.mean(weights * losses)
    given = {"seq_is_weight": weights[:, :1], "weighted": weights * losses, "loss": loss}
    return {name: given[name] for name in case["expected"]}


def _sapo(case):
    inputs, params = case["inputs"], case["params"]
    taus = {"tau_positive": params["tau_pos"], "tau_negative": params["tau_neg"]}
    tokens = (_f32(inputs[n]) for n in ("logprobs", "old_logprobs", "advantages"))
    return sapo(*tokens, **taus).losses.sum()


def _dppo(case):
    tokens = (_f32(case["inputs"][n]) for n in ("logprobs", "old_logprobs", "advantages"))
    got = dppo(*tokens, delta=case["params"]["delta"])
    return {"mask": ~(got.clipped_low | got.clipped_high), "loss_sum": got.losses.sum()}


def _dpo(case):
    inputs = {name: jnp.array(values, jnp.float32) for name, values in case["inputs"].items()}
    return preference_loss(
        inputs["policy_chosen"] - inputs["ref_chosen"],
        inputs["policy_rejected"] - inputs["ref_rejected"],
        beta=case["params"]["beta"],
        kind="dpo",
    )


def _dpo_plus_sft(case):
    """Equal margins, plus half the sum of two tokens' cross-entropies under uniform logits."""
    inputs = case["inputs"]
    nothing = jnp.zeros(1)
    mask = jnp.ones((1, inputs["unmasked_tokens"]), bool)
    logprobs = jnp.full(mask.shape, -np.log(inputs["vocab_size"]), jnp.float32)
    preference = preference_loss(nothing, nothing, beta=0.1, kind="dpo").mean()
    return preference + sft_loss(logprobs, _batch(mask, weights=0.5))


def _high_entropy(case):
    """Their quantile is the share left out."""
    inputs = case["inputs"]
    return high_entropy_mask(
        np.array(inputs["entropies"]), np.array(inputs["mask"]), 1 - case["params"]["quantile"]
    )


def _selected(case):
    """The head's log-probabilities, for a head that hands its input through."""
    inputs = case["inputs"]
    logits = jnp.array(inputs["logits"], jnp.float32)
    targets = jnp.array(inputs["ids"])
    policy: Any = SimpleNamespace(head=None, embedding=jnp.eye(logits.shape[-1]))
    return target_logprobs(
        policy, logits, targets, temperature=1.0, chunk_tokens=64, dtype=jnp.float32
    )[0]


def _simple_grpo(case):
    return _compose(case, ratio_from="learner", kl_weight=case["params"]["beta"])[0]


def _nll(case):
    logits = jnp.zeros((1, 2, 4)).at[:, :, 1].set(999.0)
    logprobs = jax.nn.log_softmax(logits)[..., 0]
    return sft_loss(logprobs, _batch(jnp.ones((1, 2), bool), weights=0.5))


class Golden(NamedTuple):
    """How a kind of case is run, and how many cases of that kind are."""

    run: Callable[[dict], Any]
    count: int


GOLDENS: dict[tuple[str, str], Golden] = {
    ("loss", "batch_logps_average"): Golden(_average_logprobs, 2),
    ("loss", "policy_gradient_loss"): Golden(_reinforce_weighted, 1),
    ("loss", "ppo_clip"): Golden(_ppo, 1),
    ("loss", "on_policy_ratio_one"): Golden(_on_policy, 1),
    ("loss", "cispo"): Golden(_cispo, 2),
    ("loss", "cispo_rollout_anchor"): Golden(_cispo_sampler, 1),
    ("loss", "ppo_clip_is_corrected"): Golden(_ppo_corrected, 1),
    ("loss", "gspo"): Golden(_gspo, 1),
    ("loss", "icepop"): Golden(_icepop, 1),
    ("loss", "tis_bounds"): Golden(_tis_bounds, 2),
    ("loss", "dual_clip"): Golden(_dual_clip, 3),
    ("loss", "simple_grpo"): Golden(_simple_grpo, 1),
    ("loss", "nll"): Golden(_nll, 1),
    ("is_weight", "tis_token"): Golden(_tis_token, 1),
    ("is_weight", "token_mask"): Golden(_token_mask, 4),
    ("logprob", "selective_log_softmax"): Golden(_selected, 1),
    ("loss", "gspo_is_corrected"): Golden(_gspo_corrected, 1),
    ("loss", "gspo_tis_sequence"): Golden(_gspo_corrected, 1),
    ("is_weight", "tis_sequence"): Golden(_tis_sequence, 2),
    ("is_weight", "sequence_mask_geometric"): Golden(_sequence_mask("geometric"), 2),
    ("is_weight", "sequence_mask_product"): Golden(_sequence_mask("product"), 2),
    ("is_weight", "outlier_sequence_mask"): Golden(_sequence_mask("outlier"), 4),
    ("loss", "sapo"): Golden(_sapo, 1),
    ("loss", "dppo"): Golden(_dppo, 1),
    ("loss", "dpo_sigmoid"): Golden(_dpo, 1),
    ("loss", "dpo_plus_sft"): Golden(_dpo_plus_sft, 1),
    ("mask", "high_entropy_mask"): Golden(_high_entropy, 2),
    ("mask", "off_policy_sequence_mask"): Golden(_off_policy, 2),
}


@pytest.fixture(scope="module")
def cases(golden_cases) -> list[dict]:
    return [case for case in golden_cases if case["group"] in GROUPS]


def _key(case) -> tuple[str, str]:
    return case["group"], case["fn"]


@pytest.mark.parametrize("key", GOLDENS, ids="-".join)
def test_published_values_are_reproduced(cases, assert_golden, key):
    golden = GOLDENS[key]
    mine = [case for case in cases if _key(case) == key]
    assert len(mine) == golden.count
    for case in mine:
        assert_golden(case, golden.run(case))


def test_every_published_loss_is_run(cases):
    assert Counter(map(_key, cases)) == {key: golden.count for key, golden in GOLDENS.items()}
