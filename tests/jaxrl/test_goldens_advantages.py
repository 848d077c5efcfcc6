"""Published values of advantages, returns, whitening and shaped rewards, run through our functions.

../shared/data/goldens/losses.json holds cases with their sources. GOLDENS says which function or
option of ours gives each kind. The numbers of cases are asserted, so that coverage cannot shrink unseen.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxrl.algorithms.advantages import (
    discounted_returns,
    gae,
    group_advantages,
    masked_moments,
    token_rewards,
    whiten,
)
from jaxrl.algorithms.kl import k1
from jaxrl.algorithms.shaping import cosine_scaled, repeated_share, soft_overlong

NUM_CASES = 129
GROUPS = {"advantage", "returns", "reward"}
MOMENTS = {"group_mean_std", "masked_var_unbiased"}  # of the group "stat"


def _array(case, name) -> np.ndarray:
    return np.array(case["inputs"][name], float)


def _groups(case) -> np.ndarray:
    """Rewards [P, G] from a flat list with a group size or group index."""
    inputs = case["inputs"]
    rewards = np.array(inputs.get("rewards", inputs.get("sequence_scores")), float)
    if "group_index" in inputs:
        assert inputs["group_index"] == sorted(inputs["group_index"])
        return rewards.reshape(len(set(inputs["group_index"])), -1)
    return rewards.reshape(-1, case["params"].get("num_generations", len(rewards)))


def _advantages(baseline, scale):
    def run(case):
        eps = case["params"].get("eps", 1e-6)
        ddof = case["params"].get("std_ddof", 1)
        return group_advantages(
            _groups(case), baseline=baseline, scale=scale, eps=eps, ddof=ddof
        ).ravel()

    return run


def _group_mean_std(case):
    """What our advantages subtract and divide by; singleton=reward is verl's mean 0 and std 1."""
    scores, index = _array(case, "scores"), np.array(case["inputs"]["group_index"])
    found: dict[str, list[float]] = {"mean": [], "std": [], "count": []}
    for group in np.unique(index):
        mine = scores[index == group][None]
        options: dict[str, Any] = {"eps": 0.0, "singleton": "reward"}
        plain = group_advantages(mine, scale="none", **options)
        scaled = group_advantages(mine, scale="group_std", **options)
        found["mean"].append((mine - plain)[0, 0])
        found["std"].append((plain / scaled)[0, 0])
        found["count"].append(mine.size)
    return found


def _reset_returns(case):
    """A masked token ends the episode: the discount before it is gamma * mask."""
    rewards, mask = _array(case, "token_level_rewards")[0], _array(case, "response_mask")[0]
    return discounted_returns(rewards, case["params"]["gamma"] * np.append(mask[1:], 0.0))


def _gae(case):
    rewards, values = _array(case, "token_level_rewards")[0], _array(case, "values")[0]
    discounts = np.full(len(rewards), float(case["params"]["gamma"]))
    return gae(rewards, np.append(values, 0.0), discounts, case["params"]["lam"]), values


def _gae_returns(case):
    advantages, values = _gae(case)
    return advantages + values


def _gae_whitened(case):
    """Their recursion runs through a masked token; only the moments leave it out."""
    advantages, values = _gae(case)
    mask = _array(case, "response_mask")[0]
    return {"returns": advantages + values, "advantages": whiten(advantages, mask)}


def _truncated_gae(case):
    rows = zip(*(_array(case, name) for name in ("r_t", "values", "discount_t")), strict=True)
    return [gae(*row, case["params"]["lambda"]) for row in rows]


def _discounted(case):
    rows = zip(*(_array(case, name) for name in ("r_t", "discount_t", "bootstrap_v")), strict=True)
    return [discounted_returns(*row) for row in rows]


def _whitened_twice(case):
    rewards, mask = _array(case, "token_level_rewards")[0], _array(case, "response_mask")[0]
    returns = discounted_returns(whiten(rewards, mask) * mask, np.zeros(len(rewards)))
    return whiten(returns, mask) * mask


def _variance(case):
    return masked_moments(_array(case, "values"), _array(case, "mask"))[1]


def _kl_rewards(case):
    kl = np.asarray(k1(_array(case, "logprobs"), _array(case, "ref_logprobs")))
    weight = case["params"]["kl_coeff"]
    scores = case["inputs"]["scores"]
    return {
        "kl": kl,
        "kl_rewards": [token_rewards(0.0, row, weight) for row in kl],
        "rewards": [token_rewards(s, row, weight) for s, row in zip(scores, kl, strict=True)],
    }


def _overlong_without_floor(case):
    params = case["params"]
    return _array(case, "rewards") + soft_overlong(
        _array(case, "lengths"), longest=params["max_response_length"], buffer=params["buffer"],
        penalty=params["penalty"], floor=False,
    )  # fmt: skip


def _overlong(case):
    params = case["params"]
    return soft_overlong(
        _array(case, "lengths"), longest=params["max_completion_len"],
        buffer=params["soft_punish_cache"],
    )  # fmt: skip


def _repetition(case):
    share = repeated_share(case["inputs"]["ids"], case["params"]["ngram"])
    return case["params"]["max_penalty"] * share


def _cosine(case):
    inputs = case["inputs"]
    return cosine_scaled(
        np.array(inputs["length"]), np.array(inputs["correct"]), longest=case["params"]["max_len"]
    )


class Golden(NamedTuple):
    """How a kind of case is run, and how many cases of that kind are."""

    run: Callable[[dict], Any]
    count: int


GOLDENS: dict[tuple[str, str], Golden] = {
    ("advantage", "rloo"): Golden(_advantages("leave_one_out", "none"), 2),
    ("advantage", "grpo_group_norm"): Golden(_advantages("mean", "group_std"), 4),
    ("advantage", "grpo_no_std"): Golden(_advantages("mean", "none"), 1),
    ("advantage", "maxrl"): Golden(_advantages("mean", "group_mean"), 2),
    ("advantage", "reinforce_pp_returns"): Golden(_reset_returns, 2),
    ("advantage", "masked_whiten_reinforce"): Golden(_whitened_twice, 2),
    ("advantage", "gae_returns"): Golden(_gae_returns, 1),
    ("advantage", "gae_masked_whiten"): Golden(_gae_whitened, 1),
    ("advantage", "truncated_gae"): Golden(_truncated_gae, 2),
    ("returns", "discounted_returns"): Golden(_discounted, 1),
    ("stat", "group_mean_std"): Golden(_group_mean_std, 1),
    ("stat", "masked_var_unbiased"): Golden(_variance, 2),
    ("reward", "ppo_kl_rewards"): Golden(_kl_rewards, 1),
    ("reward", "dapo_overlong"): Golden(_overlong_without_floor, 1),
    ("reward", "soft_overlong_trl"): Golden(_overlong, 1),
    ("reward", "repetition_penalty"): Golden(_repetition, 6),
    ("reward", "cosine_scaled"): Golden(_cosine, 10),
}


@pytest.fixture(scope="module")
def cases(golden_cases) -> list[dict]:
    return [c for c in golden_cases if c["group"] in GROUPS or c["fn"] in MOMENTS]


def _key(case) -> tuple[str, str]:
    return case["group"], case["fn"]


@pytest.mark.parametrize("key", GOLDENS, ids="-".join)
def test_published_values_are_reproduced(cases, assert_golden, key):
    golden = GOLDENS[key]
    mine = [case for case in cases if _key(case) == key]
    assert len(mine) == golden.count
    for case in mine:
        assert_golden(case, golden.run(case))


def test_every_published_advantage_and_reward_is_run(cases):
    assert Counter(map(_key, cases)) == {key: golden.count for key, golden in GOLDENS.items()}


def test_the_three_files_of_published_values_share_all_cases_among_them(golden_cases):
    """The others take these groups, and of "stat" the means."""
    groups = Counter(case["group"] for case in golden_cases)
    assert sum(groups.values()) == NUM_CASES
    assert set(groups) - GROUPS == {
        "aggregate",
        "kl",
        "stat",
        "loss",
        "is_weight",
        "mask",
        "logprob",
    }
    means = {"masked_mean", "masked_mean_axis1", "global_weighted_mean"}
    assert {c["fn"] for c in golden_cases if c["group"] == "stat"} == MOMENTS | means
