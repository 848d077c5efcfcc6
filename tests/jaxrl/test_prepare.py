"""Learner and preparation together: minibatches, scores, critic, refreshed reference, adapted KL."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl.algorithms.kl import adapted_kl_weight
from jaxrl.config import GrpoConfig
from jaxrl.learner.critic import critic_adam
from jaxrl.learner.learner import Learner
from jaxrl.learner.optimizer import adamw, learning_rate
from jaxrl.learner.prepare import Rows, prepare
from jaxrl.learner.steps import ForwardSettings
from jaxrl.observe import Observer
from jaxrl.packing import groups_to_sequences, pack, unpack
from jaxrl.types import Completion, Finish, Problem, Prompt, Reward, Rollout, RolloutGroup
from models.config import ModelConfig
from models.sharding import init_sharded, make_mesh

ROWS = Rows(row_tokens=24, rows_per_microbatch=4, max_new_tokens=8)
SCORE_ATOL = 1e-5  # float32 log-probabilities of the same weights in differently packed rows
SUM_RTOL = 1e-5  # float32 sums of token weights


@pytest.fixture(scope="module")
def small_model() -> ModelConfig:
    return ModelConfig(
        vocab_size=14, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_size=8,
        ffw_size=32, qk_norm=True, max_positions=32,
    )  # fmt: skip


pytestmark = pytest.mark.usefixtures("optax_promotes")


def _learner(model: ModelConfig, grpo: GrpoConfig, *, devices: int = 1) -> Learner:
    mesh = make_mesh(jax.devices()[:devices], fsdp=devices)
    rate = learning_rate(peak=1e-2, warmup_steps=0, steps=10, schedule="constant")
    learner = Learner(
        model, mesh, init_sharded(model, jax.random.key(0), mesh, np.float32),
        adamw(model, rate, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, max_grad_norm=1.0),
        forward=ForwardSettings(dtype=np.float32, temperature=1.0, chunk_tokens=64, remat=False),
        grpo=grpo, max_nonfinite_steps=2, observer=Observer(),
        critic_optimizer=critic_adam(learning_rate=1e-2, max_grad_norm=1.0)
        if grpo.advantage_baseline == "value" else None,
    )  # fmt: skip
    if learner.needs_reference:
        learner.freeze_reference()
    return learner


def _groups(number: int = 6, size: int = 4) -> list[RolloutGroup]:
    rng = np.random.default_rng(1)
    made = []
    for p in range(number):
        rollouts = []
        for g in range(size):
            length = int(rng.integers(1, 9))
            completion = Completion(
                tokens=rng.integers(2, 14, length).astype(np.int32),
                sampler_logprobs=(-2.6 + 0.2 * rng.normal(size=length)).astype(np.float32),
                versions=np.zeros(length, np.int32),
                finish=Finish.LENGTH if length == 8 else Finish.STOP,
                sample_index=g,
            )
            reward = Reward(total=float(g < 1 + p % 3), correct=g < 1 + p % 3)
            rollouts.append(Rollout(completion=completion, text="", reward=reward))
        problem = Problem(id=p, prompt="", answer="", solution="")
        prompt = Prompt(index=p, problem=problem, tokens=tuple(rng.integers(2, 14, 3).tolist()))
        made.append(RolloutGroup(prompt=prompt, birth_version=0, rollouts=tuple(rollouts)))
    return made


def _ppo(**settings: object) -> GrpoConfig:
    return GrpoConfig(
        advantage_baseline="value", advantage_scale="token_std", drop_zero_advantage=False,
        ratio_from="learner", **settings,
    )  # fmt: skip


def _leaves(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def _same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(_leaves(a), _leaves(b), strict=True))


def test_unpack_is_the_inverse_of_pack():
    sequences, _ = groups_to_sequences(_groups(), GrpoConfig(), 8)
    batches, _ = pack(sequences, row_tokens=24, rows_per_microbatch=4)
    got = unpack(sequences, [b.sampler_logprobs for b in batches], row_tokens=24)
    for mine, sequence in zip(got, sequences, strict=True):
        np.testing.assert_array_equal(mine, sequence.sampler_logprobs)


def test_minibatches_hold_whole_groups_and_have_denominators_of_their_own(small_model):
    settings = GrpoConfig(minibatches=4, aggregation="token_mean", ratio_from="learner")
    prepared = prepare(_groups(), settings, ROWS, _learner(small_model, settings))
    assert len(prepared.minibatches) == 4
    for batches in prepared.minibatches:
        total = sum(float(b.token_weights.sum()) for b in batches)
        assert total == pytest.approx(1.0, rel=SUM_RTOL)
        for batch in batches:  # a fresh learner scored what it now trains on
            assert batch.learner_logprobs[batch.loss_mask].max() < 0
    tokens = sum(int(b.loss_mask.sum()) for batches in prepared.minibatches for b in batches)
    whole, _ = groups_to_sequences(_groups(), settings, 8)
    assert tokens == sum(int(s.loss_mask.sum()) for s in whole)


def test_rejected_completions_have_no_weight_and_are_in_no_denominator(small_model):
    """A completion is kept where its mean log-ratio is near 0: the sampler's values are around -2.6."""
    settings = GrpoConfig(
        sequence_mask="geometric", mask_low=0.95, mask_high=1.05, correction_denominator="kept"
    )
    prepared = prepare(_groups(), settings, ROWS, _learner(small_model, settings))
    kept, rejected = 0, 0
    for batch in prepared.minibatches[0]:
        difference = batch.learner_logprobs - batch.sampler_logprobs
        for row, ids in enumerate(batch.segment_ids):
            for segment in range(1, ids.max() + 1):
                loss = batch.loss_mask[row] & (ids == segment)
                near = 0.95 <= np.exp(difference[row][loss].mean()) <= 1.05
                assert np.all((batch.token_weights[row][loss] > 0) == near)
                kept, rejected = kept + near * loss.sum(), rejected + (not near)
    assert rejected > 0
    weights = np.concatenate(
        [b.token_weights[b.token_weights > 0] for b in prepared.minibatches[0]]
    )
    np.testing.assert_allclose(weights, 1 / kept, rtol=SUM_RTOL)


def test_a_batch_whose_every_completion_is_rejected_makes_no_update(small_model):
    settings = GrpoConfig(
        sequence_mask="product", mask_low=0.0, mask_high=1 + 1e-9, correction_denominator="kept",
        minibatches=2,
    )  # fmt: skip
    groups = [
        dataclasses.replace(
            group,
            rollouts=tuple(
                dataclasses.replace(
                    r,
                    completion=dataclasses.replace(
                        r.completion, sampler_logprobs=r.completion.sampler_logprobs - 5
                    ),
                )
                for r in group.rollouts
            ),
        )
        for group in _groups()
    ]
    prepared = prepare(groups, settings, ROWS, _learner(small_model, settings))
    assert prepared.minibatches == []
    assert prepared.padding_ratio == 0.0


def test_a_step_makes_every_update_the_first_at_ratio_one_and_traces_nothing_anew(small_model):
    settings = GrpoConfig(minibatches=2, epochs=2, ratio_from="learner")
    learner = _learner(small_model, settings)
    prepared = prepare(_groups(), settings, ROWS, learner)
    first = learner.update(prepared.minibatches[0])
    assert first["actor/ratio_max"] == pytest.approx(1.0, abs=SCORE_ATOL)
    curves = learner.update_step(prepared.minibatches, step=1)
    assert int(learner.state.step) == 5
    assert curves["actor/ratio_max"] > 1.001
    traced = learner.trace_count
    learner.update_step(prepare(_groups(), settings, ROWS, learner).minibatches, step=2)
    assert learner.trace_count == traced


def test_curves_of_several_updates_are_their_means_and_maxima():
    updates = [
        {"actor/ratio_max": 1.5, "actor/loss": 1.0},
        {"actor/ratio_max": 1.1, "actor/loss": 3},
    ]
    fake: Any = SimpleNamespace(_grpo=GrpoConfig(minibatches=2, epochs=2), update=lambda one: one)
    curves = Learner.update_step(fake, updates, step=1)
    assert curves == {"actor/ratio_max": 1.5, "actor/loss": 2.0}


@pytest.mark.parametrize("trunk", [pytest.param("separate", marks=pytest.mark.slow), "shared"])
def test_the_critic_learns_the_returns(small_model, trunk):
    """The reward is 1 everywhere, so that a value of 1 is right at every token."""
    settings = _ppo(
        critic_trunk=trunk, reward_shift=1e3, reward_scale=1e-3, value_weight=10.0, value_clip=0.0
    )
    learner = _learner(small_model, settings)
    curves = [
        learner.update_step(prepare(_groups(), settings, ROWS, learner).minibatches, step=s)
        for s in range(40)
    ]
    assert curves[0]["critic/value_mean"] == 0.0
    assert curves[0]["critic/value_loss"] == pytest.approx(0.5, abs=0.01)
    assert curves[-1]["critic/value_loss"] < 0.1 * curves[0]["critic/value_loss"]


def test_the_value_loss_has_its_weight_in_the_loss(small_model):
    losses = []
    for weight in (1.0, 3.0):
        settings = _ppo(critic_trunk="shared", value_weight=weight)
        learner = _learner(small_model, settings)
        (batch, *_), *_ = prepare(_groups(), settings, ROWS, learner).minibatches
        loss, metrics = learner.programs["loss"](learner._model, batch, None)
        losses.append(float(loss))
    of_values = float(metrics.weighted["critic/value_loss"])
    assert of_values > 0.01
    assert losses[1] - losses[0] == pytest.approx(2 * of_values, rel=1e-3)


def test_the_critic_warms_up_before_the_policy_moves(small_model):
    settings = _ppo(critic_warmup_steps=2)
    learner = _learner(small_model, settings)
    first = _leaves(learner.state.policy)
    critics = []
    for step in range(2):
        learner.update_step(prepare(_groups(), settings, ROWS, learner).minibatches, step=step)
        assert all(
            np.array_equal(a, b) for a, b in zip(first, _leaves(learner.state.policy), strict=True)
        )
        critics.append(_leaves(learner.state.critic))
    assert not np.array_equal(critics[0][-1], critics[1][-1])
    learner.update_step(prepare(_groups(), settings, ROWS, learner).minibatches, step=2)
    assert not _same(first, learner.state.policy)


def test_the_reference_is_refreshed_when_due(small_model):
    settings = GrpoConfig(kl_weight=0.01, reference_refresh_steps=2)
    learner = _learner(small_model, settings)
    kl = []
    for step in range(1, 5):
        prepared = prepare(_groups(), settings, ROWS, learner)
        kl.append(learner.update_step(prepared.minibatches, step)["reference/kl_mean"])
    assert abs(kl[0]) < SCORE_ATOL < kl[1]
    assert abs(kl[2]) < SCORE_ATOL < kl[3]


def test_the_weight_of_the_kl_in_the_reward_is_adapted(small_model):
    settings = GrpoConfig(
        advantage_baseline="none", advantage_scale="token_std", drop_zero_advantage=False,
        ratio_from="learner", kl_in="reward", kl_estimator="k1", kl_weight=0.1, kl_target=1e-9,
        kl_horizon=24,
    )  # fmt: skip
    learner = _learner(small_model, settings)
    for step in range(1, 4):
        weight = learner.kl_weight
        prepared = prepare(_groups(), settings, ROWS, learner)
        learner.update_step(prepared.minibatches, step)
        assert prepared.metrics["reward/kl_weight"] == weight
        expected = adapted_kl_weight(
            weight, prepared.metrics["reward/kl"], target=1e-9, horizon=24, num_samples=24
        )
        assert learner.kl_weight == pytest.approx(expected, rel=SUM_RTOL)
        assert learner.kl_weight != weight


def test_the_entropy_quantile_is_over_the_whole_batch_and_both_denominators_are_offered(
    small_model,
):
    settings = GrpoConfig(top_entropy_share=0.2)
    learner = _learner(small_model, settings)
    prepared = prepare(_groups(12), settings, ROWS, learner)
    assert len(prepared.minibatches[0]) > 1
    assert prepared.metrics["filter/frac_tokens_kept"] == pytest.approx(0.2, abs=0.02)
    entropy = np.concatenate([b.learner_entropy[b.loss_mask] for b in prepared.minibatches[0]])
    advantages = np.concatenate([b.advantages[b.loss_mask] for b in prepared.minibatches[0]])
    threshold = prepared.metrics["filter/entropy_threshold"]
    np.testing.assert_array_equal(advantages != 0, entropy >= threshold)
    kept = prepare(
        _groups(12),
        GrpoConfig(top_entropy_share=0.2, top_entropy_denominator="kept"),
        ROWS,
        learner,
    )
    ratio = (
        kept.minibatches[0][0].token_weights.max() / prepared.minibatches[0][0].token_weights.max()
    )
    assert ratio == pytest.approx(1 / prepared.metrics["filter/frac_tokens_kept"], rel=SUM_RTOL)


@pytest.mark.slow
def test_eight_devices_train_the_critic_as_one_does(small_model):
    made = []
    for devices in (1, 8):
        settings = _ppo(minibatches=2)
        rows = Rows(row_tokens=24, rows_per_microbatch=8, max_new_tokens=8)
        learner = _learner(small_model, settings, devices=devices)
        prepared = prepare(_groups(), settings, rows, learner)
        made.append(learner.update_step(prepared.minibatches, step=1))
    for name in ("actor/loss", "critic/value_loss", "actor/grad_norm"):
        assert made[0][name] == pytest.approx(made[1][name], rel=2e-3, abs=1e-6), name
