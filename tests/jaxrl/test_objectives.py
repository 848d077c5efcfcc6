"""Each algorithm file against its paper's objective, restated in numpy: value and gradient.

papers.py and paper_options.py hold the batch and the objectives. The sampler is stale, and where the
algorithm makes several updates, the learner has moved since the first. The whole path runs: groups,
advantages, filters, scores, minibatches, packing, loss.
"""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.algorithms.loss import policy_loss, sft_loss, value_loss
from jaxrl.algorithms.votes import pay_majority
from jaxrl.batch import Batch
from jaxrl.cli import load_algorithm, resolve_config
from jaxrl.config import Config, GrpoConfig
from jaxrl.learner.learner import Scores
from jaxrl.learner.prepare import Rows, prepare
from jaxrl.packing import solutions_to_sequences
from jaxrl.presets import presets
from jaxrl.refill import take_batch
from jaxrl.types import Completion, Finish, Problem, Prompt, Reward, Rollout, RolloutGroup
from models.rows import SharedPrompts

_path = Path(__file__).with_name("paper_options.py")
_spec = importlib.util.spec_from_file_location("paper_options", _path)
paper_options = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(paper_options)
papers = paper_options.papers

VALUE = 2e-6  # float32 sums of some 40 terms of size 1, weighted to a mean, against float64
SLOPE = 5e-5  # float32 derivatives along directions of norm 6; central differences add 1e-8
STEP = 1e-5
LAYOUT = 1e-6  # float32 gradients of size 0.1, summed in another order


def _groups() -> list[RolloutGroup]:
    return [
        RolloutGroup(
            prompt=Prompt(
                index=p, problem=Problem(id=p, prompt="", answer="", solution=""),
                tokens=tuple(int(t) for t in papers.TOKENS[p][0][:2]),
            ),
            birth_version=0,
            rollouts=tuple(_rollout(p, g) for g in range(3)),
        )
        for p in range(4)
    ]  # fmt: skip


def _rollout(p: int, g: int) -> Rollout:
    tokens = papers.TOKENS[p][g]
    size = len(tokens) - 2
    return Rollout(
        completion=Completion(
            tokens=tokens[2:].astype(np.int32),
            sampler_logprobs=papers.logprobs(papers.SAMPLER, tokens).astype(np.float32),
            versions=np.zeros(size, np.int32),
            finish=Finish.LENGTH if size == papers.LONGEST else Finish.STOP,
            sample_index=g,
        ),
        text="",
        reward=Reward(
            total=float(papers.REWARDS[p][g]),
            correct=papers.REWARDS[p][g] == 1,
            answer=papers.ANSWERS[p][g],
        ),
    )


def _score(theta, batch: Batch) -> tuple[jax.Array, jax.Array]:
    log_p = jax.nn.log_softmax(jnp.asarray(theta, jnp.float32)[batch.tokens])
    logprobs = jnp.take_along_axis(log_p, jnp.asarray(batch.targets)[..., None], axis=-1)[..., 0]
    return logprobs, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


class BigramLearner:
    """Scores with the parameters at the start of the step."""

    kl_weight = 0.0

    def __init__(self, grpo: GrpoConfig, start: np.ndarray) -> None:
        self.kl_weight, self._start = grpo.kl_weight, start

    def set_kl_weight(self, weight: float) -> None:
        raise NotImplementedError

    def score_batches(self, batches):
        return [
            Scores(
                logprobs=np.asarray(_score(self._start, b)[0]),
                entropy=np.asarray(_score(self._start, b)[1]),
                reference_logprobs=np.asarray(_score(papers.REFERENCE, b)[0]),
                values=papers.VALUES[b.tokens].astype(np.float32),
            )
            for b in batches
        ]


def _total(theta, batches: list[Batch], grpo: GrpoConfig) -> jax.Array:
    total = jnp.float32(0)
    for batch in batches:
        logprobs, entropy = _score(theta, batch)
        reference = _score(papers.REFERENCE, batch)[0] if grpo.uses_reference else None
        total = total + policy_loss(
            logprobs, entropy, batch, learner_logprobs=batch.learner_logprobs,
            reference_logprobs=reference, settings=grpo,
        )[0]  # fmt: skip
    return total


def _settings(name: str) -> GrpoConfig:
    base = Config(grpo=GrpoConfig(prompts_per_step=4, group_size=3))
    return load_algorithm(resolve_config(name, "--algorithm"), base)[0].grpo


class Finished:
    """All four groups, and then no more."""

    def take(self, number=None):
        return _groups() if number is None else []

    def discard(self, number):
        pass


ROWS = Rows(row_tokens=17, rows_per_microbatch=2, max_new_tokens=papers.LONGEST)


THETA = jnp.asarray(papers.THETA, jnp.float32)
REINFORCED = [name for name in paper_options.PAPERS if name != "sft_gold"]


@pytest.mark.parametrize("name", REINFORCED)
def test_value_and_gradient_are_those_of_the_papers_objective(name):
    _compare(name, _settings(name), paper_options.PAPERS[name])


@pytest.mark.parametrize(
    "objective", paper_options.OPTIONS, ids=lambda objective: objective.__name__
)
def test_named_options_are_those_of_their_sources(objective):
    name, options = paper_options.OPTIONS[objective]
    _compare(name, dataclasses.replace(_settings(name), **options), objective)


def _compare(name: str, settings: GrpoConfig, restated) -> None:
    """`restated` is the objective of `settings`, which come from the algorithm file `name`."""
    start = papers.OLD if settings.scores_first else papers.THETA
    taken = take_batch(Finished(), settings, papers.LONGEST)
    prepared = prepare(taken.groups, settings, ROWS, BigramLearner(settings, start))
    dropped = paper_options.WITHOUT_SIGNAL.get(name, [2]) if settings.drop_zero_advantage else []
    kept = [p for p in range(4) if p not in dropped]
    shares = [share for share in np.array_split(kept, settings.minibatches) if share.size]
    if settings.keep_samples == "correct":
        shares = [np.array([0, 1, 3])]
    assert len(prepared.minibatches) == len(shares)
    moved = 0.0
    for batches, share in zip(prepared.minibatches, shares, strict=True):

        def objective(theta, share=share):
            views = {p: [papers.view(theta, p, g, start) for g in range(3)] for p in kept}
            return -restated([views[p] for p in share], list(views.values()))

        value, gradient = jax.value_and_grad(_total)(THETA, batches, settings)
        moved = max(moved, _agree(value, gradient, objective))
    assert moved > 100 * SLOPE


def _agree(value, gradient, objective) -> float:
    """Ours against the restatement, in value and along directions; the steepest slope."""
    np.testing.assert_allclose(float(value), objective(papers.THETA), atol=VALUE, rtol=2e-6)
    slopes = []
    for direction in papers.DIRECTIONS:
        numeric = objective(papers.THETA + STEP * direction) - objective(
            papers.THETA - STEP * direction
        )
        slopes.append(float(np.sum(np.asarray(gradient, np.float64) * direction)))
        np.testing.assert_allclose(slopes[-1], numeric / (2 * STEP), atol=SLOPE)
    return max(map(abs, slopes))


def test_supervised_training_has_the_value_and_gradient_of_the_cross_entropy():
    """The batch of sft_gold: prompts with solutions, as the cold start packs them."""
    tokens = [papers.TOKENS[p][g].tolist() for p in range(4) for g in range(3)]
    sequences = solutions_to_sequences([t[:2] for t in tokens], [t[2:] for t in tokens])
    batches, _ = ROWS.pack(sequences)

    def total(theta):
        return sum((sft_loss(_score(theta, batch)[0], batch) for batch in batches), jnp.float32(0))

    def objective(theta):
        views = [[papers.view(theta, p, g, theta) for g in range(3)] for p in range(4)]
        return -paper_options.PAPERS["sft_gold"](views, views)

    assert len(batches) > 1
    assert _settings("sft_gold").ratio == "ppo"  # its grpo section is the default: nothing reads it
    assert _agree(*jax.value_and_grad(total)(THETA), objective) > 100 * SLOPE


def test_every_algorithm_has_its_objective_restated():
    assert {preset.name for preset in presets()} == set(paper_options.PAPERS)


OTHER_ROWS = Rows(
    row_tokens=17, rows_per_microbatch=1, max_new_tokens=papers.LONGEST,
    shared=SharedPrompts(prompt_tokens=1, parts=2),
)  # fmt: skip


@pytest.mark.parametrize("name", REINFORCED)
def test_microbatches_padding_order_and_shared_prompts_change_nothing(name):
    """Two rows in a micro-batch, each sample with its prompt, against one row, turned round, prompts shared."""
    settings = _settings(name)
    first = _gradients(_groups(), settings, ROWS)
    other = _gradients(_turned(name), settings, OTHER_ROWS)
    for mine, expected in zip(other, first, strict=True):
        np.testing.assert_allclose(mine, expected, atol=LAYOUT)
    assert max(np.abs(one).max() for one in first) > 100 * LAYOUT


@pytest.mark.parametrize(
    "objective", paper_options.REJECTIONS, ids=lambda objective: objective.__name__
)
def test_rejection_is_over_the_optimizer_batch_in_any_layout(objective):
    name, options = paper_options.REJECTIONS[objective]
    settings = dataclasses.replace(_settings(name), **options)
    first = _gradients(_groups(), settings, ROWS)
    other = _gradients(_turned(name), settings, OTHER_ROWS)
    for mine, expected in zip(other, first, strict=True):
        np.testing.assert_allclose(mine, expected, atol=LAYOUT)
    assert max(np.abs(one).max() for one in first) > 100 * LAYOUT


def _turned(name: str) -> list[RolloutGroup]:
    """The samples of each group from last to first; not where the first of equal answers counts."""
    if name == "ttrl":
        return _groups()
    return [dataclasses.replace(g, rollouts=g.rollouts[::-1]) for g in _groups()]


def _gradients(groups, settings: GrpoConfig, rows: Rows) -> list[np.ndarray]:
    """Of each minibatch."""
    start = papers.OLD if settings.scores_first else papers.THETA
    if settings.reward_from == "majority":
        groups = [pay_majority(group, settings.group_size) for group in groups]
    prepared = prepare(groups, settings, rows, BigramLearner(settings, start))
    return [np.asarray(jax.grad(_total)(THETA, b, settings)) for b in prepared.minibatches]


@pytest.mark.parametrize("name", paper_options.VALUE_TARGETS)
def test_the_value_loss_is_half_the_larger_of_two_squares(name):
    """Value and gradient, of a critic that has moved since the step began, some values beyond the clip."""
    settings = _settings(name)
    prepared = prepare(_groups(), settings, ROWS, BigramLearner(settings, papers.OLD))
    clip, shares = settings.value_clip, np.array_split(np.arange(4), settings.minibatches)
    table, num_clipped = papers.VALUES + np.linspace(-0.8, 0.8, papers.VOCAB), 0.0
    for batches, share in zip(prepared.minibatches, shares, strict=True):
        views = [[papers.view(papers.THETA, p, g, papers.OLD) for g in range(3)] for p in share]

        def objective(values, views=views):
            return paper_options.value_loss(views, paper_options.VALUE_TARGETS[name], values, clip)

        def ours(values, batches=batches):
            parts = [value_loss(values[jnp.asarray(b.tokens)], b, clip=clip) for b in batches]
            return sum((loss for loss, _ in parts), jnp.float32(0)), sum(n for _, n in parts)

        values = jnp.asarray(table, jnp.float32)
        (value, clipped), gradient = jax.value_and_grad(ours, has_aux=True)(values)
        num_clipped += float(clipped)
        np.testing.assert_allclose(float(value), objective(table), atol=VALUE)
        for n, direction in enumerate(np.eye(papers.VOCAB)):
            numeric = objective(table + STEP * direction) - objective(table - STEP * direction)
            np.testing.assert_allclose(float(gradient[n]), numeric / (2 * STEP), atol=SLOPE)
    assert 0 < num_clipped < sum(map(sum, papers.LENGTHS))
