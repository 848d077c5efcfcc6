"""The settings of policy optimisation, and which of them contradict each other. Loads no jax.

An algorithm is a choice of advantage, ratio, aggregation and off-policy correction, plus named options;
configs/algorithms/ holds the published ones. Sources stand beside each field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxrl.errors import UserError

GROUP_BASELINES = ("mean", "leave_one_out")


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoConfig:
    """Policy optimisation as four independent choices: advantage, ratio, aggregation, correction."""

    prompts_per_step: int = 16
    """P, prompts in one batch of rollouts."""
    group_size: int = 8
    """G, samples per prompt; 1 only where the baseline is not the group's (none, value)."""
    minibatches: int = 1
    """Optimizer updates per batch of rollouts, each on its share of the groups."""
    epochs: int = 1
    """Passes over a batch of rollouts."""

    reward_from: Literal["task", "random", "format"] = "task"
    """Controls: random pays 0 or 1 by a coin per sample; format pays the task's format part alone, or
    without one, that a stop token ended the completion."""
    reward_shift: float = 0.0
    """Added to the reward before reward_scale: -0.5 and a scale of 2 make 0 and 1 into -1 and +1."""
    reward_scale: float = 1.0
    """Multiplies the shifted reward."""
    length_reward: Literal["none", "soft_overlong", "cosine"] = "none"
    """soft_overlong is added (arXiv:2503.14476 eq. 13); cosine replaces the reward (arXiv:2502.03373)."""
    overlong_buffer: int = 0
    """soft_overlong: the penalty grows over the last so many tokens before rollout.max_new_tokens."""
    overlong_penalty: float = 1.0
    """soft_overlong: penalty at the limit; 1 in DAPO (rewards of -1 and +1), 0.1 in Magistral."""
    overlong_on: Literal["all", "correct"] = "all"
    """soft_overlong: which samples pay; correct as in the DAPO that ScaleRL (arXiv:2510.13786) compares."""
    repetition_ngram: int = 0
    """Share of repeated n-grams of so many tokens times repetition_penalty is subtracted; 0 is off."""
    repetition_penalty: float = 1.0
    """Largest such penalty (arXiv:2502.03373)."""

    advantage_scale: Literal[
        "group_std", "batch_std", "minibatch_std", "token_std", "group_mean", "none"
    ] = "group_std"
    """Divides reward minus baseline. group_std: GRPO arXiv:2402.03300; batch_std: ScaleRL arXiv:2510.13786;
    minibatch_std: Magistral arXiv:2506.10910; token_std: mean and spread over tokens, REINFORCE++
    arXiv:2501.03262; group_mean: MaxRL; none: Dr. GRPO arXiv:2503.20783."""
    advantage_baseline: Literal["mean", "leave_one_out", "none", "value"] = "mean"
    """What is subtracted: group mean, mean of the others (RLOO arXiv:2402.14740), nothing, or a critic."""
    advantage_eps: float = 1e-6
    """Added to the spread: 1e-6 in verl, 1e-4 in TRL, 1e-9 in OpenRLHF."""
    advantage_ddof: int = 1
    """Standard deviations divide by their count less this: 1 in the libraries, 0 in Magistral's example."""
    gamma: float = 1.0
    """Discount per token of returns and of the critic's advantages; group baselines have none."""
    gae_lambda: float = 1.0
    """Generalised advantage estimation (arXiv:1506.02438); 1 gives the return minus the value."""
    drop_zero_advantage: bool = True
    """Leave groups whose samples all got the same reward out of the batch and of its denominators; counted."""
    signal_from: Literal["total", "correct"] = "total"
    """What drop_zero_advantage compares: the shaped reward (Magistral), or correctness alone (DAPO)."""
    refill_rounds: int = 0
    """Dynamic sampling (arXiv:2503.14476): at most so many times per step are groups without signal
    replaced by newly sampled ones; what then remains is dropped."""
    keep_samples: Literal["all", "correct", "best"] = "all"
    """Train on all samples, the correct ones, or each group's best (RAFT arXiv:2304.06767)."""
    mask_truncated: bool = False
    """Leave completions that hit the length limit out of the loss (arXiv:2503.14476, overlong filtering)."""
    count_masked: bool = False
    """Such completions still count as sequences in the denominators, as in TRL."""

    entropy_shaping: float = 0.0
    """alpha of arXiv:2506.14758: advantages gain min(alpha H, |A| / kappa); 0.4 for GRPO, 0.1 for PPO."""
    entropy_shaping_bound: float = 2.0
    """kappa, > 1: the sign of an advantage never flips."""
    top_entropy_share: float = 1.0
    """Policy gradient only on this share of the batch's tokens, those of highest entropy
    (arXiv:2506.01939: 0.2)."""
    top_entropy_denominator: Literal["all", "kept"] = "all"
    """Tokens counted by the aggregation: all as in the paper, kept as in its code (5 times the gradient)."""

    ratio: Literal["ppo", "cispo", "reinforce", "gspo", "gspo_token", "sapo", "dppo"] = "ppo"
    """How the policy ratio enters: PPO clip, CISPO, REINFORCE (no ratio), GSPO (sequence ratio), SAPO, DPPO."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    clip_bounds: Literal["relative", "absolute"] = "relative"
    """absolute: clip_low and clip_high are the bounds themselves (CISPO in TRL and ScaleRL: 0 and 5)."""
    dual_clip: float = 0.0
    """For negative advantages the loss is capped at dual_clip * |A| (arXiv:1912.09729); 0 is off, else > 1.
    The same as INTELLECT-2's two-sided clip delta (arXiv:2505.07291), 4 there."""
    sapo_tau_positive: float = 1.0
    """sapo: steepness of the gate for positive advantages."""
    sapo_tau_negative: float = 1.05
    """sapo: and for negative ones."""
    dppo_delta: float = 0.2
    """dppo: a token whose probability moved by more, and further that way, gets no gradient."""
    aggregation: Literal[
        "token_mean", "sequence_mean", "prompt_mean", "constant", "constant_sum", "sequence_sum"
    ] = "token_mean"
    """How token losses become one number; constant divides by sequences * rollout.max_new_tokens (Dr. GRPO),
    constant_sum by rollout.max_new_tokens alone (verl), sequence_sum by sequences alone (RLOO, PipelineRL)."""
    ratio_from: Literal["sampler", "learner"] = "sampler"
    """Denominator of the ratio: the sampler's log-probabilities (bypass), or the learner's at step start."""
    correction: Literal["none", "truncated", "masked"] = "none"
    """Weight learner/sampler on each token when ratio_from=learner: truncated (TIS) or masked (MIS)."""
    correction_level: Literal["token", "sequence", "geometric"] = "token"
    """The weight is the token's, the product over its completion, or that product's geometric mean."""
    correction_cap: float = 2.0
    """Largest correction weight; masked drops tokens outside [1/cap, cap]."""
    correction_floor: float = 0.0
    """Smallest weight of truncated; lower bound of masked, where 0 means 1/cap."""
    sequence_mask: Literal["none", "geometric", "product", "outlier", "off_policy"] = "none"
    """Completions without policy gradient: geometric mean or product of learner/sampler outside
    [mask_low, mask_high], one token outside, or off_policy: A < 0 and too far (DeepSeek-V3.2)."""
    mask_low: float = 0.5
    """Lower bound of sequence_mask."""
    mask_high: float = 2.0
    """Upper bound of sequence_mask."""
    off_policy_bound: float = 0.5
    """off_policy: largest mean of log sampler - log policy over a completion with A < 0 [nats]."""

    kl_weight: float = 0.0
    """Weight of the KL to the reference; 0 keeps no reference."""
    kl_estimator: Literal["k1", "k2", "k3", "k3_straight"] = "k3"
    """Estimator of that KL (Schulman's note; arXiv:2402.03300 eq. 4 is k3). k3_straight has the value of k3
    and the gradient of k2 (k3+ in verl). As a loss k1 has no gradient in expectation."""
    kl_in: Literal["loss", "reward"] = "loss"
    """A term of the loss, or subtracted from the reward: of the whole completion with a group baseline
    (RLOO), of each token otherwise (REINFORCE++, PPO)."""
    kl_importance: bool = False
    """Multiply the KL term by the policy ratio: unbiased gradient off policy (DeepSeek-V3.2)."""
    kl_bound: float = 0.0
    """Values of the KL term are bounded at +-this, without gradient beyond (10 in verl); 0 is off."""
    kl_target: float = 0.0
    """kl_in=reward: adapt kl_weight so that the KL stays near this [nats per completion]
    (arXiv:1909.08593 section 2.2); 0 keeps kl_weight."""
    kl_horizon: int = 10000
    """kl_target: samples after which a KL at the upper bound has multiplied kl_weight by 1.2."""
    reference_refresh_steps: int = 0
    """The reference becomes the present policy every so many steps (400 in R1); 0 keeps it frozen."""
    log_reference: bool = False
    """Keep the frozen reference and log its KL and log-probability even when kl_weight is 0."""
    entropy_weight: float = 0.0
    """Weight of the entropy bonus."""

    critic_trunk: Literal["separate", "shared"] = "separate"
    """advantage_baseline=value: the critic has a copy of the policy's layers, or a head on the policy's own."""
    critic_learning_rate: float = 1e-5
    """Constant Adam learning rate of the critic's own parameters."""
    critic_warmup_steps: int = 0
    """Optimizer updates of the critic alone, before the policy moves."""
    value_weight: float = 1.0
    """Weight of the value loss 0.5 (V - R)^2; matters for a shared trunk and for gradient clipping."""
    value_clip: float = 0.5
    """Values are clipped to within this of those at the start of the batch (verl: 0.5); 0 is off."""

    def __post_init__(self) -> None:
        _check_batch(self)
        _check_rewards(self)
        _check_advantage(self)
        _check_ratio(self)
        _check_correction(self)
        _check_kl(self)

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates on one batch of rollouts."""
        return self.minibatches * self.epochs

    @property
    def uses_reference(self) -> bool:
        """A reference policy is kept."""
        return self.kl_weight != 0 or self.log_reference

    @property
    def token_rewards(self) -> bool:
        """Rewards differ between the tokens of a completion, so that advantages do as well."""
        return self.advantage_baseline == "value" or (
            self.advantage_baseline == "none" and (self.kl_in == "reward" or self.gamma < 1)
        )

    @property
    def scores_first(self) -> bool:
        """A forward pass over the whole batch comes before the first update on it."""
        later = self.updates_per_step > 1 and (
            self.ratio_from == "learner" or self.sequence_mask != "none" or self.entropy_shaping > 0
        )
        return (
            later
            or self.advantage_baseline == "value"
            or self.kl_in == "reward"
            or self.top_entropy_share < 1
        )

    @property
    def scoring_passes(self) -> int:
        """Forward passes over the batch beside those of training: by the learner, by the reference."""
        return int(self.scores_first) + int(self.uses_reference)

    @property
    def relative_bounds(self) -> tuple[float, float]:
        """(clip_low, clip_high) as distances from 1."""
        if self.clip_bounds == "absolute":
            return 1.0 - self.clip_low, self.clip_high - 1.0
        return self.clip_low, self.clip_high


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
        c.refill_rounds >= 0 and (c.refill_rounds == 0 or c.drop_zero_advantage),
        f"grpo.refill_rounds={c.refill_rounds} must be >= 0, and replaces only groups that "
        "grpo.drop_zero_advantage=true drops; set that, or grpo.refill_rounds=0",
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


def _check_rewards(c: GrpoConfig) -> None:
    _check(
        (c.overlong_buffer > 0) == (c.length_reward == "soft_overlong"),
        f"grpo.overlong_buffer={c.overlong_buffer} with grpo.length_reward={c.length_reward}: "
        "soft_overlong needs a buffer of at least 1 token, nothing else uses one",
    )
    _check(
        c.repetition_ngram >= 0,
        f"grpo.repetition_ngram={c.repetition_ngram} must be >= 0; 0 is off",
    )
    _check(c.reward_scale != 0, "grpo.reward_scale=0 leaves no reward; usual: 1")


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
    _check(c.advantage_eps >= 0, f"grpo.advantage_eps={c.advantage_eps} must be >= 0; usual: 1e-6")
    _check(c.advantage_ddof in (0, 1), f"grpo.advantage_ddof={c.advantage_ddof} must be 0 or 1")
    for name in ("gamma", "gae_lambda"):
        _check(0 <= getattr(c, name) <= 1, f"grpo.{name}={getattr(c, name)} must lie in [0, 1]")
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
        f"not {c.aggregation}",
    )
    _check(
        c.ratio != "gspo" or not c.token_rewards,
        "grpo.ratio=gspo needs one advantage per completion, but the critic or the KL in the reward "
        "gives one per token; set grpo.ratio=gspo_token",
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
        0 <= c.mask_low <= 1 <= c.mask_high,
        f"grpo.mask_low={c.mask_low} and grpo.mask_high={c.mask_high} must lie on either side of 1, the "
        "ratio of equal policies; usual: 0.999 and 1.001 (geometric), 0.5 and 2 (product)",
    )


def _check_kl(c: GrpoConfig) -> None:
    _check(
        c.kl_in == "loss" or c.kl_weight != 0,
        "grpo.kl_in=reward with grpo.kl_weight=0 subtracts nothing; set a weight, or grpo.kl_in=loss",
    )
    _check(
        c.kl_in == "loss" or c.kl_estimator == "k1",
        f"grpo.kl_in=reward with grpo.kl_estimator={c.kl_estimator} has a biased gradient "
        "(k1 is exact there); set grpo.kl_estimator=k1, or grpo.kl_in=loss",
    )
    _check(
        c.kl_in == "loss" or not (c.kl_importance or c.kl_bound),
        "grpo.kl_importance and grpo.kl_bound shape the KL term of the loss; set grpo.kl_in=loss",
    )
    _check(
        c.kl_target == 0 or (c.kl_target > 0 and c.kl_in == "reward"),
        f"grpo.kl_target={c.kl_target} must be >= 0 and adapts the KL of grpo.kl_in=reward only",
    )
    _check(
        c.reference_refresh_steps >= 0 and (c.reference_refresh_steps == 0 or c.uses_reference),
        f"grpo.reference_refresh_steps={c.reference_refresh_steps} refreshes a reference that nothing "
        "uses; set grpo.kl_weight or grpo.log_reference, or grpo.reference_refresh_steps=0",
    )
