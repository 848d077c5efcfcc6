"""From groups of rollouts to training sequences: advantages, filters, weights, curves."""

import dataclasses

import numpy as np
import pytest

from jaxrl.algorithms.advantages import group_advantages
from jaxrl.algorithms.rewards import shaped_rewards
from jaxrl.config import GrpoConfig
from jaxrl.packing import groups_to_sequences
from jaxrl.presets import presets
from jaxrl.types import Completion, Finish, Problem, Prompt, Reward, Rollout, RolloutGroup

ROUNDING = 1e-6  # float32 fields against float64 arithmetic
MAX_NEW = 10
ARRAYS = ("tokens", "loss_mask", "sampler_logprobs", "advantages", "token_weights")


def _group(prompt: list[int], samples: list[tuple[int, float, Finish]]) -> RolloutGroup:
    """Samples of (length, reward, finish); token k of sample g is 100 * g + k."""
    rollouts = tuple(
        Rollout(
            completion=Completion(
                tokens=np.arange(length, dtype=np.int32) + 100 * g,
                sampler_logprobs=-0.1 * np.arange(1, length + 1, dtype=np.float32),
                versions=np.zeros(length, np.int32),
                finish=finish,
                sample_index=g,
            ),
            text="",
            reward=Reward(
                total=reward, parts={"format": 0.5, "length": reward}, correct=reward > 0
            ),
        )
        for g, (length, reward, finish) in enumerate(samples)
    )
    problem = Problem(id=0, prompt="", answer="", solution="")
    return RolloutGroup(
        prompt=Prompt(index=0, problem=problem, tokens=tuple(prompt)),
        birth_version=0,
        rollouts=rollouts,
    )


S, L = Finish.STOP, Finish.LENGTH
MIXED = _group([7, 8], [(2, 1.0, S), (4, 0.0, S), (10, 0.0, L)])
SOLVED = _group([9], [(1, 1.0, S), (2, 1.0, S), (3, 1.0, S)])
OTHER = _group([7, 8, 9], [(3, 0.0, S), (5, 1.0, S), (10, 1.0, L)])


def test_a_sequence_is_prompt_then_completion_with_loss_on_the_completion():
    sequences, _ = groups_to_sequences([MIXED], GrpoConfig(group_size=3), MAX_NEW)
    first = sequences[1]
    assert first.tokens.tolist() == [7, 8, 100, 101, 102, 103]
    assert first.loss_mask.tolist() == [False] * 2 + [True] * 4
    np.testing.assert_allclose(
        first.sampler_logprobs, [0, 0, -0.1, -0.2, -0.3, -0.4], rtol=ROUNDING
    )
    advantage = group_advantages(np.array([[1.0, 0.0, 0.0]]))[0, 1]
    np.testing.assert_allclose(first.advantages, [0, 0] + [advantage] * 4, rtol=ROUNDING)
    np.testing.assert_allclose(first.token_weights, [0, 0] + [1 / 16] * 4, rtol=ROUNDING)
    dtypes = {n: getattr(first, n).dtype.name for n in ARRAYS}
    assert dtypes == {
        "tokens": "int32",
        "loss_mask": "bool",
        "sampler_logprobs": "float32",
        "advantages": "float32",
        "token_weights": "float32",
    }


def test_groups_of_equal_rewards_leave_the_batch_and_its_denominators():
    alone, _ = groups_to_sequences([MIXED], GrpoConfig(), MAX_NEW)
    beside, curves = groups_to_sequences([SOLVED, MIXED, SOLVED], GrpoConfig(), MAX_NEW)
    assert len(beside) == len(alone) == 3
    for a, b in zip(alone, beside, strict=True):
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert curves["filter/dropped_groups"] == 2.0
    assert curves["filter/frac_reward_zero_std"] == pytest.approx(2 / 3)


def test_groups_of_equal_rewards_can_be_kept_with_advantage_zero():
    settings = GrpoConfig(drop_zero_advantage=False)
    sequences, curves = groups_to_sequences([SOLVED, MIXED], settings, MAX_NEW)
    assert len(sequences) == 6
    assert not sequences[0].advantages.any()
    np.testing.assert_allclose(sequences[0].token_weights[-1], 1 / 22, rtol=ROUNDING)
    assert curves["filter/dropped_groups"] == 0.0
    assert curves["filter/frac_reward_zero_std"] == 0.5


def test_a_batch_of_equal_rewards_only_is_empty_and_counted():
    sequences, curves = groups_to_sequences([SOLVED, SOLVED], GrpoConfig(), MAX_NEW)
    assert sequences == []
    assert curves["filter/dropped_groups"] == 2.0
    assert curves["advantage/abs_mean"] == 0.0
    assert np.isfinite(list(curves.values())).all()


def test_masked_truncated_samples_count_in_the_baseline_but_not_in_the_loss():
    settings = GrpoConfig(mask_truncated=True, advantage_scale="none")
    sequences, curves = groups_to_sequences([MIXED, OTHER], settings, MAX_NEW)
    assert [len(s.tokens) for s in sequences] == [4, 6, 6, 8]
    assert curves["filter/masked_truncated"] == 2.0
    assert curves["completions/clipped_ratio"] == pytest.approx(1 / 3)
    np.testing.assert_allclose(sequences[0].advantages[-1], 1 - 1 / 3, rtol=ROUNDING)
    np.testing.assert_allclose(sequences[0].token_weights[-1], 1 / 14, rtol=ROUNDING)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [1 / 34] * 6),
        ("sequence_mean", [1 / (6 * n) for n in (2, 4, 10, 3, 5, 10)]),
        ("prompt_mean", [1 / 32] * 3 + [1 / 36] * 3),
        ("constant", [1 / 60] * 6),
    ],
)
def test_weights_follow_the_chosen_aggregation(aggregation, expected):
    settings = GrpoConfig(aggregation=aggregation)
    sequences, _ = groups_to_sequences([MIXED, OTHER], settings, MAX_NEW)
    got = [s.token_weights[-1] for s in sequences]
    np.testing.assert_allclose(got, expected, rtol=ROUNDING)


def test_curves_describe_all_samples():
    _, curves = groups_to_sequences([MIXED, SOLVED], GrpoConfig(advantage_scale="none"), MAX_NEW)
    expected = {
        "reward/mean": 4 / 6,
        "reward/std": np.std([1, 0, 0, 1, 1, 1]),
        "reward/min": 0.0,
        "reward/max": 1.0,
        "reward/format/mean": 0.5,
        "reward/length/mean": 4 / 6,
        "train/accuracy": 4 / 6,
        "completions/mean_length": 22 / 6,
        "completions/min_length": 1.0,
        "completions/max_length": 10.0,
        "completions/clipped_ratio": 1 / 6,
        "completions/mean_terminated_length": 12 / 5,
        "prompt_length/mean": 1.5,
        "filter/dropped_groups": 1.0,
        "filter/frac_reward_zero_std": 0.5,
        "filter/masked_truncated": 0.0,
        "advantage/abs_mean": (2 / 3 + 1 / 3 + 1 / 3) / 3,
    }
    assert curves == pytest.approx(expected)


def test_no_groups_make_no_sequences():
    assert groups_to_sequences([], GrpoConfig(), MAX_NEW) == ([], {})


def test_shaped_rewards_are_shifted_scaled_and_pay_for_length():
    """MIXED has lengths 2, 4, 10 and rewards 1, 0, 0; the limit is 10, the buffer 4."""
    settings = GrpoConfig(
        reward_shift=-0.5, reward_scale=2.0, length_reward="soft_overlong", overlong_buffer=4
    )
    np.testing.assert_allclose(shaped_rewards([MIXED], settings, MAX_NEW), [[1, -1, -2]])
    spared = dataclasses.replace(settings, overlong_on="correct")
    np.testing.assert_allclose(shaped_rewards([MIXED], spared, MAX_NEW), [[1, -1, -1]])


@pytest.mark.parametrize(
    ("correct", "length", "reward"),
    [(True, 100, 1), (True, 20480, 0), (False, 100, -1), (False, 20480, -2), (True, 18432, 0.5)],
)
def test_dapo_pays_plus_or_minus_one_and_takes_off_over_the_last_fifth(correct, length, reward):
    """Its algorithm file at the paper's limit of 20480 tokens."""
    dapo = next(p for p in presets() if p.name == "dapo").config.grpo
    group = _group([7], [(length, float(correct), S), (1, 0.0, S)])
    assert shaped_rewards([group], dapo, 20480)[0, 0] == reward


COIN = 4 * 0.5 / np.sqrt(4000)  # four standard errors of a share of 4000 coins


def test_controls_pay_a_coin_or_the_form():
    groups = [
        dataclasses.replace(MIXED, prompt=dataclasses.replace(MIXED.prompt, index=n))
        for n in range(4000)
    ]
    coins = shaped_rewards(groups, GrpoConfig(reward_from="random"), MAX_NEW)
    assert set(np.unique(coins)) == {0.0, 1.0}
    assert (
        abs(coins.mean(axis=0) - 0.5).max() < COIN
    )  # whichever sample: the first one is the right one
    assert abs(np.corrcoef(coins.T)[np.triu_indices(3, 1)]).max() < 2 * COIN
    again = shaped_rewards(groups[:9], GrpoConfig(reward_from="random"), MAX_NEW)
    np.testing.assert_array_equal(coins[:9], again)
    advantages = group_advantages(coins)
    assert abs(advantages[:, 0].mean()) < 4 / np.sqrt(4000)  # of the sample that solves it
    form = shaped_rewards(groups[:9], GrpoConfig(reward_from="format"), MAX_NEW)
    assert (form == 0.5).all()  # the parts of these verdicts


def test_signal_may_mean_correctness_alone():
    """All correct, but one pays for its length: signal in the total, none in correctness."""
    group = _group([7], [(2, 1.0, S), (9, 1.0, S)])
    settings = GrpoConfig(length_reward="soft_overlong", overlong_buffer=4)
    kept, _ = groups_to_sequences([group], settings, MAX_NEW)
    assert len(kept) == 2
    by_correctness = dataclasses.replace(settings, signal_from="correct")
    assert groups_to_sequences([group], by_correctness, MAX_NEW)[0] == []


def test_only_correct_samples_may_be_trained_on():
    settings = GrpoConfig(
        keep_samples="correct", advantage_baseline="none", advantage_scale="none",
        drop_zero_advantage=False,
    )  # fmt: skip
    sequences, _ = groups_to_sequences([MIXED, SOLVED], settings, MAX_NEW)
    assert [len(s.tokens) for s in sequences] == [4, 2, 3, 4]
    assert {float(s.advantages[-1]) for s in sequences} == {1.0}
    np.testing.assert_allclose(sequences[0].token_weights[-1], 1 / 8, rtol=ROUNDING)


def test_truncated_samples_may_count_in_the_denominator():
    settings = GrpoConfig(mask_truncated=True, count_masked=True, aggregation="sequence_mean")
    sequences, _ = groups_to_sequences([MIXED], settings, MAX_NEW)
    assert len(sequences) == 2
    np.testing.assert_allclose(sequences[0].token_weights[-1], 1 / (3 * 2), rtol=ROUNDING)
