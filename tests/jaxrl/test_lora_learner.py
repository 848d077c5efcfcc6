"""Training an adapter: the base has no gradient, no optimizer state, no second copy, and is sent once."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import GrpoConfig
from jaxrl.learner.learner import Learner
from jaxrl.learner.optimizer import adamw, learning_rate
from jaxrl.learner.steps import ForwardSettings
from jaxrl.observe import Observer
from jaxrl.packing import pack, solutions_to_sequences
from jaxrl.weights import WeightStore
from models.config import Lora, ModelConfig
from models.lora import AdaptedDecoder, adapter_table
from models.sharding import adapt, init_sharded, make_mesh
from roofline import cost, parameters
from roofline.kernels import Layout

ADAM_STATES = 2  # mean and square
SAME_LOSS_RTOL = 1e-5  # float32 sums of the same terms in another order
COUNTERS = 64  # bytes that steps and counts may take


pytestmark = pytest.mark.usefixtures("optax_promotes")


@pytest.fixture(scope="module")
def model(tiny_model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(tiny_model, lora=Lora.of(2, 4.0, "all-linear"))


def make_learner(model: ModelConfig, kl_weight: float) -> Learner:
    mesh = make_mesh(jax.devices()[:1])
    base = init_sharded(model, jax.random.key(0), mesh, jnp.bfloat16)
    rate = learning_rate(peak=1e-2, warmup_steps=0, steps=10, schedule="constant")
    optimizer = adamw(
        model, rate, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, max_grad_norm=1.0
    )
    return Learner(
        model, mesh, adapt(base, jax.random.key(1), mesh), optimizer,
        forward=ForwardSettings(dtype=jnp.bfloat16, temperature=1.0, chunk_tokens=32, remat=False),
        grpo=GrpoConfig(kl_weight=kl_weight), max_nonfinite_steps=2, observer=Observer(),
    )  # fmt: skip


class Trained(NamedTuple):
    """A learner after three steps on two sentences."""

    learner: Learner
    first: list[np.ndarray]
    """The base before them."""
    losses: list[float]


@pytest.fixture(scope="module")
def trained(model: ModelConfig) -> Trained:
    with jax.numpy_dtype_promotion("standard"):
        learner = make_learner(model, kl_weight=0.1)
        learner.freeze_reference()
        first = [np.asarray(leaf) for leaf in jax.tree.leaves(learner.frozen)]
        losses = [learner.update_sft(batches())["sft/loss"] for _ in range(3)]
    return Trained(learner, first, losses)


@pytest.fixture(scope="module")
def learner(trained: Trained) -> Learner:
    return trained.learner


def batches():
    sequences = solutions_to_sequences([[2, 3], [4]], [[5, 6, 7], [8, 9, 10, 11]])
    return pack(sequences, row_tokens=16, rows_per_microbatch=2)[0]


def size(tree: object) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_only_the_adapter_learns_and_it_does(trained: Trained):
    learner, first, losses = trained
    assert losses[2] < losses[0]
    after = jax.tree.leaves(learner.frozen)
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(first, after, strict=True))
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(learner.state.policy))
    loss = learner.sft_loss(batches())
    assert loss == pytest.approx(learner.update_sft(batches())["sft/loss"], rel=SAME_LOSS_RTOL)


def test_memory_is_the_adapters_three_times_and_the_base_once(model: ModelConfig, learner: Learner):
    adapter = 4 * sum(int(np.prod(p.shape)) for p in adapter_table(model).values())
    assert size(learner.state.policy) == adapter
    assert (
        ADAM_STATES * adapter <= size(learner.state.optimizer) <= ADAM_STATES * adapter + COUNTERS
    )
    assert size(learner._zeros_sft(learner.state.policy)) == adapter
    assert learner.frozen is not None
    assert size(learner.frozen) == 2 * model.num_parameters
    assert learner.frozen.embedding.dtype == jnp.bfloat16


def test_the_reference_is_the_same_base_under_the_adapter_of_its_time(learner: Learner):
    reference = learner._reference
    assert isinstance(reference, AdaptedDecoder)
    assert reference.base is learner.frozen
    assert not np.any(np.asarray(reference.adapter["q_b"]))
    assert np.any(np.asarray(learner.policy.adapter["q_b"]))


def test_a_publication_sends_the_adapters_bytes_and_the_base_goes_over_once(
    model: ModelConfig, learner: Learner
):
    mesh, other = make_mesh(jax.devices()[:1]), make_mesh(jax.devices()[1:2])
    store = WeightStore(model, learner_mesh=mesh, rollout_mesh=other, dtype=jnp.bfloat16)
    first = store.publish(0, learner.policy).policy
    second = store.publish(1, learner.policy).policy
    assert isinstance(second, AdaptedDecoder)
    assert second.base is first.base
    assert second.base.embedding.devices() == set(jax.devices()[1:2])
    values = sum(int(np.prod(p.shape)) for p in adapter_table(model).values())
    assert store.published_bytes == size(second.adapter) == 2 * values
    predicted = cost.publish(
        model,
        Layout(compute_dtype="bfloat16", param_dtype="bfloat16", kv_dtype="bfloat16"),
        Layout(compute_dtype="bfloat16", param_dtype="bfloat16", kv_dtype="bfloat16"),
    )
    assert predicted.link_bytes == store.published_bytes


def test_on_the_same_device_rollout_and_learner_hold_one_base(model: ModelConfig, learner: Learner):
    mesh = make_mesh(jax.devices()[:1])
    store = WeightStore(model, learner_mesh=mesh, rollout_mesh=mesh, dtype=jnp.bfloat16)
    assert store.publish(0, learner.policy).policy.base is learner.frozen


def test_the_optimizers_predicted_bytes_are_the_adapters(model: ModelConfig, learner: Learner):
    layout = Layout(compute_dtype="bfloat16", param_dtype="bfloat16", kv_dtype="bfloat16")
    assert parameters.trained_parameters(model, layout) * 4 == size(learner.state.policy)
    assert cost.optimizer(model, layout).hbm_bytes == 32 * parameters.trained_parameters(
        model, layout
    )
    assert parameters.trained_arrays(model) == len(learner.state.policy)
