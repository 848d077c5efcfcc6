"""Eight devices compute what one computes; sizes that do not divide are refused."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from models.cache import init_cache, insert_prompts
from models.config import Lora, ModelConfig
from models.decoder import Decoder, decode_step, hidden_states, prefill
from models.fused import split_layers
from models.head import target_logprobs
from models.sharding import (
    adapt,
    batch_sharding,
    cache_shardings,
    init_sharded,
    make_mesh,
    policy_shardings,
    split_shardings,
)

ATOL = 1e-5  # float32 sums in another order across devices
F32 = jnp.float32
CONFIG = ModelConfig(
    vocab_size=64,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    ffw_size=48,
    qk_norm=True,
    qkv_bias=True,
)


@pytest.fixture(params=[(1, 4, 2), (2, 2, 2)], ids=str)
def mesh(request):
    data, fsdp, tensor = request.param
    return make_mesh(jax.devices()[:8], data=data, fsdp=fsdp, tensor=tensor)


def loss(policy, tokens, targets):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = hidden_states(policy, tokens, positions, jnp.ones_like(tokens), dtype=F32)
    logprobs, entropy = target_logprobs(
        policy, hidden, targets, temperature=1.0, chunk_tokens=64, dtype=F32
    )
    return jnp.mean(logprobs + 0.1 * entropy)


@pytest.mark.parametrize(
    ("axes", "config"),
    [
        pytest.param((1, 4, 2), CONFIG, marks=pytest.mark.slow),
        ((2, 2, 2), replace(CONFIG, vocab_size=61, tied_embeddings=False)),
    ],
    ids=["fsdp 4 tensor 2", "data 2 fsdp 2 tensor 2, V=61, untied"],
)
def test_loss_and_gradient_on_eight_devices_equal_one_device(axes, config):
    mesh = make_mesh(jax.devices()[:8], data=axes[0], fsdp=axes[1], tensor=axes[2])
    policy = Decoder(config, jax.random.key(0))
    tokens, targets = jax.random.randint(jax.random.key(1), (2, 8, 12), 0, config.vocab_size)
    value, grads = jax.jit(jax.value_and_grad(loss))(policy, tokens, targets)
    shardings = policy_shardings(config, mesh)
    placed = jax.device_put(policy, shardings)
    rows = jax.device_put((tokens, targets), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        value8, grads8 = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))(
            placed, *rows
        )
    np.testing.assert_allclose(value8, value, atol=ATOL)
    assert jax.tree.structure(grads8) == jax.tree.structure(grads)
    for a, b in zip(jax.tree.leaves(grads8), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=ATOL)


@pytest.mark.parametrize("adapted", [False, True], ids=["dense", "adapter"])
def test_split_layers_lie_where_their_parameters_lie(mesh, adapted):
    """Per device the bytes of its share of every matrix, and nothing is sent to lay them side by side."""
    lora = Lora(rank=4, alpha=8.0, targets=("q", "v", "gate", "down"))
    config = replace(CONFIG, lora=lora if adapted else None)
    policy = init_sharded(config, jax.random.key(0), mesh, F32)
    if adapted:
        policy = adapt(policy, jax.random.key(1), mesh)
    program = jax.jit(split_layers, out_shardings=split_shardings(config, mesh))
    compiled = program.lower(policy).compile()
    assert not re.findall(
        r"all-gather|all-to-all|all-reduce|collective-permute", compiled.as_text()
    )
    layer = program(policy)[1]
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    for weight in (*layer.qkv, layer.attention_out, *layer.gate_up, layer.down):
        whole = getattr(weight, "weight", weight)
        assert whole.addressable_shards[0].data.size == whole.size // shards
    for ours, plain in zip(
        jax.tree.leaves(layer), jax.tree.leaves(split_layers(policy)[1]), strict=True
    ):
        np.testing.assert_array_equal(ours, plain)


def test_decode_on_eight_devices_equals_one_device(mesh):
    policy = Decoder(CONFIG, jax.random.key(0))
    prompts = jax.random.randint(jax.random.key(1), (8, 4), 0, 64)

    def run(policy, prompts, cache):
        keys, values = prefill(policy, prompts, dtype=F32)
        cache = insert_prompts(cache, keys, values, jnp.arange(8)[::-1], jnp.arange(8))
        positions = jnp.full(8, 3)
        return decode_step(policy, cache, prompts[::-1, 3], positions, dtype=F32)

    cache = init_cache(CONFIG, 8, 32, F32)
    expected, cache1 = jax.jit(run)(policy, prompts, cache)
    placement = cache_shardings(CONFIG, mesh)
    placed = jax.device_put((policy, cache), (policy_shardings(CONFIG, mesh), placement))
    with jax.set_mesh(mesh):
        hidden, cache8 = jax.jit(run, out_shardings=(None, placement))(
            placed[0], prompts, placed[1]
        )
    np.testing.assert_allclose(hidden, expected, atol=ATOL)
    for a, b in zip(jax.tree.leaves(cache8), jax.tree.leaves(cache1), strict=True):
        np.testing.assert_allclose(a, b, atol=ATOL)


def test_sharded_initialisation_gives_the_values_of_one_device(mesh):
    sharded = init_sharded(CONFIG, jax.random.key(3), mesh, F32)
    plain = Decoder(CONFIG, jax.random.key(3))
    expected = policy_shardings(CONFIG, mesh)
    for s, p, e in zip(*map(jax.tree.leaves, (sharded, plain, expected)), strict=True):
        assert s.sharding.is_equivalent_to(e, s.ndim)
        np.testing.assert_allclose(s, p, atol=1e-6)  # the last bit of a scaled normal


def test_parameters_are_split_over_both_axes():
    mesh = make_mesh(jax.devices()[:8], data=1, fsdp=4, tensor=2)
    specs = jax.tree.map(lambda s: s.spec, policy_shardings(CONFIG, mesh))
    assert specs.layers.q == PartitionSpec(None, "fsdp", "tensor", None, None)
    assert specs.layers.down == PartitionSpec(None, "tensor", "fsdp")
    assert specs.embedding == PartitionSpec("tensor", "fsdp")


def test_a_vocabulary_that_does_not_divide_is_replicated():
    mesh = make_mesh(jax.devices()[:8], data=1, fsdp=4, tensor=2)
    policy = policy_shardings(replace(CONFIG, vocab_size=61), mesh)
    assert policy.embedding.spec == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize(
    ("change", "axes", "message"),
    [
        ({"num_kv_heads": 1}, (1, 4, 2), r"kv_heads=1 .* tensor=2; set tensor to one of \[1\]"),
        ({"ffw_size": 50}, (1, 2, 4), r"kv_heads=2 .* tensor=4; set tensor to one of \[1, 2\]"),
        ({"ffw_size": 49}, (1, 4, 2), r"ffw=49 .* tensor=2; set tensor to one of \[1, 7, 49\]"),
        ({"width": 30}, (1, 4, 2), r"width=30 .* fsdp=4; set fsdp to one of \[1, 2, 3, 5, 6,"),
    ],
)
def test_indivisible_sizes_are_refused_with_the_valid_ones(change, axes, message):
    mesh = make_mesh(jax.devices()[:8], data=axes[0], fsdp=axes[1], tensor=axes[2])
    with pytest.raises(ValueError, match=message):
        policy_shardings(replace(CONFIG, **change), mesh)


def test_a_mesh_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match=r"fsdp=3 .* needs 6 devices, but 8 were given"):
        make_mesh(jax.devices()[:8], data=1, fsdp=3, tensor=2)


def test_cache_heads_that_do_not_divide_are_refused():
    mesh = make_mesh(jax.devices()[:8], data=1, fsdp=2, tensor=4)
    with pytest.raises(ValueError, match=r"kv_heads=2 .*tensor=4"):
        cache_shardings(CONFIG, mesh)


def test_rows_stay_split_inside_the_layers():
    mesh = make_mesh(jax.devices()[:8], data=1, fsdp=8, tensor=1)
    policy = jax.device_put(Decoder(CONFIG, jax.random.key(0)), policy_shardings(CONFIG, mesh))
    tokens = jax.device_put(jnp.zeros((8, 16), jnp.int32), batch_sharding(mesh))
    forward = partial(hidden_states, dtype=F32)
    with jax.set_mesh(mesh):
        text = jax.jit(forward).lower(policy, tokens, tokens, tokens).compile().as_text()
    assert "f32[1,16,32]" in text  # one row per device
    assert "f32[8,16,48" not in text  # no device computes the MLP of all rows
