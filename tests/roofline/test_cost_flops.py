"""Predicted flops, bytes and arrays against what the model's own programs and arrays contain."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from models.cache import KEY_BLOCK, init_cache
from models.config import Lora, ModelConfig
from models.decoder import (
    abstract_decoder,
    decode_step,
    hidden_states,
    num_parameters,
    prefill,
)
from models.head import head_logits, target_logprobs
from models.lora import AdaptedDecoder, init_adapter
from models.prefixes import init_prefixes
from models.rows import PrefixRows, SharedPrompts
from models.sharding import make_mesh, policy_shardings
from roofline import cost, parameters
from roofline.kernels import Layout, stored_in
from roofline.memory import kv_cache_bytes, memory_per_device

TINY = ModelConfig(
    vocab_size=23, width=32, num_layers=3, num_heads=4, num_kv_heads=2, head_size=10, ffw_size=56
)
QWEN3_LIKE = ModelConfig(
    vocab_size=64,
    width=48,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_size=16,
    ffw_size=40,
    qk_norm=True,
    tied_embeddings=False,
)
QWEN2_LIKE = ModelConfig(
    vocab_size=40,
    width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_size=8,
    ffw_size=24,
    qkv_bias=True,
    gated_mlp=False,
)
MODELS = [TINY, QWEN3_LIKE, QWEN2_LIKE]


def dot_flops(jaxpr: Any, times: int = 1) -> int:
    """2 * product of all dimensions of every dot_general, loop bodies times their trip count."""
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (left, _), (batch, _) = equation.params["dimension_numbers"]
            l, r = (v.aval.shape for v in equation.invars[:2])
            inner = math.prod(l[i] for i in left)
            shared = math.prod(l[i] for i in batch)
            rows, columns = math.prod(l) // (inner * shared), math.prod(r) // (inner * shared)
            total += times * 2 * shared * rows * columns * inner
        elif name == "scan":
            total += dot_flops(equation.params["jaxpr"].jaxpr, times * equation.params["length"])
        else:
            assert name not in ("while", "cond"), f"trip count of {name} is unknown"
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else [value]:
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        total += dot_flops(inner, times)
    return total


def flops_of(function: Any, *args: Any) -> int:
    return dot_flops(jax.make_jaxpr(function)(*args).jaxpr)


def packed(rows: int, tokens: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (jax.ShapeDtypeStruct((rows, tokens), jnp.int32),) * 4


def logprob_sum(policy: Any, tokens: Any, positions: Any, segments: Any, targets: Any, **how: Any):
    hidden = hidden_states(
        policy, tokens, positions, segments, dtype=jnp.float32, remat=how["remat"]
    )
    logprobs, entropy = target_logprobs(
        policy,
        hidden,
        targets,
        temperature=1.0,
        chunk_tokens=how["chunk_tokens"],
        dtype=jnp.float32,
    )
    return jnp.sum(logprobs) + jnp.sum(entropy)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("rows", "tokens", "chunk"), [(4, 16, 4096), (3, 17, 12), (2, 5, 1)])
def test_score_flops_equal_the_forward_program(
    model: ModelConfig, rows: int, tokens: int, chunk: int
) -> None:
    program = partial(logprob_sum, remat=False, chunk_tokens=chunk)
    expected = flops_of(program, abstract_decoder(model), *packed(rows, tokens))
    assert cost.score(model, Layout(), tokens, rows, chunk_tokens=chunk).flops == expected


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("remat", ["none", "block"])
@pytest.mark.parametrize(("rows", "tokens", "chunk"), [(4, 16, 4096), (3, 17, 12)])
def test_train_flops_equal_the_differentiated_program(
    model: ModelConfig, remat: cost.Remat, rows: int, tokens: int, chunk: int
) -> None:
    program = jax.grad(partial(logprob_sum, remat=remat == "block", chunk_tokens=chunk))
    expected = flops_of(program, abstract_decoder(model), *packed(rows, tokens))
    predicted = cost.train(model, Layout(), tokens, rows, remat=remat, chunk_tokens=chunk)
    assert predicted.flops == expected


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("remat", ["none", "block"])
def test_train_flops_equal_the_program_whose_rows_share_prompts(
    model: ModelConfig, remat: cost.Remat
) -> None:
    shared, tokens = SharedPrompts(prompt_tokens=5, parts=3), 5 + 3 * 4

    def loss(policy: Any, tokens: Any, positions: Any, segments: Any, prefixes: Any) -> jax.Array:
        hidden = hidden_states(
            policy, tokens, positions, segments, dtype=jnp.float32, remat=remat == "block",
            prefix_ids=prefixes, shared=shared,
        )[:, 5:]  # fmt: skip
        logprobs, _ = target_logprobs(
            policy, hidden, tokens[:, 5:], temperature=1.0, chunk_tokens=12, dtype=jnp.float32
        )
        return jnp.sum(logprobs)

    expected = flops_of(jax.grad(loss), abstract_decoder(model), *packed(4, tokens))
    predicted = cost.train(model, Layout(), tokens, 4, remat=remat, chunk_tokens=12, shared=shared)
    assert predicted.flops == expected


@pytest.mark.parametrize("model", MODELS)
def test_prefill_flops_equal_the_prefill_program(model: ModelConfig) -> None:
    tokens = jax.ShapeDtypeStruct((3, 11), jnp.int32)
    expected = flops_of(partial(prefill, dtype=jnp.float32), abstract_decoder(model), tokens)
    assert cost.prefill(model, Layout(), rows=3, tokens=11).flops == expected


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kv_len", [8, 32, 40])
def test_decode_flops_equal_the_step_program(model: ModelConfig, kv_len: int) -> None:
    slots, steps = 5, 4

    def step(policy: Any, cache: Any, tokens: Any, positions: Any) -> Any:
        hidden, cache = decode_step(policy, cache, tokens, positions, dtype=jnp.float32)
        return head_logits(policy, hidden, dtype=jnp.float32), cache

    cache = jax.eval_shape(partial(init_cache, model, slots, kv_len, jnp.float32))
    of_slots = jax.ShapeDtypeStruct((slots,), jnp.int32)
    once = flops_of(step, abstract_decoder(model), cache, of_slots, of_slots)
    predicted = cost.decode(model, Layout(), slots=slots, kv_len=kv_len, steps=steps)
    assert predicted.flops == steps * once


@pytest.mark.parametrize("model", MODELS)
def test_decode_over_shared_prompts_costs_the_flops_and_bytes_of_its_program(
    model: ModelConfig,
) -> None:
    slots, own, table = 6, 24, PrefixRows(rows=2, lanes=4, tokens=40)

    def step(policy: Any, cache: Any, rows: Any, tokens: Any, positions: Any) -> Any:
        hidden, cache = decode_step(
            policy, cache, tokens, positions, dtype=jnp.float32, prefixes=rows
        )
        return head_logits(policy, hidden, dtype=jnp.float32), cache

    cache = jax.eval_shape(partial(init_cache, model, slots, own, jnp.float32))
    rows = jax.eval_shape(partial(init_prefixes, model, table, slots, jnp.float32, "blocks"))
    of_slots = jax.ShapeDtypeStruct((slots,), jnp.int32)
    once = flops_of(step, abstract_decoder(model), cache, rows, of_slots, of_slots)
    predicted = cost.decode(model, Layout(), slots, own, 1, table)
    assert predicted.flops == once
    sizes = memory_per_device(model, Layout(), slots=slots, max_len=own, prefixes=table)
    assert sizes["kv_cache"] == sum(leaf.size * 4 for leaf in jax.tree.leaves(cache))
    assert sizes["prefixes"] == sum(leaf.size * 4 for leaf in jax.tree.leaves(rows.cache))


ADAPTED = [
    replace(QWEN3_LIKE, lora=Lora.of(3, 6.0, "all-linear")),
    replace(QWEN2_LIKE, lora=Lora.of(2, 4.0, "q_proj,v_proj,down_proj")),
]


def adapted(model: ModelConfig) -> AdaptedDecoder:
    """Shapes of a frozen base under the model's adapter."""
    adapter = jax.eval_shape(partial(init_adapter, model), jax.random.key(0))
    return AdaptedDecoder(base=abstract_decoder(model), adapter=adapter)


@pytest.mark.parametrize("model", ADAPTED)
@pytest.mark.parametrize("remat", ["none", "block"])
def test_training_an_adapter_costs_the_flops_of_its_differentiated_program(
    model: ModelConfig, remat: cost.Remat
) -> None:
    policy = adapted(model)

    def loss(adapter: Any, base: Any, *batch: Any) -> jax.Array:
        whole = AdaptedDecoder(base=base, adapter=adapter)
        return logprob_sum(whole, *batch, remat=remat == "block", chunk_tokens=12)

    program = jax.make_jaxpr(jax.grad(loss))(policy.adapter, policy.base, *packed(3, 17)).jaxpr
    # the head's gradient is made for nobody; XLA leaves it out as jax's own pass does
    alive, _ = dce_jaxpr(program, [True] * len(program.outvars))
    predicted = cost.train(model, Layout(), 17, 3, remat=remat, chunk_tokens=12)
    assert predicted.flops == dot_flops(alive)


@pytest.mark.parametrize("model", ADAPTED)
def test_an_adapter_s_forward_phases_cost_the_flops_of_their_programs(model: ModelConfig) -> None:
    policy, slots, kv_len = adapted(model), 5, 40
    scored = partial(logprob_sum, remat=False, chunk_tokens=12)
    assert cost.score(model, Layout(), 17, 3, chunk_tokens=12).flops == flops_of(
        scored, policy, *packed(3, 17)
    )
    prompts = jax.ShapeDtypeStruct((3, 11), jnp.int32)
    assert cost.prefill(model, Layout(), rows=3, tokens=11).flops == flops_of(
        partial(prefill, dtype=jnp.float32), policy, prompts
    )

    def step(policy: Any, cache: Any, tokens: Any, positions: Any) -> Any:
        hidden, cache = decode_step(policy, cache, tokens, positions, dtype=jnp.float32)
        return head_logits(policy, hidden, dtype=jnp.float32), cache

    cache = jax.eval_shape(partial(init_cache, model, slots, kv_len, jnp.float32))
    of_slots = jax.ShapeDtypeStruct((slots,), jnp.int32)
    assert cost.decode(model, Layout(), slots=slots, kv_len=kv_len, steps=1).flops == flops_of(
        step, policy, cache, of_slots, of_slots
    )


@pytest.mark.parametrize("model", MODELS)
def test_parameter_counts_equal_the_tree(model: ModelConfig) -> None:
    policy = abstract_decoder(model)
    assert model.num_parameters == num_parameters(policy)
    assert parameters.num_arrays(model) == len(jax.tree.leaves(policy))


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(1, 1, 1), (2, 2, 2), (1, 8, 1), (4, 1, 2)])
@pytest.mark.parametrize("model", MODELS)
def test_held_parameters_equal_one_devices_shards(
    model: ModelConfig, data: int, fsdp: int, tensor: int
) -> None:
    mesh = (
        make_mesh(jax.devices(), data=data, fsdp=fsdp, tensor=tensor)
        if (data * fsdp * tensor == 8)
        else make_mesh(jax.devices()[:1])
    )
    layout = Layout(**dict(zip(("data", "fsdp", "tensor"), mesh.devices.shape, strict=True)))
    shapes = jax.tree.map(
        lambda array, sharding: math.prod(sharding.shard_shape(array.shape)),
        abstract_decoder(model),
        policy_shardings(model, mesh),
    )
    held = sum(jax.tree.leaves(shapes))
    assert parameters.held_parameters(model, layout) == held
    memory = memory_per_device(model, layout, trains=True, rows=8, row_tokens=4)
    assert memory["parameters"] == 4 * held
    assert memory["optimizer"] == 8 * held


@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_reads_the_arrays_of_the_state_once(model: ModelConfig) -> None:
    policy = abstract_decoder(model)
    arrays = jax.tree.leaves((policy, jax.eval_shape(optax.adamw(1e-3).init, policy)))
    counted = [array for array in arrays if array.shape]  # the step's number is not
    assert cost.checkpoint(model, Layout()).hbm_bytes == sum(
        array.size * array.dtype.itemsize for array in counted
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kv_cache_bytes_equal_the_arrays(dtype: str) -> None:
    cache = jax.eval_shape(partial(init_cache, QWEN3_LIKE, 6, 20, jnp.dtype(dtype)))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    layout = Layout(kv_dtype=dtype)
    assert kv_cache_bytes(QWEN3_LIKE, layout, slots=6, max_len=20) == held
    assert 6 * KEY_BLOCK * QWEN3_LIKE.kv_bytes_per_token(layout.kv_bytes) == held


@pytest.mark.parametrize("name", ["int8", "float8_e4m3"])
def test_scales_of_a_cache_in_8_bits_are_counted(name: str) -> None:
    dtype = jnp.dtype("float8_e4m3fn" if name == "float8_e4m3" else name)
    cache = jax.eval_shape(partial(init_cache, QWEN3_LIKE, 6, 20, dtype))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    layout = Layout(**stored_in(name))
    assert kv_cache_bytes(QWEN3_LIKE, layout, slots=6, max_len=20) == held


def test_the_cache_is_read_in_the_blocks_that_the_model_stores() -> None:
    assert cost.KV_BLOCK_TOKENS == KEY_BLOCK
