"""Published values of token losses and importance weights, run through our functions.

../shared/data/goldens/losses.json holds cases with their sources. GOLDENS says which function or
option of ours gives each kind; NOT_COVERED says why the others are not run. The numbers of
cases are asserted, so that coverage cannot shrink unseen.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.algorithms.correction import masked_weights, truncated_weights
from jaxrl.algorithms.loss import finish_metrics, policy_loss, sft_loss
from jaxrl.algorithms.ratios import cispo, gspo, ppo_clip, reinforce, segment_mean
from jaxrl.batch import Batch
from jaxrl.config import GrpoConfig

GROUPS = {"loss", "is_weight", "mask", "logprob"}
FLOAT32_RTOL = 2e-6  # a few roundings of float32, where a case asks for more digits than that
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
    weights, _ = truncated_weights(learner, sampler, cap=NO_CAP)
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
    logprobs = _f32(case["inputs"]["curr_logprobs"])
    ids, mask = jnp.ones(logprobs.shape, jnp.int32), jnp.ones(logprobs.shape, bool)
    token_loss = gspo(*_tokens(case), ids, mask, **_clip(case))
    loss, _ = _compose(
        case, ratio_from="learner", ratio="gspo", aggregation="sequence_mean", **_clip(case)
    )
    return {"seq_ratio": token_loss.ratio, "per_token": token_loss.losses, "loss": loss}


def _icepop(case):
    learner = _f32(case["inputs"]["prev_logprobs"])
    sampler = _f32(case["inputs"]["generation_logprobs"])
    params = case["params"]
    weights, _ = masked_weights(learner, sampler, low=params["min"], high=params["max"])
    return jnp.mean(weights * ppo_clip(*_tokens(case), **_clip(case)).losses)


def _tis_bounds(case):
    ratio = _f32(case["inputs"]["is_ratio"])
    weights, outside = truncated_weights(
        jnp.log(ratio),
        jnp.zeros(ratio.shape),
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
    inputs = case["inputs"]
    weights, outside = truncated_weights(
        _f32(inputs["old_logprobs"]), _f32(inputs["rollout_logprobs"]), cap=case["params"]["max"]
    )
    return {"weights": weights, "clip_frac": jnp.mean(outside, dtype=jnp.float32)}


def _token_mask(case):
    inputs, params = case["inputs"], case["params"]
    _, outside = masked_weights(
        _f32(inputs["old_logprobs"]),
        _f32(inputs["rollout_logprobs"]),
        low=params["low"],
        high=params["high"],
    )
    return ~(outside & _bool(inputs["mask"]))


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
}

NUM_COVERED = 23

_SEQUENCE_WEIGHT = "a weight per sequence; corrections here are per token"

NOT_COVERED = {
    ("logprob", "selective_log_softmax"): "log-probabilities come from models.head, tested there",
    ("loss", "gspo_is_corrected"): _SEQUENCE_WEIGHT,
    ("loss", "gspo_tis_sequence"): _SEQUENCE_WEIGHT,
    ("is_weight", "tis_sequence"): _SEQUENCE_WEIGHT,
    ("is_weight", "sequence_mask_geometric"): _SEQUENCE_WEIGHT,
    ("is_weight", "sequence_mask_product"): _SEQUENCE_WEIGHT,
    ("is_weight", "outlier_sequence_mask"): _SEQUENCE_WEIGHT,
    ("loss", "sapo"): "SAPO's soft gate is not among the ratios",
    ("loss", "dppo"): "DPPO's divergence mask is not among the ratios",
    ("loss", "dpo_sigmoid"): "preference losses are not part of this trainer",
    ("loss", "dpo_plus_sft"): "preference losses are not part of this trainer",
    ("mask", "high_entropy_mask"): "entropy masking is not among the choices",
    ("mask", "off_policy_sequence_mask"): "sequence masking is not among the corrections",
}


@pytest.fixture(scope="module")
def cases(shared_data: Path) -> list[dict]:
    every = json.loads((shared_data / "goldens" / "losses.json").read_text())
    return [case for case in every if case["group"] in GROUPS]


def _key(case) -> tuple[str, str]:
    return case["group"], case["fn"]


@pytest.mark.parametrize("key", GOLDENS, ids="-".join)
def test_published_values_are_reproduced(cases, key):
    golden = GOLDENS[key]
    mine = [c for c in cases if _key(c) == key]
    assert len(mine) == golden.count
    for case in mine:
        got, expected = golden.run(case), case["expected"]
        if not isinstance(expected, dict):
            got, expected = {"value": got}, {"value": expected}
        assert set(got) == set(expected)
        for name in got:
            np.testing.assert_allclose(
                np.asarray(got[name], float).reshape(np.shape(expected[name])),
                np.array(expected[name], float),
                rtol=max(case["rtol"], FLOAT32_RTOL),
                atol=case["atol"],
                err_msg=f"case {case['id']} {name}: {case['source']}",
            )


def test_every_case_is_either_run_or_has_a_reason_not_to(cases):
    assert not set(GOLDENS) & set(NOT_COVERED)
    assert {_key(c) for c in cases} == set(GOLDENS) | set(NOT_COVERED)
    counts = Counter(map(_key, cases))
    assert sum(counts[key] for key in GOLDENS) == NUM_COVERED
