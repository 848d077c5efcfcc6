"""Objectives of the controls and of options that no algorithm file has by default, as in papers.py."""

import importlib.util
from pathlib import Path

import numpy as np

_spec = importlib.util.spec_from_file_location("papers", Path(__file__).with_name("papers.py"))
papers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(papers)


def control_format(mb, batch):
    """Pays for ending before the limit."""
    pairs = papers.paired(mb, lambda g: papers.norm([float(v.n < papers.LONGEST) for v in g]))
    return papers.token_mean(pairs, lambda v, a: papers.min_clip(papers.ratio_b(v), a))


def control_random(mb, batch):
    """Pays by a coin of the prompt's and the sample's numbers."""
    pairs = papers.paired(mb, lambda g: papers.norm([float(v.coin) for v in g]))
    return papers.token_mean(pairs, lambda v, a: papers.min_clip(papers.ratio_b(v), a))


def sft_gold(mb, batch):
    """The completions as worked solutions."""
    views = [v for group in mb for v in group]
    return sum(v.lp.sum() for v in views) / sum(v.n for v in views)


def dapo_overlong_filter(mb, batch):
    """Completions at the limit are in the group's mean and spread, and in nothing else."""
    pairs = [(v, a) for v, a in papers.paired(mb, papers.dapo_advantages) if v.n < papers.LONGEST]
    return papers.token_mean(pairs, lambda v, a: papers.min_clip(papers.ratio(v), a, 0.2, 0.28, 10))


def grpo_overlong_counted(mb, batch):
    """TRL: a masked completion has no loss and still counts as a sequence."""
    pairs = papers.paired(mb, lambda g: papers.norm([v.r for v in g]))
    terms = [
        (v.n < papers.LONGEST) * (papers.min_clip(papers.ratio(v), a) - 0.04 * papers.k3(v)).mean()
        for v, a in pairs
    ]
    return np.mean(terms)


def entropy_8020_kept(mb, batch):
    kept = sum((v.entropy >= papers.top_threshold(batch)).sum() for group in mb for v in group)
    return papers.entropy_8020(mb, batch) * sum(v.n for group in mb for v in group) / kept


def magistral_8020(mb, batch):
    """The spread is that of all sequences, the mask comes after it."""
    a = np.concatenate([papers.center([v.r + papers.overlong(v, 0.1) for v in g]) for g in mb])
    pairs = zip([v for g in mb for v in g], (a - a.mean()) / (a.std() + 1e-6), strict=True)
    threshold = papers.top_threshold(batch)
    return papers.token_mean(
        [*pairs],
        lambda v, a: papers.min_clip(papers.ratio_b(v), a, 0.2, 0.28) * (v.entropy >= threshold),
    )


def batch_reward_std(mb, batch):
    """TRL's scale_rewards=batch: the rewards of all samples, whatever their prompts."""
    scale = np.std([v.r for group in batch for v in group], ddof=1) + 1e-6
    pairs = papers.paired(mb, lambda g: papers.center([v.r for v in g]) / scale)
    return papers.token_mean(pairs, lambda v, a: papers.min_clip(papers.ratio_b(v), a))


def rloo_batch_reward_std(mb, batch):
    """The same with the KL in those rewards, and the others' mean as baseline."""
    r = [[v.r - 0.03 * (v.lo - v.lr).sum() for v in group] for group in batch]
    scale = np.std(r, ddof=1) + 1e-6
    return papers.rloo(mb, batch) / scale


def magistral_overlong_filter(mb, batch):
    """What is left out of the loss is in the group's mean, and not in the minibatch's moments."""
    centered = papers.paired(
        mb, lambda g: papers.center([v.r + papers.overlong(v, 0.1) for v in g])
    )
    pairs = [(v, a) for v, a in centered if v.n < papers.LONGEST]
    a = np.array([a for _, a in pairs])
    pairs = [(v, (x - a.mean()) / (a.std() + 1e-6)) for v, x in pairs]
    return papers.token_mean(pairs, lambda v, a: papers.min_clip(papers.ratio_b(v), a, 0.2, 0.28))


def scalerl_length(mb, batch):
    """The spread is that of the groups that are trained on, though the others differ in their lengths."""

    def advantages(group):
        return papers.center([2 * v.r - 1 + papers.overlong(v, 1.0) for v in group])

    scale = np.concatenate([advantages(group) for group in batch]).std(ddof=1) + 1e-6
    return np.mean([
        papers.token_mean(
            [(v, a / scale) for v, a in papers.paired([group], advantages)],
            lambda v, a: papers.cispo_term(v, a, v.lb),
        )
        for group in mb
    ])  # fmt: skip


def mis_symmetric(mb, batch):
    """IcePop: weights outside [1 / cap, cap] are left out."""

    def term(v, a):
        w = np.exp(v.lo - v.lb)
        return np.where((w >= 1 / 1.2) & (w <= 1.2), w, 0) * papers.min_clip(papers.ratio(v), a)

    return papers.token_mean(papers.paired(mb, lambda g: papers.norm([v.r for v in g])), term)


def areal_token_mask(mb, batch):
    """AReaL's older default: weights above the cap are left out, however small the others."""

    def term(v, a):
        w = np.exp(v.lo - v.lb)
        return np.where(w <= 1.2, w, 0) * papers.min_clip(papers.ratio(v), a)

    return papers.token_mean(papers.white_pairs(mb, batch, lambda v, a: np.full(v.n, 10 * a)), term)


def pipelinerl_sequence(mb, batch):
    """Equation 5 as it is set: the ratio of whole completions, cut at c; here 1.2."""

    def advantages(group):
        return papers.center([v.r for v in group]) * len(group) / (len(group) - 1)

    return np.mean([
        min(np.exp((papers.PRESENT[(v.n, v.lb.sum())] - v.lb).sum()), 1.2) * a * v.lp.sum()
        for v, a in papers.paired(mb, advantages)
    ])  # fmt: skip


def raft_best(mb, batch):
    """The first best of each group, weighed by its reward."""
    best = [max(group, key=lambda v: v.r) for group in mb]
    return sum(v.r * v.lp.sum() for v in best) / sum(v.n for v in best)


def ttrl_votes(mb, batch):
    """Three vote, the first two are trained on."""

    def agreement(group):
        said = [v.answer for v in group if v.answer]
        label = max(said, key=said.count) if said else None
        return papers.norm([float(v.answer == label) for v in group[:2]])

    pairs = [(v, a) for group in mb for v, a in zip(group[:2], agreement(group), strict=True)]
    return papers.sequence_mean(
        pairs, lambda v, a: papers.min_clip(papers.ratio(v), a) - 0.001 * papers.k3(v)
    )


def reinforce_pp_k3(mb, batch):
    """k3 in the reward."""

    def returns(v, _):
        d = v.lo - v.lr
        rewards = -0.01 * (np.exp(-d) - 1 + d)
        rewards[-1] += v.r
        return np.cumsum(rewards[::-1])[::-1]

    pairs = papers.white_pairs(mb, batch, returns)
    return papers.token_mean(pairs, lambda v, a: papers.min_clip(papers.ratio(v), a))


def ppo_discounted(mb, batch):
    """gamma = 0.9 and lambda = 0.95."""

    def advantages(v, _):
        rewards = np.zeros(v.n)
        rewards[-1] = v.r
        delta = rewards + 0.9 * np.append(v.value[1:], 0) - v.value
        weights = (0.9 * 0.95) ** np.arange(v.n)
        return np.array([(weights[: v.n - t] * delta[t:]).sum() for t in range(v.n)])

    pairs = papers.white_pairs(mb, batch, advantages)
    return papers.token_mean(pairs, lambda v, a: papers.min_clip(papers.ratio(v), a))


def _off_policy(mb, bound):
    """The mask compares the sampler with the policy in training, not with the learner at step start."""

    def term(v, a):
        present = papers.PRESENT[(v.n, v.lb.sum())]
        kept = not (a < 0 and (v.lb - present).mean() > bound)
        rho = papers.ratio_b(v)
        return kept * papers.min_clip(rho, a) - 0.001 * rho * papers.k3(v)

    pairs = papers.paired(mb, lambda g: papers.center([v.r for v in g]))
    return papers.sequence_mean(pairs, term)


def deepseek_v32_masked(mb, batch):
    """One completion with A < 0 is 0.08 away."""
    return _off_policy(mb, 0.05)


def deepseek_v32_minibatches(mb, batch):
    """It was 0.29 away when the step began."""
    return _off_policy(mb, 0.2)


def sequence_mask_minibatches(mb, batch):
    """The mask compares the sampler with the learner at the start of the step, as verl's does."""

    def term(v, a):
        return (0.9 <= np.exp((v.lo - v.lb).mean()) <= 1.1) * papers.min_clip(papers.ratio_b(v), a)

    pairs = papers.paired(mb, lambda g: papers.norm([v.r for v in g]))
    return papers.token_mean(pairs, term)


def entropy_8020_minibatches(mb, batch):
    """The quantile is over the minibatch, as the paper's."""
    return papers.entropy_8020(mb, mb)


def dapo_overlong_correct(mb, batch):
    """Correct completions alone pay for their length."""
    pairs = papers.paired(
        mb,
        lambda g: papers.norm([2 * v.r - 1 + (v.r == 1) * papers.overlong(v, 1.0) for v in g]),
    )
    return papers.token_mean(pairs, lambda v, a: papers.min_clip(papers.ratio(v), a, 0.2, 0.28, 10))


def _kept_mean(pairs, keep, term):
    """verl's agg_loss, token-mean: over the response mask that rejection sampling has left."""
    return sum((keep(v) * term(v, a)).sum() for v, a in pairs) / sum(
        keep(v).sum() for v, _ in pairs
    )


def _near(v):
    """Geometric rejection: one flag for all tokens of a completion; the fourth group loses all of its own."""
    return np.full(v.n, 0.8 <= np.exp((v.lo - v.lb).mean()) <= 1.2)


def sequence_mask_kept(mb, batch):
    """Of the group's mean and spread everything is part, of the denominator what is kept."""
    pairs = papers.paired(mb, lambda g: papers.norm([v.r for v in g]))
    return _kept_mean(pairs, _near, lambda v, a: papers.min_clip(papers.ratio_b(v), a))


def mis_kept(mb, batch):
    """Both masks look at whole completions; the KL loses what is rejected."""

    def keep(v):
        w = np.exp(v.lo - v.lb)
        return (w >= 0.8) & (w <= 1.25) & (0.62 <= np.exp((v.lo - v.lb).sum()) <= 2.1)

    def term(v, a):
        return np.exp(v.lo - v.lb) * papers.min_clip(papers.ratio(v), a) - 0.04 * papers.k3(v)

    return _kept_mean(papers.paired(mb, lambda g: papers.norm([v.r for v in g])), keep, term)


def scalerl_kept(mb, batch):
    """A group whose every completion is rejected is no prompt of the mean."""
    a = np.concatenate([papers.center([2 * v.r - 1 for v in group]) for group in batch])
    scale = a.std(ddof=1) + 1e-6
    each = [
        _kept_mean(
            papers.paired([group], lambda g: papers.center([2 * v.r - 1 for v in g]) / scale),
            _near,
            lambda v, a: papers.cispo_term(v, a, v.lb),
        )
        for group in mb
        if any(_near(v).any() for v in group)
    ]
    return np.mean(each)


def reinforce_pp_kept(mb, batch):
    """Whitened over the tokens that are kept; returns are those of all."""
    views = [v for group in batch for v in group]
    every = np.concatenate([papers.returns(v, 0.01)[_near(v)] for v in views])
    pairs = [
        (v, (papers.returns(v, 0.01) - every.mean()) / np.sqrt(every.var(ddof=1) + 1e-8))
        for group in mb
        for v in group
    ]
    return _kept_mean(pairs, _near, lambda v, a: papers.min_clip(papers.ratio(v), a))


def magistral_kept(mb, batch):
    """The minibatch's moments are those of the completions that are kept."""
    centered = papers.paired(
        mb, lambda g: papers.center([v.r + papers.overlong(v, 0.1) for v in g])
    )
    kept = np.array([a for v, a in centered if _near(v).all()])
    pairs = [(v, (a - kept.mean()) / (kept.std() + 1e-6)) for v, a in centered]
    return _kept_mean(pairs, _near, lambda v, a: papers.min_clip(papers.ratio_b(v), a, 0.2, 0.28))


def entropy_8020_rejected(mb, batch):
    """The quantile is over the tokens that are kept; all of those are counted."""
    views = [v for group in batch for v in group]
    threshold = np.quantile(np.concatenate([v.entropy[_near(v)] for v in views]), 0.8)

    def term(v, a):
        return papers.min_clip(papers.ratio(v), a, 0.2, 0.28) * (v.entropy >= threshold)

    return _kept_mean(papers.paired(mb, lambda g: papers.norm([v.r for v in g])), _near, term)


VALUE_TARGETS = {
    "ppo": lambda v: papers.returns(v, 0.001),
    "ppo_shared": lambda v: papers.gae(v, None) + v.value,
}
"""What each critic learns: advantage before whitening plus value, which for lambda 1 is the return."""


def value_loss(mb, target, table, clip):
    """Half the larger of two squares, over all tokens; `table` holds the critic's values, by state."""
    total = 0.0
    for v in [v for group in mb for v in group]:
        now, goal = table[v.state], target(v)
        near = np.clip(now, v.value - clip, v.value + clip)
        total += np.maximum((now - goal) ** 2, (near - goal) ** 2).sum() / 2
    return total / sum(v.n for group in mb for v in group)


KEPT = {"correction_denominator": "kept"}
GEOMETRIC = {"sequence_mask": "geometric", "mask_low": 0.8, "mask_high": 1.2}
REJECTIONS = {
    sequence_mask_kept: ("sequence_mask", GEOMETRIC | KEPT),
    mis_kept: (
        "mis",
        {"correction_floor": 0.8, "correction_cap": 1.25, "sequence_mask": "product",
         "mask_low": 0.62, "mask_high": 2.1, "kl_weight": 0.04, "minibatches": 1} | KEPT,
    ),
    scalerl_kept: ("scalerl", GEOMETRIC | KEPT),
    reinforce_pp_kept: ("reinforce_pp", GEOMETRIC | KEPT),
    magistral_kept: ("magistral", GEOMETRIC | KEPT),
    entropy_8020_rejected: ("entropy_8020", GEOMETRIC | KEPT),
}  # fmt: skip
"""What verl's rollout_rs makes of the algorithm files."""
OPTIONS = REJECTIONS | {
    ppo_discounted: ("ppo_shared", {"gamma": 0.9}),
    deepseek_v32_masked: ("deepseek_v32", {"off_policy_bound": 0.05}),
    deepseek_v32_minibatches: ("deepseek_v32", {"minibatches": 2, "off_policy_bound": 0.2}),
    sequence_mask_minibatches: ("sequence_mask", {"minibatches": 2}),
    entropy_8020_minibatches: ("entropy_8020", {"minibatches": 2}),
    dapo_overlong_correct: ("dapo", {"overlong_on": "correct"}),
    dapo_overlong_filter: ("dapo", {"mask_truncated": True}),
    grpo_overlong_counted: ("grpo", {"mask_truncated": True, "count_masked": True}),
    entropy_8020_kept: ("entropy_8020", {"top_entropy_denominator": "kept"}),
    magistral_8020: ("magistral", {"top_entropy_share": 0.2}),
    magistral_overlong_filter: ("magistral", {"mask_truncated": True}),
    scalerl_length: ("scalerl", {"length_reward": "soft_overlong", "signal_from": "correct"}),
    mis_symmetric: ("mis", {"correction_floor": 0.0, "correction_cap": 1.2}),
    batch_reward_std: (
        "bypass",
        {"advantage_scale": "batch_reward_std", "drop_zero_advantage": False},
    ),
    rloo_batch_reward_std: ("rloo", {"advantage_scale": "batch_reward_std"}),
    areal_token_mask: (
        "decoupled_ppo",
        {"correction": "masked", "correction_floor": 1e-9, "correction_cap": 1.2},
    ),
    pipelinerl_sequence: (
        "pipelinerl",
        {
            "ratio": "reinforce",
            "ratio_from": "learner",
            "correction": "truncated",
            "correction_level": "sequence",
            "correction_cap": 1.2,
        },
    ),
    raft_best: ("raft", {"keep_samples": "best"}),
    ttrl_votes: ("ttrl", {"group_size": 2, "votes_per_prompt": 3}),
    reinforce_pp_k3: ("reinforce_pp", {"kl_estimator": "k3"}),
}
"""Objective: the algorithm file that it departs from, and how."""
PAPERS = papers.PAPERS | {f.__name__: f for f in (control_format, control_random, sft_gold)}
WITHOUT_SIGNAL = {
    "magistral": [],  # lengths are paid for
    "control_format": [0, 3],  # every completion of these ended by itself
    "control_random": [1],  # three times tails
}
"""Groups whose rewards are equal; of the other algorithms [2], the group without a success."""
