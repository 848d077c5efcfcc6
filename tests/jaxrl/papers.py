"""Objectives of the papers behind configs/algorithms, restated in numpy over one small batch.

Four groups of three ragged completions of a bigram model: one group without a success, two completions
at the length limit, a sampler and a reference of other weights. lp, lo, lb, lr: log-probabilities of
policy, learner at step start, sampler (behaviour), reference. Nothing here imports jaxrl.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

LONGEST, VOCAB = 6, 6

RNG = np.random.default_rng(5)
THETA = RNG.normal(0, 1, (VOCAB, VOCAB))  # logits of the next token, by token
OLD, SAMPLER, REFERENCE = (THETA + RNG.normal(0, s, THETA.shape) for s in (0.2, 0.25, 0.4))
DIRECTIONS = RNG.normal(0, 1, (3, VOCAB, VOCAB))
LENGTHS = [[3, 5, 2], [6, 1, 4], [6, 2, 3], [2, 4, 5]]
REWARDS = [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 1]]
ANSWERS = [["7", "3", "3"], ["1", "1", "2"], ["", "", ""], ["5", "4", ""]]
TOKENS = [[RNG.integers(0, VOCAB, n + 2) for n in row] for row in LENGTHS]
for _row in TOKENS:
    for _tokens in _row:
        _tokens[:2] = _row[0][:2]  # one prompt per group
VALUES = RNG.normal(0, 0.3, VOCAB)  # of a critic that looks at the last token


class View(NamedTuple):
    """One completion of n tokens as the papers see it; all [n] but r, correct and n."""

    lp: np.ndarray
    lo: np.ndarray
    lb: np.ndarray
    lr: np.ndarray
    entropy: np.ndarray  # of the learner at step start
    value: np.ndarray
    state: np.ndarray  # the token before, which is all that policy and critic look at
    r: float
    n: int
    answer: str
    coin: int  # of the random reward


Group = list[View]


def _log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def logprobs(theta: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Of the completion, which begins after two tokens of prompt."""
    return _log_softmax(theta)[tokens[1:-1], tokens[2:]]


def view(theta: np.ndarray, p: int, g: int, start: np.ndarray) -> View:
    tokens = TOKENS[p][g]
    log_p = _log_softmax(start)[tokens[1:-1]]
    return View(
        lp=logprobs(theta, tokens), lo=logprobs(start, tokens), lb=logprobs(SAMPLER, tokens),
        lr=logprobs(REFERENCE, tokens), entropy=-(np.exp(log_p) * log_p).sum(axis=-1),
        value=VALUES[tokens[1:-1]], state=tokens[1:-1], r=float(REWARDS[p][g]), n=len(tokens) - 2,
        answer=ANSWERS[p][g], coin=hashlib.blake2b(f"{p}/{g}".encode(), digest_size=1).digest()[0] & 1,
    )  # fmt: skip


# -- the papers: objectives J of one minibatch `mb`, groups that are part of `batch` --------------


def norm(rewards, eps=1e-6):
    r = np.array(rewards, float)
    return (r - r.mean()) / (r.std(ddof=1) + eps) if r.std() > 0 else r * 0


def center(rewards):
    return np.array(rewards, float) - np.mean(rewards)


def min_clip(rho, a, low=0.2, high=0.2, dual=1e9):
    j = np.minimum(rho * a, np.clip(rho, 1 - low, 1 + high) * a)
    return np.where(a < 0, np.maximum(j, dual * a), j)


def k3(v):
    return np.exp(v.lr - v.lp) - (v.lr - v.lp) - 1


def _rewards(group):
    return [v.r for v in group]


def overlong(v, penalty):
    """Soft overlong punishment with a buffer of 2 before the limit of 6."""
    return -penalty * min(max(v.n - (LONGEST - 2), 0) / 2, 1)


def paired(groups, advantages: Callable[[Group], np.ndarray]):
    return [(v, a) for group in groups for v, a in zip(group, advantages(group), strict=True)]


def token_mean(pairs, term):
    return sum(term(v, a).sum() for v, a in pairs) / sum(v.n for v, _ in pairs)


def sequence_mean(pairs, term):
    return np.mean([term(v, a).mean() for v, a in pairs])


def ratio(v):
    return np.exp(v.lp - v.lo)


def ratio_b(v):
    return np.exp(v.lp - v.lb)


def grpo(mb, batch):
    pairs = paired(mb, lambda g: norm(_rewards(g)))
    return sequence_mean(pairs, lambda v, a: min_clip(ratio(v), a) - 0.04 * k3(v))


def grpo_r1(mb, batch):
    pairs = paired(mb, lambda g: norm(_rewards(g)))
    return sequence_mean(pairs, lambda v, a: min_clip(ratio(v), a, 1, 10) - 0.001 * k3(v))


def ttrl(mb, batch):
    """The label is the most frequent answer, the first seen of several; no answer, no vote."""

    def agreement(group):
        said = [v.answer for v in group if v.answer]
        return norm([v.answer == max(said, key=said.count) for v in group] if said else [0, 0, 0])

    return sequence_mean(paired(mb, agreement), lambda v, a: min_clip(ratio(v), a) - 0.001 * k3(v))


def dr_grpo(mb, batch):
    pairs = paired(mb, lambda g: center(_rewards(g)))
    return sum(min_clip(ratio(v), a).sum() for v, a in pairs) / (len(pairs) * LONGEST)


def dapo_advantages(group):
    return norm([2 * v.r - 1 + overlong(v, 1.0) for v in group])


def dapo(mb, batch):
    pairs = paired(mb, dapo_advantages)
    return token_mean(pairs, lambda v, a: min_clip(ratio(v), a, 0.2, 0.28, 10))


def dapo_prompt(mb, batch):
    return np.mean([dapo([group], batch) for group in mb])


def magistral(mb, batch):
    pairs = paired(mb, lambda g: center([v.r + overlong(v, 0.1) for v in g]))
    a = np.array([a for _, a in pairs])
    pairs = [(v, (x - a.mean()) / (a.std() + 1e-6)) for v, x in pairs]
    return token_mean(pairs, lambda v, a: min_clip(ratio_b(v), a, 0.2, 0.28))


def gspo(mb, batch):
    pairs = paired(mb, lambda g: norm(_rewards(g)))
    return np.mean([min_clip(np.exp((v.lp - v.lo).mean()), a, 0.2, 0.27) for v, a in pairs])


def dppo(mb, batch):
    def term(v, a):
        moved = np.exp(v.lp) - np.exp(v.lb)
        return np.where(np.sign(a) * moved > 0.2, 0, ratio_b(v) * a)

    return token_mean(paired(mb, lambda g: norm(_rewards(g))), term)


def sapo(mb, batch):
    def term(v, a):
        tau = 1.0 if a > 0 else 1.05
        return a * 4 / tau / (1 + np.exp(-tau * (ratio(v) - 1)))

    return sequence_mean(paired(mb, lambda g: norm(_rewards(g))), term)


def bypass(mb, batch):
    pairs = paired(mb, lambda g: norm(_rewards(g)))
    return token_mean(pairs, lambda v, a: min_clip(ratio_b(v), a))


def maxrl(mb, batch):
    pairs = paired(mb, lambda g: center(_rewards(g)) / np.mean(_rewards(g)))
    return token_mean(pairs, lambda v, a: min_clip(ratio_b(v), a))


def intellect2(mb, batch):
    """Two-sided: the unclipped branch has min(rho, delta)."""

    def term(v, a):
        rho = ratio(v)
        clipped = np.clip(rho, 0.8, 1.2) * a
        return np.minimum(np.minimum(rho, 4) * a, clipped) - 0.001 * k3(v)

    return token_mean(paired(mb, lambda g: norm(_rewards(g))), term)


def top_threshold(batch):
    """Of the fifth of all tokens with the highest entropy."""
    return np.quantile(np.concatenate([v.entropy for group in batch for v in group]), 0.8)


def entropy_8020(mb, batch):
    threshold = top_threshold(batch)
    pairs = paired(mb, lambda g: norm(_rewards(g)))
    return token_mean(
        pairs, lambda v, a: min_clip(ratio(v), a, 0.2, 0.28) * (v.entropy >= threshold)
    )


def _shaped(v, a):
    return a + np.minimum(0.4 * v.entropy, abs(a) / 2)


def entropy_shaping(mb, batch):
    pairs = paired(mb, lambda g: norm(_rewards(g)))
    return token_mean(pairs, lambda v, a: min_clip(ratio(v), _shaped(v, a), 0.2, 0.28))


def _truncated(v, low, high):
    return np.clip(np.exp(v.lo - v.lb), low, high)


def tis(mb, batch):
    pairs = paired(mb, lambda g: norm(_rewards(g)))
    return token_mean(pairs, lambda v, a: _truncated(v, 0, 2) * min_clip(ratio(v), a))


def tis_sequence(mb, batch):
    pairs = paired(mb, lambda g: norm(_rewards(g)))
    return token_mean(
        pairs, lambda v, a: min(np.exp((v.lo - v.lb).sum()), 5) * min_clip(ratio(v), a)
    )


def mis(mb, batch):
    def term(v, a):
        w = np.exp(v.lo - v.lb)
        return np.where((w >= 0.5) & (w <= 5), w, 0) * min_clip(ratio(v), a)

    return token_mean(paired(mb, lambda g: norm(_rewards(g))), term)


def sequence_mask(mb, batch):
    def term(v, a):
        inside = 0.9 <= np.exp((v.lo - v.lb).mean()) <= 1.1
        return inside * min_clip(ratio_b(v), a)

    return token_mean(paired(mb, lambda g: norm(_rewards(g))), term)


def deepseek_v32(mb, batch):
    def term(v, a):
        kept = not (a < 0 and (v.lb - v.lo).mean() > 0.5)
        return kept * min_clip(ratio_b(v), a) - 0.001 * ratio_b(v) * k3(v)

    return sequence_mean(paired(mb, lambda g: center(_rewards(g))), term)


def _token_white(batch, advantages):
    """Advantages whitened over all tokens of the batch: {id of the completion: [n]}."""
    rows = {
        (v.n, v.lb.sum()): advantages(v, a) for v, a in paired(batch, lambda g: center(_rewards(g)))
    }
    every = np.concatenate(list(rows.values()))
    return {k: (a - every.mean()) / np.sqrt(every.var(ddof=1) + 1e-8) for k, a in rows.items()}


def white_pairs(mb, batch, advantages):
    white = _token_white(batch, advantages)
    return [(v, white[(v.n, v.lb.sum())]) for group in mb for v in group]


def decoupled_ppo(mb, batch):
    pairs = white_pairs(mb, batch, lambda v, a: np.full(v.n, 10 * a))
    return token_mean(pairs, lambda v, a: _truncated(v, 0, 5) * min_clip(ratio(v), a))


def returns(v, weight):
    """To go, with k1 against the reference in the reward."""
    rewards = -weight * (v.lo - v.lr)
    rewards[-1] += v.r
    return np.cumsum(rewards[::-1])[::-1]


def reinforce_pp(mb, batch):
    pairs = white_pairs(mb, batch, lambda v, a: returns(v, 0.01))
    return token_mean(pairs, lambda v, a: min_clip(ratio(v), a))


def reinforce_pp_baseline(mb, batch):
    pairs = white_pairs(mb, batch, lambda v, a: np.full(v.n, a))
    return token_mean(pairs, lambda v, a: min_clip(ratio(v), a) - 0.01 * (v.lp - v.lr) ** 2 / 2)


def ppo(mb, batch):
    """lambda = 1: return minus value."""
    pairs = white_pairs(mb, batch, lambda v, a: returns(v, 0.001) - v.value)
    return token_mean(pairs, lambda v, a: min_clip(ratio(v), a))


def gae(v, _):
    """Sum of (lambda)^k times the k-th temporal difference; nothing is worth anything after the end."""
    rewards = np.zeros(v.n)
    rewards[-1] = v.r
    delta = rewards + np.append(v.value[1:], 0) - v.value
    return np.array([sum(0.95 ** (k - t) * delta[k] for k in range(t, v.n)) for t in range(v.n)])


def ppo_shared(mb, batch):
    pairs = white_pairs(mb, batch, gae)
    return token_mean(pairs, lambda v, a: min_clip(ratio(v), a))


# Objectives with a weight that is not differentiated: that of the policy's present parameters.


def rloo(mb, batch):
    """J = mean over samples of A log pi(completion); the others' mean of r - beta KL is the baseline."""
    total = []
    for group in mb:
        r = np.array([v.r - 0.03 * (v.lo - v.lr).sum() for v in group])
        a = r - (r.sum() - r) / (len(r) - 1)
        total += [x * v.lp.sum() for v, x in zip(group, a, strict=True)]
    return np.mean(total)


def raft(mb, batch):
    right = [v for group in mb for v in group if v.r == 1]
    return sum(v.lp.sum() for v in right) / sum(v.n for v in right)


def gspo_token(mb, batch):
    """sg[s] pi / sg[pi], each token clipped by its own shaped advantage."""
    pairs = paired(mb, lambda g: norm(_rewards(g)))

    def term(v, a):
        at = PRESENT[(v.n, v.lb.sum())]
        s = np.exp((at - v.lo).mean()) * np.exp(v.lp - at)
        return min_clip(s, _shaped(v, a), 0.2, 0.27)

    return sequence_mean(pairs, term)


def cispo_term(v, a, old):
    return np.minimum(np.exp(PRESENT[(v.n, v.lb.sum())] - old), 5) * a * v.lp


def cispo(mb, batch):
    pairs = paired(mb, lambda g: norm(_rewards(g)))
    return token_mean(pairs, lambda v, a: cispo_term(v, a, v.lo))


def cispo_absolute(mb, batch):
    pairs = paired(mb, lambda g: norm(_rewards(g)))
    return token_mean(pairs, lambda v, a: cispo_term(v, a, v.lb))


def scalerl(mb, batch):
    """A mean per prompt; advantages over the standard deviation of all of them."""
    a = np.concatenate([center([2 * v.r - 1 for v in group]) for group in batch])
    scale = a.std(ddof=1) + 1e-6
    each = [
        token_mean(
            paired([group], lambda g: center([2 * v.r - 1 for v in g]) / scale),
            lambda v, a: cispo_term(v, a, v.lb),
        )
        for group in mb
    ]
    return np.mean(each)


def pipelinerl(mb, batch):
    pairs = paired(mb, lambda g: center(_rewards(g)) * len(g) / (len(g) - 1))
    return np.mean([cispo_term(v, a, v.lb).sum() for v, a in pairs])


PAPERS = {
    f.__name__: f
    for f in (
        grpo, grpo_r1, dr_grpo, dapo, dapo_prompt, magistral, gspo, gspo_token, dppo, sapo, bypass,
        maxrl, intellect2, entropy_8020, entropy_shaping, tis, tis_sequence, mis, sequence_mask,
        deepseek_v32, decoupled_ppo, reinforce_pp, reinforce_pp_baseline, ppo, ppo_shared, rloo, raft,
        cispo, cispo_absolute, scalerl, pipelinerl, ttrl,
    )
}  # fmt: skip
PRESENT = {
    (v.n, v.lb.sum()): v.lp for p in range(4) for g in range(3) for v in [view(THETA, p, g, OLD)]
}
