"""Which settings of policy optimisation contradict each other: refused with the reason and the alternatives.

Loads no jax.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from jaxrl.errors import UserError

if TYPE_CHECKING:  # it calls this file
    from jaxrl.algorithms.config import GrpoConfig

GROUP_BASELINES = ("mean", "leave_one_out")
_MAY_BE_INFINITE = ("clip_high", "dual_clip", "correction_cap", "mask_high")
"""Bounds that infinity switches off."""
_NOT_NEGATIVE = {
    "overlong_buffer": "0, a fifth of the limit", "overlong_penalty": "1 or 0.1",
    "repetition_ngram": "0, off", "repetition_penalty": "1", "advantage_eps": "1e-6",
    "kl_weight": "0.001", "kl_bound": "0, off", "kl_target": "0, off",
    "reference_refresh_steps": "0, frozen", "refill_rounds": "0 or 10", "off_policy_bound": "0.5",
    "critic_learning_rate": "1e-5", "critic_warmup_steps": "0", "value_weight": "1",
    "value_clip": "0.5",
}  # fmt: skip
"""Settings that are at least 0, and what is usual."""


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def check_algorithm(c: GrpoConfig) -> None:
    """Raise UserError for the first contradiction."""
    _check_numbers(c)
    _check_batch(c)
    _check_rewards(c)
    _check_labels(c)
    _check_advantage(c)
    _check_ratio(c)
    _check_correction(c)
    _check_rejection(c)
    _check_kl(c)


def _check_numbers(c: GrpoConfig) -> None:
    for item in dataclasses.fields(c):
        value = getattr(c, item.name)
        if isinstance(value, float):
            infinite = value == math.inf and item.name in _MAY_BE_INFINITE
            _check(
                math.isfinite(value) or infinite,
                f"grpo.{item.name}={value} must be a finite number",
            )
    for name, usual in _NOT_NEGATIVE.items():
        value = getattr(c, name)
        _check(value >= 0, f"grpo.{name}={value} must be at least 0; usual: {usual}")
    _check(c.kl_horizon >= 1, f"grpo.kl_horizon={c.kl_horizon} must be at least 1; usual: 10000")


def _check_batch(c: GrpoConfig) -> None:
    grouped = c.advantage_baseline in GROUP_BASELINES
    _check(
        c.group_size >= (2 if grouped else 1),
        f"grpo.group_size={c.group_size}: a group needs at least 2 samples to compare"
        + (", or set grpo.advantage_baseline=none or value" if grouped else ""),
    )
    _check(
        c.prompts_per_step >= 1, f"grpo.prompts_per_step={c.prompts_per_step} must be at least 1"
    )
    _check(
        1 <= c.minibatches <= c.prompts_per_step,
        f"grpo.minibatches={c.minibatches} must lie in [1, grpo.prompts_per_step="
        f"{c.prompts_per_step}]: a minibatch holds whole groups",
    )
    _check(c.epochs >= 1, f"grpo.epochs={c.epochs} must be at least 1")
    _check(
        grouped or not c.drop_zero_advantage,
        f"grpo.drop_zero_advantage=true with grpo.advantage_baseline={c.advantage_baseline}: a group of "
        "equal rewards has signal there; set grpo.drop_zero_advantage=false, or a group baseline",
    )
    _check(
        not (c.drop_zero_advantage and c.kl_in == "reward"),
        "grpo.drop_zero_advantage=true with grpo.kl_in=reward: samples of a group of equal verdicts still "
        "differ in their KL; set grpo.drop_zero_advantage=false, or grpo.kl_in=loss",
    )
    _check(
        c.refill_rounds == 0 or c.drop_zero_advantage,
        f"grpo.refill_rounds={c.refill_rounds} replaces only groups that grpo.drop_zero_advantage=true "
        "drops; set that, or grpo.refill_rounds=0",
    )
    _check(
        c.mask_truncated or not c.count_masked,
        "grpo.count_masked=true counts what grpo.mask_truncated=true masks; set both or neither",
    )
    _check(
        not c.count_masked or (c.minibatches == 1 and c.top_entropy_denominator == "all"),
        "grpo.count_masked=true counts over the whole batch; set grpo.minibatches=1 and "
        "grpo.top_entropy_denominator=all, or grpo.count_masked=false",
    )
    _check(
        not c.count_masked or c.correction_denominator == "all",
        "grpo.count_masked=true counts completions without loss, which grpo.correction_denominator=kept "
        "does not; set grpo.count_masked=false, or grpo.correction_denominator=all",
    )


def _check_rewards(c: GrpoConfig) -> None:
    _check(
        c.overlong_buffer == 0 or c.length_reward == "soft_overlong",
        f"grpo.overlong_buffer={c.overlong_buffer} with grpo.length_reward={c.length_reward}: nothing but "
        "soft_overlong uses a buffer; set grpo.length_reward=soft_overlong, or grpo.overlong_buffer=0",
    )
    _check(c.reward_scale != 0, "grpo.reward_scale=0 leaves no reward; usual: 1")
    _check(
        c.length_reward != "cosine" or (c.reward_shift == 0 and c.reward_scale == 1),
        "grpo.length_reward=cosine replaces the reward, so grpo.reward_shift and grpo.reward_scale would "
        "change nothing; leave them at 0 and 1, or set grpo.length_reward=none",
    )
    below_zero = (
        c.reward_shift < 0
        or c.reward_scale < 0
        or c.length_reward != "none"
        or c.repetition_ngram > 0
    )
    _check(
        c.advantage_scale != "group_mean" or not below_zero,
        "grpo.advantage_scale=group_mean divides by the mean reward of a group, which a negative "
        "reward_shift or reward_scale, a length_reward or a repetition_ngram can make negative; leave those "
        "out, or set grpo.advantage_scale=group_std",
    )


def _check_labels(c: GrpoConfig) -> None:
    """A vote and the controls see no label."""
    majority, blind = c.reward_from == "majority", c.reward_from != "task"
    _check(
        c.votes_per_prompt == 0 or (majority and c.votes_per_prompt >= c.group_size),
        f"grpo.votes_per_prompt={c.votes_per_prompt} with grpo.reward_from={c.reward_from} and "
        f"grpo.group_size={c.group_size}: votes are for grpo.reward_from=majority, and the group is among "
        "them; set it to 0 or to grpo.group_size or more",
    )
    _check(
        not majority or c.samples_per_prompt >= 3,
        f"grpo.reward_from=majority with {c.samples_per_prompt} votes pays the first sample whatever it "
        "says; set grpo.votes_per_prompt or grpo.group_size to 3 or more; usual: 64 and 32",
    )
    for name, value in (
        ("signal_from", c.signal_from), ("keep_samples", c.keep_samples),
        ("overlong_on", c.overlong_on),
    ):  # fmt: skip
        _check(
            not blind or value != "correct",
            f"grpo.{name}=correct reads the label, which grpo.reward_from={c.reward_from} does without; set "
            f"grpo.{name}={'total' if name == 'signal_from' else 'all'}, or grpo.reward_from=task",
        )
    _check(
        not blind or c.length_reward != "cosine",
        "grpo.length_reward=cosine pays by the label in place of the reward, and "
        f"grpo.reward_from={c.reward_from} does without; set grpo.length_reward=none or soft_overlong",
    )


def _check_advantage(c: GrpoConfig) -> None:
    grouped = c.advantage_baseline in GROUP_BASELINES
    _check(
        grouped or c.advantage_scale not in ("group_std", "group_mean"),
        f"grpo.advantage_scale={c.advantage_scale} compares samples of a group, which "
        f"grpo.advantage_baseline={c.advantage_baseline} does not; set grpo.advantage_scale=none or "
        "token_std, or a group baseline (mean, leave_one_out)",
    )
    _check(
        not c.token_rewards or c.advantage_scale in ("none", "token_std"),
        f"grpo.advantage_scale={c.advantage_scale} needs one advantage per completion, but rewards per "
        "token give one per token; set grpo.advantage_scale=token_std or none",
    )
    _check(c.advantage_ddof in (0, 1), f"grpo.advantage_ddof={c.advantage_ddof} must be 0 or 1")
    for name in ("gamma", "gae_lambda"):
        _check(0 <= getattr(c, name) <= 1, f"grpo.{name}={getattr(c, name)} must lie in [0, 1]")
    _check(
        c.gamma == 1 or not grouped,
        f"grpo.gamma={c.gamma} discounts rewards token by token, and grpo.advantage_baseline="
        f"{c.advantage_baseline} compares whole completions; set gamma=1, or the baseline none or value",
    )
    _check(
        c.gae_lambda == 1 or c.advantage_baseline == "value",
        f"grpo.gae_lambda={c.gae_lambda} mixes a critic's values, and grpo.advantage_baseline="
        f"{c.advantage_baseline} has no critic; set gae_lambda=1, or grpo.advantage_baseline=value",
    )
    _check(
        c.entropy_shaping >= 0 and c.entropy_shaping_bound > 1,
        f"grpo.entropy_shaping={c.entropy_shaping} must be >= 0 and grpo.entropy_shaping_bound="
        f"{c.entropy_shaping_bound} greater than 1, or advantages change sign; usual: 0.4 and 2",
    )
    _check(
        0 < c.top_entropy_share <= 1,
        f"grpo.top_entropy_share={c.top_entropy_share} must lie in (0, 1]; usual: 0.2, 1 is off",
    )


def _check_ratio(c: GrpoConfig) -> None:
    if c.clip_bounds == "absolute":
        _check(
            0 <= c.clip_low <= 1 <= c.clip_high,
            f"grpo.clip_bounds=absolute needs 0 <= clip_low={c.clip_low} <= 1 <= clip_high="
            f"{c.clip_high}; usual: 0 and 5",
        )
    _check(0 <= c.clip_low <= 1, f"grpo.clip_low={c.clip_low} must lie in [0, 1]; usual: 0.2")
    _check(c.clip_high >= 0, f"grpo.clip_high={c.clip_high} must be >= 0; usual: 0.2 or 0.28")
    _check(
        c.dual_clip == 0 or c.dual_clip > 1,
        f"grpo.dual_clip={c.dual_clip} must be 0 (off) or greater than 1; usual: 3",
    )
    _check(
        c.dual_clip == 0 or c.ratio == "ppo",
        f"grpo.dual_clip={c.dual_clip} bounds the PPO clip only, not grpo.ratio={c.ratio}; set it to 0",
    )
    _check(
        not c.ratio.startswith("gspo") or c.aggregation == "sequence_mean",
        f"grpo.ratio={c.ratio} is a sequence ratio and needs grpo.aggregation=sequence_mean, "
        f"not {c.aggregation}, which would weigh it by lengths; set that, or a ratio per token: ppo, cispo",
    )
    per_token = c.token_rewards or c.entropy_shaping > 0 or c.top_entropy_share < 1
    _check(
        c.ratio != "gspo" or not per_token,
        "grpo.ratio=gspo needs one advantage per completion, but a critic, the KL in the reward, "
        "entropy_shaping or top_entropy_share gives one per token; set grpo.ratio=gspo_token",
    )
    _check(
        c.sapo_tau_positive > 0 and c.sapo_tau_negative > 0 and c.dppo_delta > 0,
        f"grpo.sapo_tau_positive={c.sapo_tau_positive}, grpo.sapo_tau_negative={c.sapo_tau_negative} "
        f"and grpo.dppo_delta={c.dppo_delta} must be positive; usual: 1, 1.05, 0.2",
    )


def _check_correction(c: GrpoConfig) -> None:
    _check(
        c.correction == "none" or c.ratio_from == "learner",
        f"grpo.correction={c.correction} with grpo.ratio_from=sampler would weight by "
        "learner/sampler twice; set grpo.ratio_from=learner, or grpo.correction=none",
    )
    _check(
        c.correction_cap >= 1,
        f"grpo.correction_cap={c.correction_cap} must be at least 1; usual: 2",
    )
    _check(
        0 <= c.correction_floor <= 1,
        f"grpo.correction_floor={c.correction_floor} must lie in [0, 1]; usual: 0",
    )
    _check(
        c.correction != "masked" or c.correction_cap > 1,
        "grpo.correction=masked with grpo.correction_cap=1 masks all but exact agreement; usual: 5",
    )
    _check(
        0 <= c.mask_low < 1 < c.mask_high,
        f"grpo.mask_low={c.mask_low} and grpo.mask_high={c.mask_high} must lie on either side of 1, the "
        "ratio of equal policies; usual: 0.999 and 1.001 (geometric), 0.5 and 2 (product)",
    )


def _check_rejection(c: GrpoConfig) -> None:
    """What is left out of the denominators is known before the first update."""
    if c.correction_denominator == "all":
        return
    _check(
        c.correction == "masked" or c.sequence_mask != "none",
        f"grpo.correction_denominator=kept with grpo.correction={c.correction} and "
        "grpo.sequence_mask=none: nothing is left out that could be uncounted; set grpo.correction=masked or "
        "grpo.sequence_mask=geometric, product or outlier, or grpo.correction_denominator=all",
    )
    _check(
        c.sequence_mask != "off_policy",
        "grpo.correction_denominator=kept with grpo.sequence_mask=off_policy: that mask follows the policy in "
        "training, and denominators are made before the first update; set grpo.sequence_mask=geometric, "
        "product or outlier, or grpo.correction_denominator=all",
    )
    by_token = c.correction == "masked" and c.correction_level == "token"
    _check(
        not (by_token and c.ratio.startswith("gspo")),
        f"grpo.correction_denominator=kept with grpo.correction_level=token takes tokens out of the sequences "
        f"whose ratio grpo.ratio={c.ratio} is; set grpo.correction_level=sequence or geometric, a ratio per "
        "token: ppo, cispo, or grpo.correction_denominator=all",
    )


def _check_kl(c: GrpoConfig) -> None:
    _check(
        c.kl_in == "loss" or c.kl_weight != 0,
        "grpo.kl_in=reward with grpo.kl_weight=0 subtracts nothing; set a weight, or grpo.kl_in=loss",
    )
    _check(
        c.kl_in == "loss" or c.kl_estimator != "k3_straight",
        "grpo.kl_estimator=k3_straight is about gradients, which a reward has none of; set "
        "grpo.kl_estimator=k1 (exact there), k2 or k3 (biased there), or grpo.kl_in=loss",
    )
    _check(
        c.kl_weight != 0 or not (c.kl_importance or c.kl_bound),
        "grpo.kl_importance and grpo.kl_bound shape a KL term that grpo.kl_weight=0 leaves out; set a "
        "weight, or leave them out",
    )
    _check(
        c.kl_in == "loss" or not (c.kl_importance or c.kl_bound),
        "grpo.kl_importance and grpo.kl_bound shape the KL term of the loss; set grpo.kl_in=loss",
    )
    _check(
        c.kl_target == 0 or c.kl_in == "reward",
        f"grpo.kl_target={c.kl_target} adapts the KL of grpo.kl_in=reward only; set that, or kl_target=0",
    )
    _check(
        c.reference_refresh_steps == 0 or c.uses_reference,
        f"grpo.reference_refresh_steps={c.reference_refresh_steps} refreshes a reference that nothing "
        "uses; set grpo.kl_weight or grpo.log_reference, or grpo.reference_refresh_steps=0",
    )


def unread(c: GrpoConfig) -> list[tuple[str, str]]:
    """Settings that are not at their defaults and that another one switches off, and with what they are read.

    The plan shows them: an algorithm tried without its correction is no mistake, a cap without one may be.
    """
    of_correction = ("correction_level", "correction_cap", "correction_floor")
    of_critic = (
        "critic_trunk", "critic_learning_rate", "critic_warmup_steps", "value_weight", "value_clip",
    )  # fmt: skip
    clips = c.ratio in ("ppo", "cispo") or c.ratio.startswith("gspo")
    bounds = c.sequence_mask not in ("none", "off_policy")
    overlong = c.length_reward == "soft_overlong"
    default = {item.name: item.default for item in dataclasses.fields(c)}
    found = []
    for read, names, switch in (
        (clips, ("clip_low", "clip_high", "clip_bounds"), "grpo.ratio=ppo, cispo or gspo"),
        (c.ratio == "sapo", ("sapo_tau_positive", "sapo_tau_negative"), "grpo.ratio=sapo"),
        (c.ratio == "dppo", ("dppo_delta",), "grpo.ratio=dppo"),
        (c.correction != "none", of_correction, "grpo.correction=truncated or masked"),
        (bounds, ("mask_low", "mask_high"), "grpo.sequence_mask=geometric, product or outlier"),
        (c.sequence_mask == "off_policy", ("off_policy_bound",), "grpo.sequence_mask=off_policy"),
        (c.uses_reference, ("kl_estimator",), "a reference: grpo.kl_weight or grpo.log_reference"),
        (c.kl_target > 0, ("kl_horizon",), "grpo.kl_target"),
        (c.entropy_shaping > 0, ("entropy_shaping_bound",), "grpo.entropy_shaping"),
        (c.top_entropy_share < 1, ("top_entropy_denominator",), "grpo.top_entropy_share"),
        (c.repetition_ngram > 0, ("repetition_penalty",), "grpo.repetition_ngram"),
        (overlong, ("overlong_penalty", "overlong_on"), "grpo.length_reward=soft_overlong"),
        (c.advantage_baseline == "value", of_critic, "a critic: grpo.advantage_baseline=value"),
    ):
        written = [name for name in names if not read and getattr(c, name) != default[name]]
        if written:
            found.append((", ".join(f"grpo.{name}={getattr(c, name)}" for name in written), switch))
    return found
