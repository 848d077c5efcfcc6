"""Published values of advantages, aggregations and KL estimators, run through our functions.

../shared/data/goldens/losses.json holds cases with their sources. GOLDENS says which function or
option of ours gives each kind; NOT_COVERED and CONVENTIONS say why the others are not run. The
numbers of cases are asserted, so that coverage cannot shrink unseen.
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

from jaxrl.algorithms.advantages import group_advantages
from jaxrl.algorithms.aggregation import token_weights
from jaxrl.algorithms.kl import k1, k2, k3
from jaxrl.algorithms.loss import policy_loss, sft_loss
from jaxrl.algorithms.ratios import segment_mean
from jaxrl.batch import Batch
from jaxrl.config import GrpoConfig

ELSEWHERE = {"loss", "is_weight", "mask", "logprob"}  # groups of test_goldens_losses
FLOAT32_RTOL = 2e-6  # a few roundings of float32, where a case asks for more digits than that


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


def _aggregate(values, mask, mode, constant=1.0) -> float:
    """sum of weight * value through the path of training: host weights, device sum."""
    values, mask = _f32(values), _bool(mask)
    counts = np.asarray(mask).sum(axis=1)
    weights = token_weights(counts, np.arange(len(counts)), mode=mode, constant=constant)
    batch = _batch(mask, weights=np.where(mask, weights[:, None], 0.0))
    return float(sft_loss(-values, batch))


def _groups(case) -> np.ndarray:
    """Rewards [P, G] from a flat list with a group size or group index."""
    inputs = case["inputs"]
    rewards = np.array(inputs.get("rewards", inputs.get("sequence_scores")), float)
    if "group_index" in inputs:
        assert inputs["group_index"] == sorted(inputs["group_index"])
        return rewards.reshape(len(set(inputs["group_index"])), -1)
    return rewards.reshape(-1, case["params"]["num_generations"])


def _advantages(baseline, scale):
    def run(case):
        eps = case["params"].get("eps", 1e-6)
        ddof = case["params"].get("std_ddof", 1)
        return group_advantages(
            _groups(case), baseline=baseline, scale=scale, eps=eps, ddof=ddof
        ).ravel()

    return run


def _masked_mean(case):
    """A mean over all entries is a token mean over all rows."""
    return _aggregate(_number(case["inputs"]["values"]), case["inputs"]["mask"], "token_mean")


def _row_means(case):
    mask = _bool(case["inputs"]["mask"])
    values = _f32(case["inputs"]["values"])
    return segment_mean(values, jnp.ones(mask.shape, jnp.int32), mask, 1)[:, 0]


def _global_mean(case):
    """Two micro-batches with sums 10 and 2 over 4 and 1 tokens."""
    (a, b), (n, m) = case["inputs"]["numerators"], case["inputs"]["denominators"]
    values = [[a / n] * n, [b / m] * m + [0.0] * (n - m)]
    mask = [[1] * n, [1] * m + [0] * (n - m)]
    return {"global": _aggregate(values, mask, "token_mean")}


def _aggregation(mode, constant: Callable[[dict, int, int], float] = lambda params, s, t: 1.0):
    """constant(params, non-empty sequences, row length) is the divisor of that library's mode."""

    def run(case):
        inputs = case["inputs"]
        values = inputs.get("values", inputs.get("per_token_loss"))
        mask = np.array(inputs.get("mask", inputs.get("completion_mask")))
        nonempty = max(int(mask.any(axis=1).sum()), 1)
        return _aggregate(values, mask, mode, constant(case["params"], nonempty, mask.shape[1]))

    return run


def _masked_sum(case):
    mask = _bool(case["inputs"]["mask"])
    return sft_loss(-_f32(case["inputs"]["loss"]), _batch(mask, weights=np.asarray(mask)))


def _kl(estimator):
    def run(case):
        inputs = case["inputs"]
        logprobs = jnp.asarray(np.array(inputs["logprobs"], np.float32))
        reference = jnp.asarray(np.array(inputs["ref_logprobs"], np.float32))
        return np.asarray(estimator(logprobs, reference)) * np.array(inputs.get("mask", 1.0))

    return run


def _kl_gradient(case):
    """k2 as a loss gives the gradient of the reverse KL on each token."""
    inputs, beta = case["inputs"], case["params"]["beta"]
    logprobs = _f32(inputs["curr_logprobs"])
    mask = jnp.ones(logprobs.shape, bool)
    batch = _batch(
        mask,
        advantages=inputs["advantages"],
        sampler=inputs["generation_logprobs"],
        weights=1 / logprobs.size,
    )

    def gradient(kl_weight):
        settings = GrpoConfig(ratio_from="learner", kl_weight=kl_weight, kl_estimator="k2")
        return jax.grad(
            lambda x: policy_loss(
                x,
                jnp.zeros(x.shape),
                batch,
                learner_logprobs=_f32(inputs["prev_logprobs"]),
                reference_logprobs=_f32(inputs["reference_logprobs"]),
                settings=settings,
            )[0]
        )(logprobs)

    return gradient(beta) - gradient(0.0)


def _number(value):
    """The case's numbers, with "NaN" written out."""
    if isinstance(value, list):
        return [_number(v) for v in value]
    return float("nan") if value == "NaN" else value


class Golden(NamedTuple):
    """How a kind of case is run, and how many cases of that kind are."""

    run: Callable[[dict], Any]
    count: int


GOLDENS: dict[tuple[str, str], Golden] = {
    ("advantage", "rloo"): Golden(_advantages("leave_one_out", "none"), 2),
    ("advantage", "grpo_group_norm"): Golden(_advantages("mean", "group_std"), 4),
    ("advantage", "grpo_no_std"): Golden(_advantages("mean", "none"), 1),
    ("stat", "masked_mean"): Golden(_masked_mean, 7),
    ("stat", "masked_mean_axis1"): Golden(_row_means, 2),
    ("stat", "global_weighted_mean"): Golden(_global_mean, 1),
    ("aggregate", "seq_mean_token_mean"): Golden(_aggregation("sequence_mean"), 2),
    ("aggregate", "sequence_mean"): Golden(_aggregation("sequence_mean"), 1),
    ("aggregate", "sequence-mean-token-mean"): Golden(_aggregation("sequence_mean"), 2),
    ("aggregate", "token_mean"): Golden(_aggregation("token_mean"), 3),
    ("aggregate", "token-mean"): Golden(_aggregation("token_mean"), 2),
    ("aggregate", "sequence-mean-token-scale"): Golden(
        _aggregation("constant", lambda params, s, t: params.get("norm", t)), 2
    ),
    ("aggregate", "sequence-mean-token-sum-norm"): Golden(
        _aggregation("constant", lambda params, s, t: params.get("norm", s) / s), 4
    ),
    ("aggregate", "seq-mean-token-sum"): Golden(_aggregation("constant"), 2),
    ("aggregate", "masked_sum"): Golden(_masked_sum, 1),
    ("kl", "k1"): Golden(_kl(k1), 3),
    ("kl", "k2"): Golden(_kl(k2), 1),
    ("kl", "k3"): Golden(_kl(k3), 3),
    ("kl", "kl_penalty_gradient"): Golden(_kl_gradient, 1),
}

NUM_COVERED = 44

WRONG_ON_PURPOSE = {"mean_of_means"}  # shows what averaging micro-batches would give

CONVENTIONS = {
    50: "keeps an empty sequence in the denominator; ours counts sequences with loss, as case 65",
    80: "bounds k1's value at 10; ours is never bounded",
    84: "bounds k3's value at 10; ours only keeps its exponential finite",
    87: "multiplies the KL by the importance weight; ours is the plain estimator",
}

_VALUES = "needs a value head, which this trainer has not"
_WHITENING = "token-level returns and whitening (REINFORCE++) are not among the advantages"
_REWARD = "a reward, tested with the rewards"

NOT_COVERED = {
    ("advantage", "reinforce_pp_returns"): _WHITENING,
    ("advantage", "masked_whiten_reinforce"): _WHITENING,
    ("advantage", "gae_returns"): _VALUES,
    ("advantage", "gae_masked_whiten"): _VALUES,
    ("advantage", "truncated_gae"): _VALUES,
    ("returns", "discounted_returns"): _VALUES,
    ("advantage", "maxrl"): "division by the group mean is not among the scales",
    ("stat", "group_mean_std"): "gives a group of one its raw score as advantage; ours gives it 0",
    ("stat", "masked_var_unbiased"): "only whitening needs a masked variance",
    ("aggregate", "token_mean_legacy_microbatch"): "averages micro-batches, which ours must not",
    ("kl", "adaptive_kl_controller"): "kl_weight is constant",
    ("kl", "k1_clamped"): "ours is never bounded",
    ("kl", "k3_with_grad"): "multiplies the KL by the importance weight and clamps at 2",
    ("reward", "ppo_kl_rewards"): "KL enters the loss here, never the reward",
    ("reward", "dapo_overlong"): _REWARD,
    ("reward", "soft_overlong_trl"): _REWARD,
    ("reward", "repetition_penalty"): _REWARD,
    ("reward", "cosine_scaled"): _REWARD,
}


@pytest.fixture(scope="module")
def cases(shared_data: Path) -> list[dict]:
    every = json.loads((shared_data / "goldens" / "losses.json").read_text())
    return [case for case in every if case["group"] not in ELSEWHERE]


def _key(case) -> tuple[str, str]:
    return case["group"], case["fn"]


@pytest.mark.parametrize("key", GOLDENS, ids="-".join)
def test_published_values_are_reproduced(cases, key):
    golden = GOLDENS[key]
    mine = [c for c in cases if _key(c) == key and c["id"] not in CONVENTIONS]
    assert len(mine) == golden.count
    for case in mine:
        got, expected = golden.run(case), case["expected"]
        if not isinstance(expected, dict):
            got, expected = {"value": got}, {"value": expected}
        assert set(got) == set(expected) - WRONG_ON_PURPOSE
        for name in got:
            np.testing.assert_allclose(
                np.asarray(got[name], float).reshape(np.shape(expected[name])),
                np.array(_number(expected[name]), float),
                rtol=max(case["rtol"], FLOAT32_RTOL),
                atol=case["atol"],
                err_msg=f"case {case['id']} {name}: {case['source']}",
            )


def test_every_case_is_either_run_or_has_a_reason_not_to(cases):
    assert not set(GOLDENS) & set(NOT_COVERED)
    assert {_key(c) for c in cases} == set(GOLDENS) | set(NOT_COVERED)
    assert set(CONVENTIONS) <= {c["id"] for c in cases if _key(c) in GOLDENS}
    counts = Counter(_key(c) for c in cases if c["id"] not in CONVENTIONS)
    assert sum(counts[key] for key in GOLDENS) == NUM_COVERED
