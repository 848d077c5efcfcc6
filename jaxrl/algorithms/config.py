"""The settings of policy optimisation; jaxrl.algorithms.contradictions refuses some together. Loads no jax.

An algorithm is a choice of advantage, ratio, aggregation and off-policy correction, plus named options;
configs/algorithms/ holds the published ones. Sources stand beside each field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxrl.algorithms.contradictions import check_algorithm


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

    reward_from: Literal["task", "majority", "random", "format"] = "task"
    """majority pays agreement with the most frequent final answer and sees no label (TTRL
    arXiv:2504.16084). Controls: random pays 0 or 1 by a coin per sample; format pays the task's format
    part alone, or without one, that a stop token ended the completion."""
    votes_per_prompt: int = 0
    """majority: samples that vote, of which the first group_size are trained on (64 and 32 in TTRL);
    0: group_size."""
    reward_shift: float = 0.0
    """Added to the reward before reward_scale: -0.5 and a scale of 2 make 0 and 1 into -1 and +1."""
    reward_scale: float = 1.0
    """Multiplies the shifted reward."""
    length_reward: Literal["none", "soft_overlong", "cosine"] = "none"
    """soft_overlong is added (arXiv:2503.14476 eq. 13); cosine replaces the reward (arXiv:2502.03373)."""
    overlong_buffer: int = 0
    """soft_overlong: the penalty grows over the last so many tokens before rollout.max_new_tokens; 0: a fifth
    of them, rounded up (4096 of 20480 in DAPO)."""
    overlong_penalty: float = 1.0
    """soft_overlong: penalty at the limit; 1 in DAPO (rewards of -1 and +1), 0.1 in Magistral."""
    overlong_on: Literal["all", "correct"] = "all"
    """soft_overlong: which samples pay; correct as in the DAPO that ScaleRL (arXiv:2510.13786) compares."""
    repetition_ngram: int = 0
    """Share of repeated n-grams of so many tokens times repetition_penalty is subtracted; 0 is off."""
    repetition_penalty: float = 1.0
    """Largest such penalty (arXiv:2502.03373)."""

    advantage_scale: Literal[
        "group_std",
        "batch_std",
        "batch_reward_std",
        "minibatch_std",
        "token_std",
        "group_mean",
        "none",
    ] = "group_std"
    """Divides reward minus baseline. group_std: GRPO arXiv:2402.03300; batch_std: of advantages, ScaleRL
    arXiv:2510.13786; batch_reward_std: of rewards, arXiv:2508.08221 and TRL's batch; minibatch_std: Magistral
    arXiv:2506.10910; token_std: mean and spread over tokens, REINFORCE++ arXiv:2501.03262; group_mean: MaxRL;
    none: Dr. GRPO arXiv:2503.20783."""
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
    """Policy gradient only on this share of a minibatch's tokens, those of highest entropy at the start of the
    step (arXiv:2506.01939: 0.2; its code takes the quantile of each micro-batch)."""
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
    """Smallest weight of truncated; lower bound of masked, where 0 means 1/cap, and 1e-9 is as good as none
    (AReaL's token mask, which drops weights above the cap alone)."""
    sequence_mask: Literal["none", "geometric", "product", "outlier", "off_policy"] = "none"
    """Completions without policy gradient: geometric mean or product of learner/sampler outside
    [mask_low, mask_high], one token outside, or off_policy: A < 0 and too far (DeepSeek-V3.2)."""
    mask_low: float = 0.5
    """Lower bound of sequence_mask."""
    mask_high: float = 2.0
    """Upper bound of sequence_mask."""
    off_policy_bound: float = 0.5
    """off_policy: largest mean of log sampler - log policy over a completion with A < 0 [nats]."""
    correction_denominator: Literal["all", "kept"] = "all"
    """Tokens counted by the aggregation, where correction=masked or a sequence_mask leaves some out: all
    (AReaL, verl's IcePop weights), or kept: rejection sampling as verl's rollout_rs, which takes them out of
    the response mask, hence also out of KL, entropy bonus, value loss and the spreads token_std and
    minibatch_std. Rewards, returns and the group's mean and std are of all. Costs a forward pass per batch."""

    kl_weight: float = 0.0
    """Weight of the KL to the reference; 0 keeps no reference."""
    kl_estimator: Literal["k1", "k2", "k3", "k3_straight"] = "k3"
    """Estimator of that KL (Schulman's note; arXiv:2402.03300 eq. 4 is k3). k3_straight has the value of k3
    and the gradient of k2 (k3+ in verl). As a loss k1 has no gradient in expectation, k2 that of the reverse
    KL, k3 that of the forward one; in the reward k1 is exact, k2 and k3 are biased."""
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
        check_algorithm(self)

    @property
    def samples_per_prompt(self) -> int:
        """Samples drawn for each prompt: the group, or the votes if they are more."""
        return max(self.group_size, self.votes_per_prompt)

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
            or self.correction_denominator == "kept"
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
