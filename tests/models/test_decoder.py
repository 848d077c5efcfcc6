"""Training, prefill and decode are one model; packing and padding change nothing."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.cache import (
    KEY_BLOCK,
    SEGMENTS,
    init_cache,
    insert_prompts,
    join_cache,
    segment_sizes,
    split_cache,
)
from models.config import ModelConfig
from models.decoder import Decoder, decode_step, hidden_states, prefill, recompute
from models.fused import fused, split_layers
from models.layers import turned_mlp

F32_ATOL = 1e-5  # hidden states are of order 1; sums of up to 48 float32 terms in another order
BF16_ATOL = 0.15  # 8 bits of mantissa through three layers; hidden states reach about 3
GRAD_RTOL = 1e-4  # float32 sums over all tokens in another order
F32 = jnp.float32

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
    "grouped": TINY,
    "one kv head": replace(TINY, num_kv_heads=1),
    "every head its own": replace(TINY, num_kv_heads=4),
    "qk_norm": replace(TINY, qk_norm=True),
    "qkv_bias": replace(TINY, qkv_bias=True),
    "nope": replace(TINY, no_rope_layers=(1,)),
    "untied": replace(TINY, tied_embeddings=False),
    "plain mlp": replace(TINY, gated_mlp=False),
    "wide heads": replace(TINY, head_size=16),
}

prefilled = jax.jit(prefill, static_argnames="dtype")


def make(config, seed=0):
    """A policy whose norms and biases are not at their neutral initial values."""
    policy = Decoder(config, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(policy)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def tokens_of(rows, length, seed=2):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, TINY.vocab_size)


@partial(jax.jit, static_argnames="dtype")
def full(policy, tokens, dtype=F32, at=None):
    at = jnp.arange(tokens.shape[1]) if at is None else at
    positions = jnp.broadcast_to(at, tokens.shape)
    return hidden_states(policy, tokens, positions, jnp.ones_like(tokens), dtype=dtype)


@partial(jax.jit, static_argnames=("lengths", "slots", "dtype"))
def decode_from(policy, tokens, cache, *, lengths, slots, dtype=F32):
    """Feed row b's tokens from position lengths[b] - 1 on into slots[b]; hidden [B, steps, D]."""
    num_slots = jax.tree.leaves(cache)[0].shape[0]
    rows, slots = np.arange(len(slots)), np.asarray(slots)
    layers = split_layers(policy)

    def step(cache, i):
        at = jnp.asarray(lengths) - 1 + i
        fed = jnp.zeros(num_slots, jnp.int32).at[slots].set(tokens[rows, at])
        positions = jnp.zeros(num_slots, jnp.int32).at[slots].set(at)
        hidden, cache = decode_step(policy, cache, fed, positions, dtype=dtype, layers=layers)
        return cache, hidden[slots]

    cache, hidden = jax.lax.scan(step, cache, jnp.arange(tokens.shape[1] - max(lengths) + 1))
    return hidden.transpose(1, 0, 2), cache


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_decode_equals_the_full_forward(name):
    policy, tokens = make(VARIANTS[name]), tokens_of(3, 40)
    lengths, slots = (5, 2, 7), (4, 0, 2)
    keys, values = prefilled(policy, tokens[:, :7], dtype=F32)
    cache = init_cache(policy.config, 5, 40, F32)
    cache = insert_prompts(cache, keys, values, jnp.arange(3), jnp.asarray(slots))
    decoded, _ = decode_from(policy, tokens, cache, lengths=lengths, slots=slots)
    reference = full(policy, tokens)
    for row, length in enumerate(lengths):
        expected = reference[row, length - 1 : length - 1 + decoded.shape[1]]
        np.testing.assert_allclose(decoded[row], expected, atol=F32_ATOL)


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_as_a_sampler_holds_them_give_the_same_hidden_states(name):
    policy, tokens = make(VARIANTS[name]), tokens_of(3, 12)
    np.testing.assert_allclose(full(fused(policy), tokens), full(policy, tokens), atol=F32_ATOL)


def test_a_turned_mlp_multiplies_its_weights_as_they_lie():
    """Left to itself the compiler exchanges the operands and lays the weight out anew."""
    ffw, width, rows = 96, 40, 7
    weights = (jnp.ones((2, ffw, width)),), jnp.ones((width, ffw))
    program = jax.jit(turned_mlp).lower(jnp.ones((rows, width)), *weights).compile().as_text()
    assert program is not None
    results = re.findall(r"f32\[([\d,]+)\]\S* dot\(", program)
    assert sorted(results) == sorted([f"{2 * ffw},{rows}", f"{width},{rows}"])
    for shape in (f"{ffw},{width}", f"{2 * ffw},{width}", f"{width},{ffw}", f"{width},{2 * ffw}"):
        assert not re.search(rf"f32\[{shape}\]\S* (copy|transpose)\(", program)


def test_cached_decode_in_bfloat16_stays_near_the_float32_forward():
    policy, tokens = make(TINY), tokens_of(2, 20)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), policy)
    cache = init_cache(TINY, 2, 20, jnp.bfloat16)
    decoded, cache = decode_from(
        half, tokens, cache, lengths=(1, 1), slots=(0, 1), dtype=jnp.bfloat16
    )
    assert cache.keys[0][0].dtype == jnp.bfloat16
    np.testing.assert_allclose(decoded.astype(F32), full(policy, tokens), atol=BF16_ATOL)


@pytest.mark.parametrize("max_tokens", [20, 33, 70, 130, 300])
def test_segments_cover_the_cache_in_whole_blocks(max_tokens):
    sizes = segment_sizes(max_tokens)
    assert len(sizes) <= SEGMENTS
    assert sum(sizes) == -(-max_tokens // KEY_BLOCK) * KEY_BLOCK
    assert all(size % KEY_BLOCK == 0 for size in sizes)


def test_sequences_decode_across_segments_as_in_the_full_forward():
    policy, tokens = make(TINY), tokens_of(2, 70)
    keys, values = prefilled(policy, tokens[:, :40], dtype=F32)
    cache = init_cache(TINY, 2, 130, F32)
    cache = insert_prompts(cache, keys, values, jnp.arange(2), jnp.arange(2))
    decoded, _ = decode_from(policy, tokens, cache, lengths=(40, 30), slots=(0, 1))
    reference = full(policy, tokens)
    np.testing.assert_allclose(decoded[0], reference[0, 39:], atol=F32_ATOL)
    np.testing.assert_allclose(decoded[1], reference[1, 29:60], atol=F32_ATOL)


def test_the_first_segments_alone_decode_the_same_and_join_back():
    policy, tokens = make(TINY), tokens_of(2, 20)
    keys, values = prefilled(policy, tokens[:, :4], dtype=F32)
    noise = jax.tree.map(lambda x: x + 7.0, init_cache(TINY, 2, 3 * KEY_BLOCK, F32))
    cache = insert_prompts(noise, keys, values, jnp.arange(2), jnp.arange(2))
    part, rest = split_cache(cache, 20)
    assert (part.segments, rest.segments) == ((KEY_BLOCK,), (KEY_BLOCK, KEY_BLOCK))
    decoded, part = decode_from(policy, tokens, part, lengths=(4, 4), slots=(0, 1))
    np.testing.assert_allclose(decoded, full(policy, tokens)[:, 3:], atol=F32_ATOL)
    whole = join_cache(part, rest)
    assert jax.tree.structure(whole) == jax.tree.structure(cache)
    assert all(bool(jnp.all(x == 7.0)) for x in (*whole.keys[0][1:], *whole.values[0][1:]))


@pytest.mark.parametrize("dtype", [F32, jnp.int8])
def test_a_prefix_of_one_array_decodes_as_the_same_prefix_of_segments(dtype):
    policy, tokens = make(TINY), tokens_of(2, 20)
    keys, values = prefilled(policy, tokens[:, :4], dtype=F32)
    found = {}
    for program in ("blocks", "xla"):
        cache = init_cache(TINY, 2, 3 * KEY_BLOCK, dtype, program)
        cache = insert_prompts(cache, keys, values, jnp.arange(2), jnp.arange(2))
        part, rest = split_cache(cache, 20)
        assert part.max_tokens == KEY_BLOCK
        assert cache.max_tokens == 3 * KEY_BLOCK
        decoded, part = decode_from(policy, tokens, part, lengths=(4, 4), slots=(0, 1))
        whole = join_cache(part, rest)
        assert jax.tree.structure(whole) == jax.tree.structure(cache)
        found[program] = decoded
    np.testing.assert_allclose(found["xla"], found["blocks"], atol=F32_ATOL)


def test_products_over_a_prefix_of_one_array_do_not_see_what_follows():
    policy, tokens = make(TINY), tokens_of(2, 20)
    cache = init_cache(TINY, 2, 3 * KEY_BLOCK, F32, "xla")
    part, _ = split_cache(jax.tree.map(lambda x: x.at[:, :, KEY_BLOCK:].set(jnp.nan), cache), 20)
    decoded, _ = decode_from(policy, tokens, part, lengths=(1, 1), slots=(0, 1))
    np.testing.assert_allclose(decoded, full(policy, tokens), atol=F32_ATOL)


def test_a_prompt_may_enter_several_slots_and_padding_slots_are_dropped():
    policy, tokens = make(TINY), tokens_of(2, 6)
    keys, values = prefilled(policy, tokens, dtype=F32)
    cache = jax.tree.map(lambda x: x + 7.0, init_cache(TINY, 4, 32, F32))
    rows, slots = jnp.array([1, 1, 0, 0]), jnp.array([0, 3, 4, -1])
    after = insert_prompts(cache, keys, values, rows, slots)
    for layer in range(TINY.num_layers):
        assert bool(jnp.all(after.values[layer][0][1:3] == 7.0))
        for slot in (0, 3):
            assert bool(jnp.all(after.values[layer][0][slot, :, :6] == values[layer][1]))
            entered = after.keys[layer][0][slot, :, 0, :, :6].swapaxes(1, 2)
            assert bool(jnp.all(entered == keys[layer][1]))


def test_prompts_longer_than_the_cache_are_refused():
    keys, values = prefilled(make(TINY), tokens_of(1, 40), dtype=F32)
    cache = init_cache(TINY, 1, 32, F32)
    with pytest.raises(ValueError, match="prompts of 40 tokens do not fit a cache of 32"):
        insert_prompts(cache, keys, values, jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))


def test_recompute_under_new_weights_equals_decoding_with_them_from_the_start():
    old, new, tokens = make(TINY, seed=0), make(TINY, seed=5), tokens_of(2, 33)
    empty = init_cache(TINY, 2, 64, F32)
    _, stale = decode_from(old, tokens[:, :32], empty, lengths=(1, 1), slots=(0, 1))
    fresh = recompute(new, stale, tokens[:, :32], dtype=F32)
    last = jnp.full(2, 32)
    hidden, _ = decode_step(new, fresh, tokens[:, 32], last, dtype=F32)
    np.testing.assert_allclose(hidden, full(new, tokens)[:, 32], atol=F32_ATOL)
    mixed, _ = decode_step(new, stale, tokens[:, 32], last, dtype=F32)
    assert float(jnp.max(jnp.abs(mixed - hidden))) > 100 * F32_ATOL


def test_recompute_refuses_a_length_that_would_split_a_block():
    cache = init_cache(TINY, 2, 64, F32)
    with pytest.raises(ValueError, match="use a multiple of 32"):
        recompute(make(TINY), cache, tokens_of(2, 30), dtype=F32)


def pack(sequences, length):
    """One row [1, length] of tokens, positions and segments."""
    row = np.zeros((3, 1, length), np.int32)
    at = 0
    for segment, sequence in enumerate(sequences, start=1):
        end = at + len(sequence)
        row[:, 0, at:end] = sequence, np.arange(len(sequence)), np.full(len(sequence), segment)
        at = end
    return jnp.asarray(row)


def test_packed_sequences_equal_separate_ones():
    policy = make(replace(TINY, qk_norm=True, no_rope_layers=(2,)))
    sequences = [np.asarray(tokens_of(1, n, seed=n))[0] for n in (5, 1, 9)]
    packed = hidden_states(policy, *pack(sequences, 20), dtype=F32)
    at = 0
    for sequence in sequences:
        alone = full(policy, jnp.asarray(sequence)[None])
        np.testing.assert_allclose(packed[0, at : at + len(sequence)], alone[0], atol=F32_ATOL)
        at += len(sequence)


def test_neighbours_and_padding_are_invisible():
    policy = make(TINY)
    first, second = np.arange(1, 7), np.arange(10, 15)
    base = hidden_states(policy, *pack([first, second], 14), dtype=F32)
    tokens, positions, segments = pack([first, second[::-1]], 14)
    tokens = tokens.at[0, 11:].set(33)
    changed = hidden_states(policy, tokens, positions, segments, dtype=F32)
    assert bool(jnp.all(base[0, :6] == changed[0, :6]))
    assert bool(jnp.any(base[0, 6:11] != changed[0, 6:11]))
    assert bool(jnp.all(jnp.isfinite(changed)))
    padded = hidden_states(policy, *pack([first], 14), dtype=F32)
    np.testing.assert_allclose(
        padded[0, :6], full(policy, jnp.asarray(first)[None])[0], atol=F32_ATOL
    )


def test_later_tokens_cannot_reach_earlier_ones():
    policy, tokens = make(TINY), tokens_of(2, 12)
    changed = full(policy, tokens.at[:, 8].add(1) % TINY.vocab_size)
    base = full(policy, tokens)
    assert bool(jnp.all(base[:, :8] == changed[:, :8]))
    assert bool(jnp.all(jnp.any(base[:, 8:] != changed[:, 8:], axis=-1)))


def test_a_layer_without_rope_ignores_positions_and_one_with_rope_does_not():
    tokens = tokens_of(1, 10)
    far, near = jnp.arange(10) % 5 * 2, jnp.arange(10)
    for layers, moves in (((0, 1, 2), False), ((0, 1), True)):
        policy = make(replace(TINY, no_rope_layers=layers))
        there = full(policy, tokens, at=far)
        assert bool(jnp.any(there != full(policy, tokens, at=near))) is moves


def loss(policy, tokens, remat):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = hidden_states(policy, tokens, positions, jnp.ones_like(tokens), dtype=F32, remat=remat)
    return jnp.mean(jnp.square(hidden[..., :3]))


def test_rematerialisation_changes_memory_not_gradients():
    policy, tokens = make(replace(TINY, qkv_bias=True, qk_norm=True)), tokens_of(4, 16)
    kept = jax.jit(jax.grad(loss), static_argnums=2)(policy, tokens, False)
    again = jax.jit(jax.grad(loss), static_argnums=2)(policy, tokens, True)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=GRAD_RTOL, atol=1e-6)


def test_gradient_equals_finite_differences():
    policy, tokens = make(replace(TINY, qk_norm=True, qkv_bias=True)), tokens_of(2, 8)
    direction = make(policy.config, seed=9)
    _, slope = jax.jvp(lambda p: loss(p, tokens, False), (policy,), (direction,))
    grads = jax.grad(loss)(policy, tokens, False)
    products = jax.tree.map(lambda g, d: jnp.sum(g * d), grads, direction)
    assert float(sum(jax.tree.leaves(products))) == pytest.approx(float(slope), rel=1e-4)
    eps = 1e-3

    def at(sign):
        moved = jax.tree.map(lambda p, d: p + sign * eps * d, policy, direction)
        return float(loss(moved, tokens, False))

    # Central differences in float32 carry about 1e-7 / eps of rounding on a loss of order 1.
    assert (at(1) - at(-1)) / (2 * eps) == pytest.approx(float(slope), rel=2e-2, abs=2e-3)


def test_layers_are_traced_once_whatever_their_number():
    def equations(num_layers):
        policy = Decoder(replace(TINY, num_layers=num_layers), jax.random.key(0))
        return str(jax.make_jaxpr(full)(policy, tokens_of(1, 8))).count("dot_general")

    assert equations(2) == equations(6)
