"""The composed loss: against a restatement of the papers in numpy, and its metrics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.algorithms.aggregation import token_weights
from jaxrl.algorithms.loss import policy_loss, sft_loss, shaped_advantages
from jaxrl.algorithms.loss_metrics import finish_metrics, merge_metrics, zero_metrics
from jaxrl.batch import Batch
from jaxrl.config import GrpoConfig
from jaxrl.packing import TrainSequence, pack

VOCAB, CONSTANT = 6, 9
VALUE_RTOL = 1e-5  # float32 sums of some 20 terms against float64
GRADIENT_ATOL = 2e-6  # float32 gradients of size 0.1; central differences in float64 add 1e-9
STEP = 1e-5  # of the central differences
EXACT = 1e-6  # float32 means of numbers with few digits

RNG = np.random.default_rng(3)
THETA = RNG.normal(0, 1, (VOCAB, VOCAB))  # logits of the next token, by token
OLD_THETA = THETA + RNG.normal(0, 0.25, THETA.shape)  # learner at the start of the batch
SAMPLER_THETA = THETA + RNG.normal(0, 0.25, THETA.shape)  # stale sampler
REFERENCE_THETA = THETA + RNG.normal(0, 0.5, THETA.shape)
LENGTHS = [(2, 3), (1, 5), (3, 1), (2, 4), (1, 2), (2, 6)]  # prompt, completion
TOKENS = [RNG.integers(0, VOCAB, sum(n)) for n in LENGTHS]
ADVANTAGES = np.array([1.2, -0.8, -0.4, 0.9, -1.5, 0.6])
GROUPS = np.array([0, 0, 0, 1, 1, 1])
MASKS = [np.arange(p + c) >= p for p, c in LENGTHS]
MASKS[5][4] = False  # a token inside a completion that the policy did not write


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _logprobs(theta: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Log-probability of each token given the one before it; 0 for the first."""
    return np.append(0.0, _log_softmax(theta[tokens[:-1]])[np.arange(len(tokens) - 1), tokens[1:]])


def _restatement(theta: np.ndarray, grpo: GrpoConfig) -> float:
    """The papers' objective, sequence by sequence and token by token, negated. float64."""
    totals, counts = [], []
    for tokens, mask, advantage in zip(TOKENS, MASKS, ADVANTAGES, strict=True):
        lp, lb = _logprobs(theta, tokens), _logprobs(SAMPLER_THETA, tokens)
        lo = lb if grpo.ratio_from == "sampler" else _logprobs(OLD_THETA, tokens)
        lr = _logprobs(REFERENCE_THETA, tokens)
        rho = np.exp((lp - lo)[mask])
        if grpo.ratio == "gspo":
            rho = np.full(rho.shape, np.exp((lp - lo)[mask].mean()))
        clipped = np.clip(rho, 1 - grpo.clip_low, 1 + grpo.clip_high)
        term = np.minimum(rho * advantage, clipped * advantage)
        if grpo.dual_clip and advantage < 0:
            term = np.maximum(term, grpo.dual_clip * advantage)
        w = np.exp((_logprobs(OLD_THETA, tokens) - lb)[mask])
        if grpo.correction == "truncated":
            term = term * np.minimum(w, grpo.correction_cap)
        if grpo.correction == "masked":
            cap = grpo.correction_cap
            term = term * np.where((w >= 1 / cap) & (w <= cap), w, 0.0)
        k3 = np.exp(lr - lp) - (lr - lp) - 1
        log_p = _log_softmax(theta[tokens[:-1]])
        entropy = np.append(0.0, -(np.exp(log_p) * log_p).sum(axis=-1))
        token = term - grpo.kl_weight * k3[mask] + grpo.entropy_weight * entropy[mask]
        totals.append(token.sum())
        counts.append(mask.sum())
    totals, counts = np.array(totals), np.array(counts)
    if grpo.aggregation == "token_mean":
        return -totals.sum() / counts.sum()
    if grpo.aggregation == "sequence_mean":
        return -np.mean(totals / counts)
    if grpo.aggregation == "prompt_mean":
        return -np.mean([totals[g == GROUPS].sum() / counts[g == GROUPS].sum() for g in (0, 1)])
    return -totals.sum() / (len(totals) * CONSTANT)


def _numeric_gradient(grpo: GrpoConfig) -> np.ndarray:
    gradient = np.zeros_like(THETA)
    for index in np.ndindex(THETA.shape):
        step = np.zeros_like(THETA)
        step[index] = STEP
        gradient[index] = _restatement(THETA + step, grpo) - _restatement(THETA - step, grpo)
    return gradient / (2 * STEP)


def _packed(grpo: GrpoConfig, *, rows_per_microbatch: int = 2) -> list[Batch]:
    counts = np.array([m.sum() for m in MASKS])
    weights = token_weights(counts, GROUPS, mode=grpo.aggregation, constant=CONSTANT)
    sequences = [
        TrainSequence(
            tokens=tokens.astype(np.int32),
            loss_mask=mask,
            sampler_logprobs=np.where(mask, _logprobs(SAMPLER_THETA, tokens), 0.0),
            advantages=np.where(mask, advantage, 0.0),
            token_weights=np.where(mask, weight, 0.0),
        )
        for tokens, mask, advantage, weight in zip(TOKENS, MASKS, ADVANTAGES, weights, strict=True)
    ]
    return pack(sequences, row_tokens=9, rows_per_microbatch=rows_per_microbatch)[0]


def _score(theta, batch: Batch) -> tuple[jax.Array, jax.Array]:
    log_p = jax.nn.log_softmax(jnp.asarray(theta, jnp.float32)[batch.tokens])
    logprobs = jnp.take_along_axis(log_p, batch.targets[..., None], axis=-1)[..., 0]
    return logprobs, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


@partial(jax.jit, static_argnums=2)
def _loss(theta, batch: Batch, grpo: GrpoConfig):
    logprobs, entropy = _score(theta, batch)
    return policy_loss(
        logprobs,
        entropy,
        batch,
        learner_logprobs=_score(OLD_THETA, batch)[0] if grpo.ratio_from == "learner" else None,
        reference_logprobs=_score(REFERENCE_THETA, batch)[0] if grpo.kl_weight else None,
        settings=grpo,
    )


SETTINGS = {
    "grpo": GrpoConfig(aggregation="sequence_mean", kl_weight=0.04, ratio_from="learner"),
    "dr_grpo": GrpoConfig(aggregation="constant"),
    "dapo": GrpoConfig(aggregation="token_mean", clip_high=0.28, dual_clip=1.3),
    "magistral": GrpoConfig(aggregation="prompt_mean", clip_high=0.28, entropy_weight=0.05),
    "gspo": GrpoConfig(ratio="gspo", aggregation="sequence_mean", clip_low=0.05, clip_high=0.1),
    "tis": GrpoConfig(ratio_from="learner", correction="truncated", correction_cap=1.2),
    "mis": GrpoConfig(ratio_from="learner", correction="masked", correction_cap=1.3),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_value_and_gradient_are_those_of_the_papers_objective(name):
    """Ragged lengths, a masked token inside a completion, stale sampler, stale learner."""
    grpo = SETTINGS[name]
    value, gradient = 0.0, np.zeros_like(THETA)
    for batch in _packed(grpo):
        part, slope = jax.value_and_grad(lambda t, b=batch: _loss(t, b, grpo)[0])(
            jnp.asarray(THETA, jnp.float32)
        )
        value, gradient = value + float(part), gradient + np.asarray(slope)
    np.testing.assert_allclose(value, _restatement(THETA, grpo), rtol=VALUE_RTOL)
    np.testing.assert_allclose(gradient, _numeric_gradient(grpo), atol=GRADIENT_ATOL)
    assert np.abs(gradient).max() > 1e3 * GRADIENT_ATOL


def test_the_settings_under_test_reach_every_bound():
    curves = {}
    for name in ("dapo", "gspo", "tis", "mis"):
        (batch,) = _packed(SETTINGS[name], rows_per_microbatch=4)
        curves[name] = finish_metrics(_loss(THETA, batch, SETTINGS[name])[1])
    for bound in ("low", "high", "lower"):
        assert curves["dapo"][f"actor/pg_clipfrac_{bound}"] > 0
    assert curves["gspo"]["actor/pg_clipfrac"] > 0
    assert 0 < curves["tis"]["tis/frac_clipped"] < 1
    assert 0 < curves["mis"]["tis/frac_clipped"] < 1


def test_merged_metrics_of_microbatches_are_those_of_the_whole():
    grpo = SETTINGS["grpo"]
    whole = [_loss(THETA, batch, grpo)[1] for batch in _packed(grpo, rows_per_microbatch=8)]
    parts = [_loss(THETA, batch, grpo)[1] for batch in _packed(grpo, rows_per_microbatch=1)]
    assert (len(whole), len(parts) > 1) == (1, True)
    merged = zero_metrics(parts[0])
    for part in parts:
        merged = merge_metrics(merged, part)
    expected, got = finish_metrics(whole[0]), finish_metrics(merged)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=VALUE_RTOL, atol=1e-7, err_msg=name)


def _one_row(mask, **fields) -> Batch:
    shape = (1, len(mask))
    zeros = jnp.zeros(shape, jnp.int32)
    values = {
        name: jnp.broadcast_to(jnp.asarray(fields.get(name, 0.0), jnp.float32), shape)
        for name in ("token_weights", "advantages", "sampler_logprobs")
    }
    return Batch(
        tokens=zeros,
        segment_ids=zeros + 1,
        positions=zeros,
        targets=zeros,
        loss_mask=jnp.asarray([mask]),
        **values,
    )


def _curves(logprobs, batch, *, learner=None, reference=None, settings=None):
    logprobs = jnp.asarray([logprobs], jnp.float32)
    loss, metrics = policy_loss(
        logprobs,
        jnp.full(logprobs.shape, 0.5),
        batch,
        learner_logprobs=None if learner is None else jnp.asarray([learner], jnp.float32),
        reference_logprobs=None if reference is None else jnp.asarray([reference], jnp.float32),
        settings=settings or GrpoConfig(),
    )
    return float(loss), finish_metrics(metrics)


@pytest.mark.parametrize(("advantage", "expected"), [(1.0, -1.491825), (-1.0, 1.491825)])
def test_decoupled_ppo_has_the_published_value(advantage, expected):
    """Ratio to the learner's start 1.105171, times learner / sampler 1.349859."""
    batch = _one_row([True], token_weights=1.0, advantages=advantage, sampler_logprobs=-1.3)
    settings = GrpoConfig(ratio_from="learner", correction="truncated", correction_cap=5.0)
    loss, curves = _curves([-0.9], batch, learner=[-1.0], settings=settings)
    np.testing.assert_allclose(loss, expected, atol=EXACT)
    np.testing.assert_allclose(curves["actor/ratio_mean"], 1.105171, atol=EXACT)
    np.testing.assert_allclose(curves["tis/weight_mean"], 1.349859, atol=EXACT)


def test_curves_are_means_over_loss_tokens_with_the_stated_signs():
    batch = _one_row([True, True, False], token_weights=[[0.5, 0.5, 0.0]],
                     sampler_logprobs=[[-1.0, -1.0, 0.0]])  # fmt: skip
    _, curves = _curves([-1.5, -0.9, 7.0], batch, reference=[-1.6, -1.2, 3.0])
    w = np.exp([-0.5, 0.1])
    expected = {
        "actor/entropy": 0.5,
        "actor/logprob_mean": -1.2,
        "actor/ppo_kl": 0.2,
        "actor/ratio_mean": w.mean(),
        "actor/ratio_max": w.max(),
        "mismatch/kl_mean": 0.2,
        "mismatch/k3_mean": (w - 1 - np.log(w)).mean(),
        "mismatch/logp_abs_diff_mean": 0.3,
        "mismatch/logp_abs_diff_max": 0.5,
        "mismatch/prob_abs_diff_mean": np.abs(np.exp([-1.5, -0.9]) - np.exp(-1)).mean(),
        "reference/logprob_mean": -1.4,
        "reference/kl_mean": (np.exp([-0.1, -0.3]) - 1 + np.array([0.1, 0.3])).mean(),
        "rl/importance_mean": w.mean(),
        "rl/ess": w.sum() ** 2 / (2 * (w**2).sum()),
        "batch/loss_tokens": 2.0,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(curves[name], value, atol=EXACT, err_msg=name)
    assert "tis/weight_mean" not in curves


@pytest.mark.parametrize(
    ("advantage", "entropy", "expected"),
    [
        (1.0, 0.5, 1.2),
        (1.0, 3.0, 1.5),
        (-1.0, 3.0, -0.5),
        (0.01, 0.0125, 0.015),
        (0.01, 2.0, 0.015),
    ],
)
def test_entropy_shapes_an_advantage_as_published_and_passes_no_gradient(
    advantage, entropy, expected
):
    """alpha 0.4, kappa 2."""

    def shaped(a, h):
        return shaped_advantages(a, h, alpha=0.4, kappa=2.0)

    at = jnp.float32(advantage), jnp.float32(entropy)
    np.testing.assert_allclose(float(shaped(*at)), expected, atol=EXACT)
    assert jax.grad(shaped, argnums=(0, 1))(*at) == (0.0, 0.0)


def test_the_covariance_of_log_probability_and_advantage_is_logged():
    batch = _one_row(
        [True, True, True, False], token_weights=1.0, advantages=[[1.0, -1.0, 0.5, 9.0]]
    )
    logprobs = [-0.2, -2.0, -1.0, 5.0]
    _, curves = _curves(logprobs, batch)
    expected = np.cov(logprobs[:3], [1.0, -1.0, 0.5], ddof=0)[0, 1]
    np.testing.assert_allclose(curves["actor/logprob_advantage_cov"], expected, atol=EXACT)


def test_the_first_step_on_a_batch_has_ratio_one_to_its_own_learner():
    batch = _one_row([True, True], token_weights=0.5, advantages=2.0, sampler_logprobs=-1.0)
    loss, curves = _curves([-1.5, -0.2], batch, settings=GrpoConfig(ratio_from="learner"))
    assert (loss, curves["actor/ratio_max"], curves["actor/ppo_kl"]) == (-2.0, 1.0, 0.0)
    assert curves["mismatch/logp_abs_diff_max"] > 0.7


def test_nothing_leaks_from_outside_the_loss_mask():
    mask = [True, False]
    clean = _one_row(mask, token_weights=[[1.0, 0.0]], advantages=1.0, sampler_logprobs=-1.0)
    dirty = _one_row(mask, token_weights=[[1.0, 0.0]], advantages=1.0,
                     sampler_logprobs=[[-1.0, np.nan]])  # fmt: skip
    settings = SETTINGS["grpo"]
    expected = _curves([-1.1, 0.0], clean, reference=[-1.2, 0.0], settings=settings)
    got = _curves([-1.1, np.nan], dirty, reference=[-1.2, np.inf], settings=settings)
    assert got == expected

    slope = jax.grad(
        lambda x: policy_loss(
            x, x, dirty, learner_logprobs=None, reference_logprobs=x, settings=settings
        )[0]
    )(jnp.array([[-1.1, jnp.nan]]))
    assert float(slope[0, 1]) == 0.0
    assert np.isfinite(slope[0, 0])


def test_gradient_flows_through_logprobs_and_entropy_only():
    batch = _one_row([True, True], token_weights=0.5, advantages=[[1.0, -1.0]],
                     sampler_logprobs=-1.0)  # fmt: skip
    settings = GrpoConfig(
        ratio_from="learner", correction="truncated", kl_weight=0.1, entropy_weight=0.1
    )

    def loss(logprobs, entropy, weights, sampler, learner, reference):
        changed = Batch(
            **{
                **{name: getattr(batch, name) for name in Batch.__dataclass_fields__},
                "token_weights": weights,
                "sampler_logprobs": sampler,
            }
        )
        return policy_loss(
            logprobs,
            entropy,
            changed,
            learner_logprobs=learner,
            reference_logprobs=reference,
            settings=settings,
        )[0]

    x = jnp.array([[-0.7, -1.2]])
    gradients = jax.grad(loss, argnums=tuple(range(6)))(
        x, x * 0 + 0.5, batch.token_weights, batch.sampler_logprobs, x - 0.1, x - 0.3
    )
    assert [bool(np.any(g)) for g in gradients] == [True, True, False, False, False, False]


def test_the_entropy_bonus_lowers_the_loss():
    batch = _one_row([True, True], token_weights=0.5, sampler_logprobs=-1.0)
    without, _ = _curves([-1.0, -1.0], batch)
    with_bonus, _ = _curves([-1.0, -1.0], batch, settings=GrpoConfig(entropy_weight=0.1))
    np.testing.assert_allclose(with_bonus - without, -0.1 * 0.5, atol=EXACT)


def test_a_batch_without_loss_tokens_gives_zero_loss_and_finite_metrics():
    loss, curves = _curves([-1.0, -1.0], _one_row([False, False]), reference=[-1.0, -1.0])
    assert loss == 0.0
    assert set(curves.values()) == {0.0}


def test_a_kl_weight_without_a_reference_is_refused():
    batch = _one_row([True])
    with pytest.raises(ValueError, match="needs reference_logprobs"):
        _curves([-1.0], batch, settings=GrpoConfig(kl_weight=0.1))


def test_sft_loss_is_the_mean_cross_entropy_of_the_solution_tokens():
    batch = _one_row([False, True, True], token_weights=[[0.0, 0.5, 0.5]])
    got = sft_loss(jnp.array([[jnp.nan, -1.0, -3.0]]), batch)
    assert float(got) == 2.0
