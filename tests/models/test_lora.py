"""An adapter changes a policy as the sum it stands for would, and nothing else is trained, kept or sent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.cache import init_cache, replace_start
from models.config import LORA_TARGETS, Lora, ModelConfig
from models.decoder import decode_step, hidden_states, prefill
from models.lora import AdaptedDecoder, adapter_table, init_adapter, merged
from models.sharding import (
    adapt,
    adapter_shardings,
    init_sharded,
    make_mesh,
    merge_adapter,
    policy_shardings,
)

LORA = Lora.of(4, 8.0, "all-linear")
CONFIG = ModelConfig(
    family="qwen2", vocab_size=61, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8,
    ffw_size=48, qkv_bias=True, max_positions=64, lora=LORA,
)  # fmt: skip
ATOL = 2e-6  # float32: x W + (x A) B and x (W + A B) round differently
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 12))


def adapted(config: ModelConfig = CONFIG, **mesh: int) -> AdaptedDecoder:
    """A policy whose adapter changes it, made of the same numbers on every mesh."""
    over = make_mesh(jax.devices()[: int(np.prod([*mesh.values(), 1]))], **mesh)
    base = init_sharded(config, jax.random.key(0), over, jnp.float32)
    table = adapter_table(config)
    keys = jax.random.split(jax.random.key(1), len(table))
    adapter = {
        name: 0.1 * jax.random.normal(key, p.shape)
        for (name, p), key in zip(table.items(), keys, strict=True)
    }
    return AdaptedDecoder(
        base=base, adapter=jax.device_put(adapter, adapter_shardings(config, over))
    )


def hidden(policy) -> np.ndarray:
    positions = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape)
    states = hidden_states(
        policy, jnp.array(TOKENS), jnp.array(positions), jnp.ones_like(TOKENS), dtype=jnp.float32
    )
    return np.asarray(states)


@pytest.fixture(scope="module")
def policy() -> AdaptedDecoder:
    return adapted()


def test_an_adapted_policy_computes_what_its_merged_weights_compute(policy):
    plain = hidden(policy.base)
    one = hidden(policy)
    assert np.abs(one - plain).max() > 0.1
    merged_policy = merge_adapter(CONFIG, policy.base, policy.adapter)
    np.testing.assert_allclose(one, hidden(merged_policy), atol=ATOL * np.abs(one).max(), rtol=0)


def test_a_fresh_adapter_changes_nothing_and_a_forgotten_target_stays():
    config = dataclasses.replace(CONFIG, lora=Lora.of(4, 8.0, "q_proj,v_proj"))
    mesh = make_mesh(jax.devices()[:1])
    base = init_sharded(config, jax.random.key(0), mesh, jnp.float32)
    fresh = adapt(base, jax.random.key(1), mesh)
    assert set(fresh.adapter) == {"q_a", "q_b", "v_a", "v_b"}
    assert np.array_equal(hidden(fresh), hidden(base))
    down = merged(config, "down", base.layers.down, fresh.adapter)
    assert down is base.layers.down


def test_decoding_with_an_adapter_equals_the_full_forward(policy):
    """Decode multiplies weights that meet the same input as one; the full forward apart."""
    b, t = TOKENS.shape
    cache = init_cache(CONFIG, b, 32, jnp.float32)
    cache = replace_start(cache, *prefill(policy, jnp.array(TOKENS[:, : t - 1]), dtype=jnp.float32))
    last, _ = decode_step(
        policy, cache, jnp.array(TOKENS[:, -1]), jnp.full(b, t - 1), dtype=jnp.float32
    )
    full = hidden(policy)[:, -1]
    np.testing.assert_allclose(np.asarray(last), full, atol=ATOL * np.abs(full).max(), rtol=0)


def test_arrays_of_an_adapter_are_split_as_the_weights_they_belong_to():
    mesh = make_mesh(jax.devices()[:4], fsdp=2, tensor=2)
    places = {name: s.spec for name, s in adapter_shardings(CONFIG, mesh).items()}
    weights = policy_shardings(CONFIG, mesh).layers
    for name in LORA_TARGETS.values():
        inputs = 3 if name == "attention_out" else 1
        of_weight = getattr(weights, name).spec
        assert tuple(places[f"{name}_a"]) == (*of_weight[: 1 + inputs], None)
        assert tuple(places[f"{name}_b"]) == (None, None, *of_weight[1 + inputs :])


@pytest.mark.slow
def test_four_devices_compute_what_one_does(policy):
    mesh = make_mesh(jax.devices()[:4], fsdp=2, tensor=2)
    four = adapted(fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        got = hidden(four)
    one = hidden(policy)
    np.testing.assert_allclose(got, one, atol=10 * ATOL * np.abs(one).max(), rtol=0)


@pytest.mark.parametrize("targets", ["q_proj,qproj", "", "lm_head"])
def test_an_unknown_target_is_named_with_those_there_are(targets: str):
    with pytest.raises(ValueError, match="all-linear, or some of q_proj"):
        Lora.of(4, 8.0, targets)


def test_an_adapters_size_is_rank_times_inputs_and_outputs():
    adapter = init_adapter(CONFIG, jax.random.key(0))
    d, q, kv, f = 32, 32, 16, 48
    per_layer = 4 * (d + q + 2 * (d + kv) + q + d + 3 * (d + f))
    assert sum(leaf.size for leaf in adapter.values()) == 2 * per_layer
