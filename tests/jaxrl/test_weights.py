"""Publication: between unlike meshes, without the host, two buffers at most, buffers of its own."""

import gc
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.rollout.laid_out import LaidOut
from jaxrl.weights import WeightStore
from models.config import Lora, ModelConfig
from models.decoder import Decoder
from models.fused import can_view, fused, split_layers
from models.sharding import init_sharded, make_mesh, policy_shardings

ALIGNED = 64
"""Bytes; XLA copies an array that begins elsewhere, as the second scale of a norm over 8 numbers does."""


def make_store(
    model: ModelConfig, learner: tuple[int, int, int], rollout: tuple[int, int]
) -> tuple[WeightStore, Decoder]:
    """A store from a learner mesh (data, fsdp, tensor) to a rollout mesh (data, tensor) on other devices."""
    first, (data, fsdp, tensor) = int(np.prod(learner)), learner
    mesh = make_mesh(jax.devices()[:first], data=data, fsdp=fsdp, tensor=tensor)
    devices = jax.devices()[first : first + int(np.prod(rollout))]
    rollout_mesh = make_mesh(devices, data=rollout[0], fsdp=1, tensor=rollout[1])
    store = WeightStore(model, learner_mesh=mesh, rollout_mesh=rollout_mesh, dtype=jnp.float32)
    one = init_sharded(model, jax.random.key(0), make_mesh(jax.devices()[:1]), jnp.float32)
    return store, jax.device_put(one, policy_shardings(model, mesh))


@pytest.mark.parametrize(
    ("learner", "rollout"),
    [
        ((1, 1, 1), (1, 1)),
        ((1, 4, 1), (1, 2)),
        ((1, 2, 2), (2, 2)),
        ((2, 2, 1), (4, 1)),
        ((1, 3, 1), (1, 1)),
    ],
)
def test_what_arrives_equals_what_was_sent(
    tiny_model: ModelConfig, learner: tuple[int, int, int], rollout: tuple[int, int]
) -> None:
    if tiny_model.width % learner[1]:
        tiny_model = ModelConfig(
            vocab_size=14, width=48, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8,
            ffw_size=64, qk_norm=True,
        )  # fmt: skip
    store, policy = make_store(tiny_model, learner, rollout)
    arrived = store.publish(1, policy).policy
    expected = fused(policy) if rollout == (1, 1) else policy  # one CPU samples from one copy
    assert jax.tree.structure(arrived) == jax.tree.structure(expected)
    for sent, got in zip(jax.tree.leaves(expected), jax.tree.leaves(arrived), strict=True):
        np.testing.assert_array_equal(np.asarray(sent), np.asarray(got))
        assert got.sharding.device_set.isdisjoint(sent.sharding.device_set)


def test_publication_never_goes_through_the_host(
    tiny_model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An array that is read on the host computes its `_value`; publishing must not."""
    array_type = type(jnp.zeros(1))
    store, policy = make_store(tiny_model, (1, 4, 1), (1, 2))
    store.publish(0, policy)
    read: list[object] = []
    value = array_type._value

    def spy(self: jax.Array) -> np.ndarray:
        read.append(self)
        return value.__get__(self)

    monkeypatch.setattr(array_type, "_value", property(spy))
    store.publish(1, policy)
    assert not read
    np.asarray(policy.embedding)
    assert read  # the spy does see host reads


def test_at_most_two_copies_exist(tiny_model: ModelConfig) -> None:
    store, policy = make_store(tiny_model, (1, 1, 1), (1, 1))
    device = jax.devices()[1]
    size = policy.layers.down.swapaxes(1, 2).shape  # as a sampler on one CPU holds it

    def copies() -> int:
        gc.collect()
        return sum(a.shape == size and a.devices() == {device} for a in jax.live_arrays())

    before = copies()  # of other tests
    store.publish(0, policy)
    store.current()
    for version in range(1, 5):
        store.publish(version, policy)
        assert copies() - before == 2
    assert store.current().version == 4


def test_the_rollout_switches_when_it_asks_and_not_before(tiny_model: ModelConfig) -> None:
    store, policy = make_store(tiny_model, (1, 1, 1), (1, 1))
    store.publish(0, policy)
    used = store.current()
    store.publish(1, policy)
    assert used.version == 0
    assert store.current().version == 1


def test_sampling_before_anything_was_published_is_an_error(tiny_model: ModelConfig) -> None:
    store, _ = make_store(tiny_model, (1, 1, 1), (1, 1))
    with pytest.raises(RuntimeError, match="no weights"):
        store.current()


def test_on_one_cpu_the_rollout_reads_the_weights_where_they_arrived(
    tiny_model: ModelConfig,
) -> None:
    """One copy of the weights and no second one laid out for decoding; a new version is not written over it."""
    store, policy = make_store(tiny_model, (1, 1, 1), (1, 1))
    mesh = make_mesh(jax.devices()[1:2])
    weights = LaidOut(tiny_model, mesh, jnp.float32)
    store.publish(0, policy)
    snapshot = store.current()
    stack, layers = snapshot.policy.layers, weights.of(snapshot)
    for i, layer in enumerate(layers):
        for whole, part in zip(jax.tree.leaves(stack), jax.tree.leaves(layer), strict=True):
            inside = part.unsafe_buffer_pointer() - whole.unsafe_buffer_pointer()
            assert inside == i * part.nbytes or part.nbytes % ALIGNED
    store.publish(1, jax.tree.map(lambda x: x + 1, policy))
    for ours, plain in zip(
        jax.tree.leaves(layers), jax.tree.leaves(split_layers(fused(policy))), strict=True
    ):
        np.testing.assert_array_equal(ours, plain)
    weights.drop()
    assert not jax.tree.leaves(stack)[0].is_deleted()


def test_only_a_single_cpu_without_an_adapter_reads_a_snapshot_itself(
    tiny_model: ModelConfig,
) -> None:
    assert can_view(tiny_model, jax.devices()[0], 1)
    assert not can_view(tiny_model, jax.devices()[0], 2)
    adapted = replace(tiny_model, lora=Lora(rank=2, alpha=2.0, targets=("q",)))
    assert not can_view(adapted, jax.devices()[0], 1)
