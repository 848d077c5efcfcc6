"""Counts, trees and transformations of the parameters."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest

from models.config import ModelConfig
from models.decoder import Decoder, abstract_decoder, num_parameters
from models.sharding import decay_mask

TINY = ModelConfig(
    vocab_size=61,
    width=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    ffw_size=48,
)
VARIANTS = {
    "llama": TINY,
    "qk_norm": replace(TINY, qk_norm=True),
    "qkv_bias": replace(TINY, qkv_bias=True),
    "untied": replace(TINY, tied_embeddings=False),
    "plain_mlp": replace(TINY, gated_mlp=False),
}


def published_configs(path):
    """(name, config, parameters) of every published dense decoder with an exact count."""
    for row in json.loads(path.read_text()):
        if row["exact_match"] is True and row["norms_per_layer"] == 2:
            yield (
                row["name"],
                ModelConfig(
                    vocab_size=row["vocab"],
                    width=row["hidden_size"],
                    num_layers=row["layers"],
                    num_heads=row["heads"],
                    num_kv_heads=row["kv_heads"],
                    head_size=row["head_dim"],
                    ffw_size=row["intermediate"],
                    qk_norm=row["qk_norm"],
                    qkv_bias=row["qkv_bias"],
                    tied_embeddings=row["tied"],
                ),
                row["params_total"],
            )


def test_counts_equal_the_published_ones(shared_data):
    rows = list(published_configs(shared_data / "roofline" / "model_configs.json"))
    assert len(rows) >= 16
    for name, config, parameters in rows:
        assert config.num_parameters == parameters, name
        assert num_parameters(abstract_decoder(config)) == parameters, name


@pytest.mark.parametrize("name", VARIANTS)
def test_tree_has_as_many_elements_as_the_configuration_says(name):
    config = VARIANTS[name]
    assert num_parameters(Decoder(config, jax.random.key(0))) == config.num_parameters


def test_abstract_decoder_has_the_structure_shapes_and_dtypes_of_a_real_one():
    abstract = abstract_decoder(TINY, jnp.bfloat16)
    real = Decoder(TINY, jax.random.key(0), jnp.bfloat16)
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    same = jax.tree.map(lambda a, r: (a.shape, a.dtype) == (r.shape, r.dtype), abstract, real)
    assert jax.tree.all(same)


def test_structure_is_the_same_inside_jit_and_after_tree_map():
    policy = Decoder(TINY, jax.random.key(0))
    made_in_jit = jax.jit(partial(Decoder, TINY))(jax.random.key(0))
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), policy)
    assert jax.tree.structure(policy) == jax.tree.structure(made_in_jit)
    assert jax.tree.structure(policy) == jax.tree.structure(cast)
    assert isinstance(cast, Decoder)
    assert cast.layers.q.dtype == jnp.bfloat16


def test_same_key_gives_same_parameters_and_another_key_others():
    a, b, c = (Decoder(TINY, jax.random.key(seed)) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), a, b))
    assert not bool(jnp.any(a.layers.q == c.layers.q))


def test_optax_masks_updates_and_grad_work_on_the_module():
    policy = Decoder(TINY, jax.random.key(0))
    optimizer = optax.chain(optax.add_decayed_weights(0.5, decay_mask(TINY)), optax.sgd(1e-2))

    def step(policy, state):
        grads = jax.tree.map(jnp.zeros_like, jax.grad(lambda p: jnp.sum(p.embedding))(policy))
        updates, state = optimizer.update(grads, state, policy)
        return optax.apply_updates(policy, updates), state

    after, _ = jax.jit(step)(policy, optimizer.init(policy))
    assert isinstance(after, Decoder)
    assert bool(jnp.all(after.embedding == policy.embedding))
    assert bool(jnp.all(after.layers.mlp_norm == policy.layers.mlp_norm))
    assert bool(jnp.all(after.layers.down != policy.layers.down))


def test_decay_covers_the_matrices_of_the_layers_and_nothing_else():
    config = replace(TINY, qk_norm=True, qkv_bias=True, tied_embeddings=False)
    flat = jax.tree_util.tree_leaves_with_path(decay_mask(config))
    decayed = {jax.tree_util.keystr(path[-1:], simple=True) for path, on in flat if on}
    assert decayed == {"q", "k", "v", "attention_out", "gate", "up", "down"}
