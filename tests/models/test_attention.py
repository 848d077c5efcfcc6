"""Every attention program computes what the products of xla do; what they are lowered to for a GPU."""

import dataclasses
import re
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import AbstractDevice, AbstractMesh

from models.attention import (
    DecodeAttention,
    attention_in_prompts,
    attention_in_rows,
    cached_attention,
    saves_attention,
)
from models.attention_kernels import decode_blocks, segment_spans
from models.cache import init_cache, insert_prompts, write_token
from models.config import ModelConfig
from models.decoder import abstract_decoder, decode_step
from models.rows import MAX_SEGMENTS
from models.sharding import make_mesh

ATOL = 2e-5  # float32 sums over at most 48 keys in blocks, against one sum; outputs are of order 1
GRAD_ATOL = 1e-4  # the same through three products of backward
ROWS = np.array([[1] * 5 + [2] * 17 + [3] + [4] * 9 + [0] * 8, [1] * 40, [0] * 40], np.int32)
"""Ragged segments, a row of one segment, a row of padding."""
SHAPE = ModelConfig(
    vocab_size=8, width=16, num_layers=1, num_heads=6, num_kv_heads=2, head_size=16, ffw_size=8
)


@pytest.fixture(autouse=True)
def usual_promotion():
    """The library's kernels multiply integers and floats, which the tests' strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def operands(tokens=40, rows=3, groups=3, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (rows, tokens, 2, groups, 16), dtype)
    k, v = (jax.random.normal(key, (rows, tokens, 2, 16), dtype) for key in keys[1:3])
    return q, k, v, jax.random.normal(keys[3], q.shape, dtype)


def value_and_gradients(attend, q, k, v, weights):
    def total(q, k, v):
        return jnp.sum(attend(q, k, v) * weights)

    return attend(q, k, v), jax.grad(total, argnums=(0, 1, 2))(q, k, v)


@pytest.mark.parametrize("groups", [1, 3])
def test_the_row_kernel_equals_the_products_on_ragged_segments(groups) -> None:
    q, k, v, weights = operands(groups=groups)
    ids = jnp.asarray(ROWS)
    expected = value_and_gradients(attention_in_rows(ids, "xla"), q, k, v, weights)
    pallas = attention_in_rows(ids, "pallas", interpret=True)
    found = jax.jit(partial(value_and_gradients, pallas))(q, k, v, weights)
    np.testing.assert_allclose(found[0], expected[0], atol=ATOL)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=GRAD_ATOL)


def test_the_prompt_kernel_is_causal_whatever_the_length() -> None:
    q, k, v, _ = operands(tokens=21)
    expected = attention_in_prompts(21, "xla")(q, k, v)
    found = attention_in_prompts(21, "pallas", interpret=True)(q, k, v)
    np.testing.assert_allclose(found, expected, atol=ATOL)


def test_the_row_kernel_runs_on_each_devices_rows_and_heads() -> None:
    q, k, v, _ = operands(tokens=16, rows=4)
    ids = jnp.asarray(np.repeat([[1] * 7 + [2] * 9], 4, axis=0), jnp.int32)
    expected = attention_in_rows(ids, "xla")(q, k, v)
    with jax.set_mesh(make_mesh(jax.devices(), data=2, fsdp=2, tensor=2)):
        program = jax.jit(lambda *x: attention_in_rows(ids, "pallas", interpret=True)(*x))
        np.testing.assert_allclose(program(q, k, v), expected, atol=ATOL)


def test_segment_spans_are_runs_of_equal_ids() -> None:
    lengths, starts, fits = segment_spans(jnp.asarray(ROWS))
    assert lengths.shape == (3, 40)
    assert starts.shape == (3, 41)
    assert lengths[0, :6].tolist() == [5, 17, 1, 9, 8, -1]
    assert starts[0, :6].tolist() == [0, 5, 22, 23, 32, -1]
    assert (lengths[1, :2].tolist(), starts[2, :2].tolist()) == ([40, -1], [0, -1])
    assert fits.tolist() == [1.0, 1.0, 1.0]


def test_a_row_of_too_many_segments_is_not_a_number() -> None:
    ids = jnp.arange(1, MAX_SEGMENTS + 2, dtype=jnp.int32)[None]
    assert jnp.isnan(segment_spans(ids)[2][0])
    assert segment_spans(ids[:, :-1])[2][0] == 1


@pytest.fixture
def on_hopper(monkeypatch):
    """jax asks the present device and cuDNN before it traces a call to them."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)


def lowered(function, *arguments) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def test_packed_rows_reach_cudnn_without_a_mask(on_hopper) -> None:
    """One call forward and one backward, also under a checkpoint that keeps what attention leaves."""
    del on_hopper
    q, k, v, weights = operands(tokens=96, dtype=jnp.bfloat16)
    ids = jnp.ones((3, 96), jnp.int32)

    def gradients(q, k, v, ids):
        attend = jax.checkpoint(
            lambda *x: attention_in_rows(ids, "cudnn")(*x), policy=saves_attention
        )
        return jax.grad(lambda *x: jnp.sum(attend(*x) * weights), argnums=(0, 1, 2))(q, k, v)

    text = lowered(gradients, q, k, v, ids)
    assert len(re.findall(r"custom_call @__cudnn\$fmhaSoftmax\(", text)) == 1
    assert len(re.findall(r"custom_call @__cudnn\$fmhaSoftmaxBackward\(", text)) == 1
    assert "PADDING_CAUSAL" in text
    assert "96x96" not in text


def test_prompts_and_cached_keys_reach_cudnn_with_grouped_heads(on_hopper) -> None:
    del on_hopper
    q, k, v, _ = operands(dtype=jnp.bfloat16)
    text = lowered(attention_in_prompts(40, "cudnn"), q, k, v)
    assert "__cudnn$fmhaSoftmax" in text
    assert "40x40" not in text
    cache = jnp.zeros((3, 2, 64, 16), jnp.bfloat16)
    text = lowered(
        lambda q, k, v, at: cached_attention(q, (k,), (v,), at, "cudnn"),
        q[:, 0], cache, cache, jnp.zeros(3, jnp.int32),
    )  # fmt: skip
    assert "__cudnn$fmhaSoftmax" in text
    assert "3x2x64x16" in text


def test_kernels_lower_for_a_gpu() -> None:
    """Triton takes the blocks that rows and cache are cut into. jax 0.12 asks for which GPU."""
    q, k, v, weights = operands(tokens=200, dtype=jnp.bfloat16)
    ids = jnp.ones((3, 200), jnp.int32)
    attend = attention_in_rows(ids, "pallas")
    cache = jnp.zeros((3, 2, 96, 16), jnp.bfloat16)
    one, at = q[:, 0], jnp.zeros(3, jnp.int32)
    hopper = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    axes = ("data", "fsdp", "tensor")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1, 1, 1), axes, abstract_device=hopper)):
        rows = lowered(partial(value_and_gradients, attend), q, k, v, weights)
        decode = lowered(
            lambda q, k, v, at: cached_attention(q, (k,), (v,), at, "pallas"),
            one, cache, cache, at,
        )  # fmt: skip
    assert "triton" in rows
    assert "200x200" not in rows
    assert "triton" in decode


def filled(dtype, attention, k, v):
    """A cache of prompts [4, 2, 20, 16] and one token more."""
    cache = init_cache(SHAPE, 4, 40, dtype, attention)
    cache = insert_prompts(
        cache, k[None, :, :, :20], v[None, :, :, :20], jnp.arange(4), jnp.arange(4)
    )
    at = jnp.array([0, 5, 19, 20])
    return write_token(cache.keys[0], cache.values[0], k[:, :, 20], v[:, :, 20], at), at


@pytest.mark.parametrize("program", ["xla", "pallas"])
def test_decode_programs_agree_over_a_cache_laid_out_for_each(program) -> None:
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], (4, 2, 3, 16))
    k, v = (jax.random.normal(key, (4, 2, 21, 16)) for key in keys[1:])
    (held, values), at = filled(jnp.float32, "blocks", k, v)
    expected = cached_attention(q, held, values, at, "blocks")
    (held, values), at = filled(jnp.float32, program, k, v)
    found = cached_attention(q, held, values, at, program, interpret=True)
    np.testing.assert_allclose(found, expected, atol=ATOL)


@pytest.mark.parametrize("attention", ["blocks", "xla"])
@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.02), ("float8_e4m3fn", 0.15)])
def test_a_cache_of_8_bits_is_off_by_its_rounding(attention, dtype, bound) -> None:
    """Keys err by up to 1/254 or 1/16 of a number of order 3, averaged over the head and the softmax."""
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], (4, 2, 3, 16))
    k, v = (100 * jax.random.normal(key, (4, 2, 21, 16)) for key in keys[1:])
    k, q = k * 1e-4, q * 1e2  # scores as of unit keys, sizes far from 1
    (held, values), at = filled(jnp.float32, attention, k, v)
    expected = cached_attention(q, held, values, at, attention)
    (held, values), at = filled(jnp.dtype(dtype), attention, k, v)
    found = cached_attention(q, held, values, at, attention)
    error = float(jnp.max(jnp.abs(found - expected))) / 100
    assert 0 < error < bound


def test_a_kernel_refuses_a_cache_in_8_bits() -> None:
    keys = jnp.ones((4, 2, 21, 16))
    (held, values), at = filled(jnp.dtype(jnp.int8), "pallas", keys, keys)
    with pytest.raises(ValueError, match="use xla"):
        cached_attention(jnp.ones((4, 2, 3, 16)), held, values, at, "pallas")


def test_a_kernel_refuses_a_cache_of_another_type_than_the_queries_and_names_both() -> None:
    keys = jnp.ones((4, 2, 21, 16))
    (held, values), at = filled(jnp.bfloat16, "pallas", keys, keys)
    with pytest.raises(ValueError, match="not float32 queries with bfloat16 keys"):
        cached_attention(jnp.ones((4, 2, 3, 16)), held, values, at, "pallas")


@pytest.mark.parametrize("program", get_args(DecodeAttention))
def test_every_layer_of_a_decode_step_computes_in_the_compute_type(program, on_hopper) -> None:
    """A program that answered in float32 would make the next layer's queries float32."""
    del on_hopper
    model = dataclasses.replace(SHAPE, num_layers=2)
    step = partial(decode_step, dtype=jnp.bfloat16, attention=program)
    hidden, cache = jax.eval_shape(
        step, abstract_decoder(model, jnp.bfloat16),
        jax.eval_shape(lambda: init_cache(model, 4, 64, jnp.bfloat16, program)),
        *[jax.ShapeDtypeStruct((4,), jnp.int32)] * 2,
    )  # fmt: skip
    assert {x.dtype for x in jax.tree.leaves((hidden, cache))} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("programs", "keys", "found"),
    [(8, 512, (32, 16)), (2048, 512, (128, 1)), (8, 8192, (128, 64)), (64, 96, (32, 3))],
)
def test_few_slots_have_their_keys_split_among_programs(programs, keys, found) -> None:
    assert decode_blocks(programs, keys) == found
