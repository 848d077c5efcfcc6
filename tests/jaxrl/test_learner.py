"""The learner: what splitting, padding, packing and sharding must not change; bad gradients; tracing."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl.batch import Batch
from jaxrl.config import GrpoConfig
from jaxrl.errors import UserError
from jaxrl.learner.learner import Learner
from jaxrl.learner.optimizer import adamw, clip_to, learning_rate
from jaxrl.learner.steps import ForwardSettings, add_gradient, score
from jaxrl.observe import Observer
from jaxrl.packing import TrainSequence, pack
from models.config import ModelConfig
from models.decoder import Decoder
from models.sharding import init_sharded, make_mesh, policy_shardings

SAME_SUM_RTOL = 2e-4
"""float32 gradients of the same sum in another order, relative to their norm."""
ROUNDED_RTOL = 1e-6
"""A few roundings of float32: other programs of the same sums and products."""
FORWARD = ForwardSettings(dtype=jnp.float32, temperature=1.0, chunk_tokens=32, remat=False)


pytestmark = pytest.mark.usefixtures("optax_promotes")


def make_learner(
    model: ModelConfig, devices: int = 1, fsdp: int = 1, tensor: int = 1, **settings: object
) -> Learner:
    data = devices // (fsdp * tensor)
    mesh = make_mesh(jax.devices()[:devices], data=data, fsdp=fsdp, tensor=tensor)
    one = init_sharded(model, jax.random.key(0), make_mesh(jax.devices()[:1]), jnp.float32)
    rate = learning_rate(peak=1e-2, warmup_steps=0, steps=10, schedule="constant")
    optimizer = adamw(
        model, rate, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, max_grad_norm=1.0
    )
    grpo = GrpoConfig(**settings)
    return Learner(
        model,
        mesh,
        jax.device_put(one, policy_shardings(model, mesh)),
        optimizer,
        forward=FORWARD,
        grpo=grpo,
        max_nonfinite_steps=2,
        observer=Observer(),
    )


def sequences(count: int = 12) -> list[TrainSequence]:
    """Ragged prompts and completions with advantages of both signs and stale sampler log-probabilities."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        length, prompt = int(rng.integers(5, 15)), int(rng.integers(1, 5))
        mask = np.arange(length) >= prompt
        made.append(
            TrainSequence(
                tokens=rng.integers(2, 14, length).astype(np.int32),
                loss_mask=mask,
                sampler_logprobs=np.where(mask, -2.6 + 0.3 * rng.normal(size=length), 0).astype(
                    np.float32
                ),
                advantages=np.where(mask, rng.normal(), 0).astype(np.float32),
                token_weights=np.where(mask, 1 / 80, 0).astype(np.float32),
            )
        )
    return made


def packed(row_tokens: int = 32, rows: int = 8, order: Sequence[int] | None = None) -> list[Batch]:
    made = sequences()
    chosen = made if order is None else [made[i] for i in order]
    batches, _ = pack(chosen, row_tokens=row_tokens, rows_per_microbatch=rows)
    return batches


def gradients(learner: Learner, batches: Sequence[Batch]) -> np.ndarray:
    """All gradients of one optimizer batch, flat, in one order for every mesh."""
    with jax.set_mesh(learner.mesh):
        total = learner._zeros(learner.state.policy)
        metrics = learner._zero_metrics(learner._put(batches[0]), None)
        for batch in batches:
            total, metrics = learner._accumulate(
                learner.state.policy, total, metrics, learner._put(batch), None
            )
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(total)])


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    assert np.linalg.norm(expected) > 1e-3
    assert np.linalg.norm(got - expected) < SAME_SUM_RTOL * np.linalg.norm(expected)


@pytest.fixture(scope="module")
def expected(tiny_model: ModelConfig) -> np.ndarray:
    with jax.numpy_dtype_promotion("standard"):
        return gradients(make_learner(tiny_model), packed())


@pytest.mark.parametrize(
    "batches",
    [
        packed(rows=2),
        packed(rows=16),
        packed(row_tokens=15),
        packed(row_tokens=48),
        packed(order=list(range(11, -1, -1))),
    ],
    ids=["micro-batches", "empty rows", "one sequence per row", "longer rows", "another order"],
)
def test_layout_of_the_batch_does_not_change_the_gradient(
    tiny_model: ModelConfig, expected: np.ndarray, batches: list[Batch]
) -> None:
    assert_same(gradients(make_learner(tiny_model), batches), expected)


@pytest.mark.parametrize(("fsdp", "tensor"), [(8, 1), (2, 2), (1, 1)])
def test_eight_devices_compute_the_gradient_of_one(
    tiny_model: ModelConfig, expected: np.ndarray, fsdp: int, tensor: int
) -> None:
    learner = make_learner(tiny_model, devices=8, fsdp=fsdp, tensor=tensor)
    assert_same(gradients(learner, packed()), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_adding_where_the_sums_lie_gives_the_same_sums(tiny_model: ModelConfig, tied: bool) -> None:
    model = replace(tiny_model, tied_embeddings=tied)
    policy = Decoder(model, jax.random.key(0))
    before = jax.tree.map(lambda x: 0.1 * x, Decoder(model, jax.random.key(1)))
    batch = packed()[0]

    def loss(policy: Decoder) -> tuple[jax.Array, jax.Array]:
        logprobs, entropy = score(policy, batch, FORWARD)
        return jnp.sum(logprobs * batch.token_weights), jnp.sum(entropy)

    got, seen = jax.jit(partial(add_gradient, loss))(policy, before)
    gradient, expected_seen = jax.jit(jax.grad(loss, has_aux=True))(policy)
    expected = jax.tree.map(jnp.add, before, gradient)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(mine - theirs) < ROUNDED_RTOL * np.linalg.norm(theirs)
    np.testing.assert_allclose(seen, expected_seen, rtol=ROUNDED_RTOL)


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_clipping_is_optaxs_and_changes_no_bit_within_the_bound(size: float) -> None:
    draw = np.random.default_rng(0)
    gradients = {"a": jnp.asarray(draw.normal(size=(7, 5)), jnp.float32), "b": jnp.ones(3)}
    norm = optax.global_norm(gradients)
    gradients = jax.tree.map(lambda x: x * size / norm, gradients)
    norm = optax.global_norm(gradients)
    got, _ = clip_to(2.0).update(gradients, optax.EmptyState(), norm=norm)
    expected, _ = optax.clip_by_global_norm(2.0).update(gradients, optax.EmptyState())
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=ROUNDED_RTOL if size > 2.0 else 0.0)


def test_nothing_is_traced_after_the_first_step(tiny_model: ModelConfig) -> None:
    learner = make_learner(tiny_model)
    learner.update(packed(rows=4))
    traced = learner.trace_count
    for order in ([0, 1], [2, 3, 4, 5, 6, 7], list(range(12))):
        learner.update(packed(rows=4, order=order))
    assert learner.trace_count == traced


def test_a_nonfinite_step_is_skipped_and_counted_then_refused(tiny_model: ModelConfig) -> None:
    learner = make_learner(tiny_model)
    learner.update(packed())
    before = np.asarray(learner.state.policy.embedding)
    (bad,) = packed()
    bad.advantages[0, 0] = np.inf
    bad.loss_mask[0, 0] = True
    metrics = learner.update([bad])
    assert metrics["actor/nonfinite_steps"] == 1
    np.testing.assert_array_equal(np.asarray(learner.state.policy.embedding), before)
    learner.update(packed())
    assert not np.array_equal(np.asarray(learner.state.policy.embedding), before)
    learner.update([bad])
    with pytest.raises(UserError, match=r"2 optimizer steps in a row.*train\.learning_rate"):
        learner.update([bad])


def test_the_reference_is_frozen_and_its_kl_grows(tiny_model: ModelConfig) -> None:
    learner = make_learner(tiny_model, kl_weight=0.01)
    learner.freeze_reference()
    first = learner.update(packed())
    assert abs(first["reference/kl_mean"]) < 1e-6
    later = [learner.update(packed()) for _ in range(3)][-1]
    assert later["reference/kl_mean"] > 1e-3
    assert later["reference/logprob_mean"] == pytest.approx(
        first["reference/logprob_mean"], abs=1e-6
    )


def test_on_a_cpu_sums_of_gradients_stay_where_they_are_at_zero(tiny_model: ModelConfig) -> None:
    keeping, anew = make_learner(tiny_model), make_learner(tiny_model)
    places = []
    for _ in range(3):
        anew._sums._kept = None
        keeping.update(packed(rows=2))
        anew.update(packed(rows=2))
        kept = jax.tree.leaves(keeping._sums._kept)
        assert not any(np.any(np.asarray(leaf)) for leaf in kept)
        places.append([leaf.unsafe_buffer_pointer() for leaf in kept])
    assert places[0] == places[1] == places[2]
    jax.tree.map(np.testing.assert_array_equal, keeping.state.policy, anew.state.policy)


def test_weight_decay_spares_norms_and_embeddings(tiny_model: ModelConfig) -> None:
    """Zero gradients: what changes is what decays."""
    learner = make_learner(tiny_model)
    before = jax.tree.map(np.asarray, learner.state.policy)
    with jax.set_mesh(learner.mesh):
        learner._take_step(learner._zeros(learner.state.policy))
    after = learner.state.policy
    np.testing.assert_array_equal(np.asarray(after.embedding), before.embedding)
    np.testing.assert_array_equal(np.asarray(after.layers.mlp_norm), before.layers.mlp_norm)
    assert not np.array_equal(np.asarray(after.layers.down), before.layers.down)


def test_learning_rate_warms_up_and_ends_at_a_tenth() -> None:
    rate = learning_rate(peak=1.0, warmup_steps=4, steps=20, schedule="linear")
    assert [float(rate(i)) for i in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert float(rate(20)) == pytest.approx(0.1)
    cosine = learning_rate(peak=1.0, warmup_steps=0, steps=10, schedule="cosine")
    assert float(cosine(0)) == pytest.approx(1.0)
    assert float(cosine(10)) == pytest.approx(0.1)
