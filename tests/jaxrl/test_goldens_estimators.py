"""Published values of aggregations and KL estimators, run through our functions.

../shared/data/goldens/losses.json holds cases with their sources. GOLDENS says which function or
option of ours gives each kind, CONVENTIONS which option a single case needs. The numbers of cases are
asserted, so that coverage cannot shrink unseen.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.algorithms.aggregation import token_weights
from jaxrl.algorithms.kl import adapted_kl_weight, kl_estimate, kl_term
from jaxrl.algorithms.loss import policy_loss, sft_loss
from jaxrl.algorithms.segments import segment_mean
from jaxrl.batch import Batch
from jaxrl.config import GrpoConfig

GROUPS = {"aggregate", "kl"}
MEANS = {"masked_mean", "masked_mean_axis1", "global_weighted_mean"}  # of the group "stat"


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


def _aggregate(values, mask, mode, constant=1.0, count_empty=False) -> float:
    """sum of weight * value through the path of training: host weights, device sum."""
    values, mask = _f32(values), _bool(mask)
    counts = np.asarray(mask).sum(axis=1)
    weights = token_weights(
        counts, np.arange(len(counts)), mode=mode, constant=constant, count_empty=count_empty
    )
    batch = _batch(mask, weights=np.where(mask, weights[:, None], 0.0))
    return float(sft_loss(-values, batch))


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
    return {
        "global": _aggregate(values, mask, "token_mean"),
        "mean_of_means": np.mean(
            [_aggregate(v, k, "token_mean") for v, k in zip(values, mask, strict=True)]
        ),
    }


def _values(case):
    inputs = case["inputs"]
    values = inputs.get("values", inputs.get("per_token_loss"))
    return np.array(values, float), np.array(inputs.get("mask", inputs.get("completion_mask")))


def _aggregation(mode, constant: Callable[[dict, Any], float] = lambda params, mask: 1.0):
    """constant(params, mask [rows, T]) is the divisor of that library's mode."""

    def run(case):
        values, mask = _values(case)
        empty = case["id"] in CONVENTIONS
        divisor = constant(case["params"], mask)
        return _aggregate(values, mask, mode, divisor, count_empty=empty)

    return run


def _mean_of_microbatches(case):
    """What averaging token means of micro-batches gives; ours takes one mean over all."""
    values, mask = _values(case)
    size = case["params"]["micro_batch_size"]
    starts = range(0, len(values), size)
    return np.mean(
        [_aggregate(values[i : i + size], mask[i : i + size], "token_mean") for i in starts]
    )


def _masked_sum(case):
    mask = _bool(case["inputs"]["mask"])
    return sft_loss(-_f32(case["inputs"]["loss"]), _batch(mask, weights=np.asarray(mask)))


def _kl(estimator):
    def run(case):
        inputs, params = case["inputs"], case["params"]
        logprobs = jnp.asarray(np.array(inputs["logprobs"], np.float32))
        reference = jnp.asarray(np.array(inputs["ref_logprobs"], np.float32))
        bound = params.get("output_clamp", params.get("clamp_value", 0.0))
        if bound:  # kl_bound
            values = kl_term(logprobs, reference, estimator, bound=bound, max_log_ratio=1e3)
        else:
            values = kl_estimate(logprobs, reference, estimator)
        return np.asarray(values) * np.array(inputs.get("mask", 1.0))

    return run


def _importance_weighted_k3(case):
    """kl_importance, on policy: the weight is 1 and has a gradient."""
    logprobs, reference = _f32(case["inputs"]["logprobs"]), _f32(case["inputs"]["ref_logprobs"])

    def run(x):
        ratio = jnp.exp(x - jax.lax.stop_gradient(x))
        clamp = case["params"]["input_clamp"]
        return kl_term(x, reference, "k3", ratio=ratio, max_log_ratio=clamp)

    return {"kl": run(logprobs), "grad_logprobs": jax.grad(lambda x: run(x).sum())(logprobs)}


def _kl_gradient(case):
    """kl_importance: k3 times the policy ratio has the gradient of KL(policy || reference).

    The ratio is to the policy itself (ratio_from=learner at the first update), or to the sampler.
    """
    inputs, params = case["inputs"], case["params"]
    logprobs = _f32(inputs["curr_logprobs"])
    mask = jnp.ones(logprobs.shape, bool)
    batch = _batch(
        mask,
        advantages=inputs["advantages"],
        sampler=inputs["generation_logprobs"],
        weights=1 / logprobs.size,
    )

    def gradient(kl_weight):
        settings = GrpoConfig(
            ratio_from="sampler" if params["use_on_policy_kl_approximation"] else "learner",
            kl_weight=kl_weight, kl_estimator="k3", kl_importance=kl_weight != 0,
        )  # fmt: skip
        return jax.grad(
            lambda x: policy_loss(
                x,
                jnp.zeros(x.shape),
                batch,
                learner_logprobs=None,
                reference_logprobs=_f32(inputs["reference_logprobs"]),
                settings=settings,
            )[0]
        )(logprobs)

    return gradient(params["beta"]) - gradient(0.0)


def _controller(case):
    inputs = case["inputs"]
    return adapted_kl_weight(
        inputs["init_kl_coef"], inputs["current"], target=inputs["target"],
        horizon=inputs["horizon"], num_samples=inputs["n_steps"],
    )  # fmt: skip


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
    ("stat", "masked_mean"): Golden(_masked_mean, 7),
    ("stat", "masked_mean_axis1"): Golden(_row_means, 2),
    ("stat", "global_weighted_mean"): Golden(_global_mean, 1),
    ("aggregate", "seq_mean_token_mean"): Golden(_aggregation("sequence_mean"), 3),
    ("aggregate", "sequence_mean"): Golden(_aggregation("sequence_mean"), 1),
    ("aggregate", "sequence-mean-token-mean"): Golden(_aggregation("sequence_mean"), 2),
    ("aggregate", "token_mean"): Golden(_aggregation("token_mean"), 3),
    ("aggregate", "token-mean"): Golden(_aggregation("token_mean"), 2),
    ("aggregate", "token_mean_legacy_microbatch"): Golden(_mean_of_microbatches, 1),
    ("aggregate", "sequence-mean-token-scale"): Golden(
        _aggregation("constant", lambda params, mask: params.get("norm", mask.shape[1])), 2
    ),
    ("aggregate", "sequence-mean-token-sum-norm"): Golden(
        _aggregation("constant_sum", lambda params, mask: params.get("norm", len(mask))), 4
    ),
    ("aggregate", "seq-mean-token-sum"): Golden(_aggregation("sequence_sum"), 2),
    ("aggregate", "masked_sum"): Golden(_masked_sum, 1),
    ("kl", "k1"): Golden(_kl("k1"), 4),
    ("kl", "k1_clamped"): Golden(_kl("k1"), 1),
    ("kl", "k2"): Golden(_kl("k2"), 1),
    ("kl", "k3"): Golden(_kl("k3"), 4),
    ("kl", "k3_with_grad"): Golden(_importance_weighted_k3, 1),
    ("kl", "kl_penalty_gradient"): Golden(_kl_gradient, 2),
    ("kl", "adaptive_kl_controller"): Golden(_controller, 1),
}

CONVENTIONS = {50: "count_empty: a sequence without loss tokens counts in the mean, as in TRL"}


@pytest.fixture(scope="module")
def cases(golden_cases) -> list[dict]:
    return [c for c in golden_cases if c["group"] in GROUPS or c["fn"] in MEANS]


def _key(case) -> tuple[str, str]:
    return case["group"], case["fn"]


@pytest.mark.parametrize("key", GOLDENS, ids="-".join)
def test_published_values_are_reproduced(cases, assert_golden, key):
    golden = GOLDENS[key]
    mine = [case for case in cases if _key(case) == key]
    assert len(mine) == golden.count
    for case in mine:
        assert_golden(case, golden.run(case))


def test_every_published_aggregation_and_estimator_is_run(cases):
    assert Counter(map(_key, cases)) == {key: golden.count for key, golden in GOLDENS.items()}
    assert set(CONVENTIONS) <= {case["id"] for case in cases}
