"""Chunked log-probabilities and entropies against the plain formula, and their memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import ModelConfig
from models.decoder import Decoder
from models.head import head_logits, target_logprobs

ATOL = 1e-4  # float32 logits that reach 50 carry about 4e-6 each, products with them more
GRAD_RTOL = 2e-4  # float32 sums over all tokens, in another order per chunk size
F32 = jnp.float32
ROWS, TOKENS = 3, 14


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def policy(request):
    config = ModelConfig(
        vocab_size=61,
        width=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_size=8,
        ffw_size=16,
        tied_embeddings=request.param,
    )
    return jax.tree.map(lambda x: 3 * x, Decoder(config, jax.random.key(0)))


@pytest.fixture
def hidden():
    return jax.random.normal(jax.random.key(1), (ROWS, TOKENS, 16))


@pytest.fixture
def targets():
    return jax.random.randint(jax.random.key(2), (ROWS, TOKENS), 0, 61)


def plain(policy, hidden, targets, temperature):
    logprobs = jax.nn.log_softmax(head_logits(policy, hidden, dtype=F32) / temperature)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def chunked(policy, hidden, targets, temperature, chunk_tokens=12):
    return target_logprobs(
        policy, hidden, targets, temperature=temperature, chunk_tokens=chunk_tokens, dtype=F32
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("chunk_tokens", [1, 12, 20, 1000])
def test_values_equal_the_plain_formula(policy, hidden, targets, temperature, chunk_tokens):
    got = chunked(policy, hidden, targets, temperature, chunk_tokens)
    expected = plain(policy, hidden, targets, temperature)
    for g, e in zip(got, expected, strict=True):
        assert g.shape == (ROWS, TOKENS)
        assert g.dtype == F32
        np.testing.assert_allclose(g, e, atol=ATOL)


@pytest.mark.parametrize("chunk_tokens", [1, 12, 1000])
def test_gradients_equal_those_of_the_plain_formula(policy, hidden, targets, chunk_tokens):
    weights = jax.random.normal(jax.random.key(3), (2, ROWS, TOKENS))

    def loss(f, policy, hidden):
        logprobs, entropy = f(policy, hidden)
        return jnp.sum(weights[0] * logprobs + weights[1] * entropy)

    def gradient(f):
        return jax.grad(loss, argnums=(1, 2))(f, policy, hidden)

    got = gradient(lambda p, h: chunked(p, h, targets, 0.7, chunk_tokens))
    expected = gradient(lambda p, h: plain(p, h, targets, 0.7))
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=GRAD_RTOL, atol=ATOL)


def test_bfloat16_products_still_give_float32_results(policy, hidden, targets):
    half = target_logprobs(
        policy,
        hidden.astype(jnp.bfloat16),
        targets,
        temperature=1.0,
        chunk_tokens=12,
        dtype=jnp.bfloat16,
    )
    exact = plain(policy, hidden, targets, 1.0)
    for h, e in zip(half, exact, strict=True):
        assert h.dtype == F32
        np.testing.assert_allclose(
            h, e, atol=0.2
        )  # 16 products of 8-bit mantissas, logits of order 3


def arrays_of(jaxpr):
    """Shapes of everything a program computes, the bodies of its loops included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
        for value in equation.params.values():
            for leaf in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(leaf, "jaxpr", leaf)
                if hasattr(inner, "eqns"):
                    yield from arrays_of(inner)


def test_no_array_of_all_tokens_by_vocabulary_exists_in_forward_or_backward(policy):
    rows, tokens, vocabulary, limit = 4, 32, 61, 16
    hidden = jnp.zeros((rows, tokens, 16))
    targets = jnp.zeros((rows, tokens), jnp.int32)

    def loss(f, policy, hidden):
        logprobs, entropy = f(policy, hidden, targets, 1.0)
        return jnp.sum(logprobs + entropy)

    def biggest(f):
        program = jax.make_jaxpr(jax.grad(lambda p, h: loss(f, p, h), argnums=(0, 1)))
        shapes = list(arrays_of(program(policy, hidden).jaxpr))
        return max(int(np.prod(s)) for s in shapes if vocabulary in s and 16 not in s)

    def small_chunks(*args):
        return chunked(*args, chunk_tokens=limit)

    assert biggest(plain) >= rows * tokens * vocabulary
    assert biggest(small_chunks) <= limit * vocabulary
