"""The collectives that the cost model counts are those of the compiled programs, on 8 host devices."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from models.config import ModelConfig
from models.decoder import Decoder, abstract_decoder, hidden_states
from models.head import target_logprobs
from models.sharding import batch_sharding, make_mesh, policy_shardings
from roofline import traffic
from roofline.hlo import compiled_collectives
from roofline.kernels import Layout
from roofline.traffic import Collective

MODEL = ModelConfig(
    vocab_size=64, width=32, num_layers=3, num_heads=4, num_kv_heads=2, head_size=16, ffw_size=48,
    qk_norm=True, tied_embeddings=True,
)  # fmt: skip
ROWS, TOKENS = 16, 16
NORMS_SHARE = 0.02
"""Gradients of norm scales are not counted: they are below this share of all bytes at these sizes."""
MESHES = [(1, 8, 1), (8, 1, 1), (1, 1, 2), (1, 4, 2), (4, 1, 2)]


def score(policy: Decoder, tokens: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    positions = jnp.broadcast_to(jnp.arange(TOKENS), tokens.shape)
    hidden = hidden_states(policy, tokens, positions, segments, dtype=jnp.float32)
    return target_logprobs(
        policy, hidden, jnp.roll(tokens, -1, 1), temperature=1.0, chunk_tokens=ROWS * TOKENS,
        dtype=jnp.float32,
    )  # fmt: skip


def loss(policy: Decoder, *batch: jax.Array) -> jax.Array:
    logprobs, entropy = score(policy, *batch)
    return jnp.sum(logprobs) + jnp.sum(entropy)


def accumulate(gradients: Decoder, policy: Decoder, *batch: jax.Array) -> Decoder:
    return jax.tree.map(jnp.add, gradients, jax.grad(loss)(policy, *batch))


def compiled(program, model: ModelConfig, sizes: tuple[int, int, int], *, trains: bool) -> str:
    """Optimised HLO of a program of the weights and a batch, placed as the learner places them."""
    data, fsdp, tensor = sizes
    mesh = make_mesh(jax.devices()[: data * fsdp * tensor], data=data, fsdp=fsdp, tensor=tensor)
    shardings = policy_shardings(model, mesh)
    policy = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract_decoder(model), shardings,
    )  # fmt: skip
    rows = jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32, sharding=batch_sharding(mesh))
    weights = (policy, policy) if trains else (policy,)
    jitted = jax.jit(program, out_shardings=shardings if trains else None)
    with jax.set_mesh(mesh):
        return jitted.lower(*weights, rows, rows).compile().as_text()


def axes(group: tuple[int, ...], sizes: tuple[int, int, int]) -> str:
    """Mesh axes along which the devices of a group differ, tensor innermost."""
    places = [(d // (sizes[1] * sizes[2]), d // sizes[2] % sizes[1], d % sizes[2]) for d in group]
    differing = [
        name
        for name, values in zip(("data", "fsdp", "tensor"), zip(*places, strict=True), strict=True)
        if len(set(values)) > 1
    ]
    return "+".join(differing)


def seen_bytes(text: str, sizes: tuple[int, int, int]) -> Counter[tuple[str, str]]:
    """Array bytes by kind and axis; what only one float per row or scale needs is left out."""
    total: Counter[tuple[str, str]] = Counter()
    for found in compiled_collectives(text):
        total[found.kind, axes(found.group, sizes)] += found.times * found.array_bytes
    return total


def counted_bytes(collectives: tuple[Collective, ...]) -> Counter[tuple[str, str]]:
    """The same, as the CPU backend writes it: it has no reduce-scatter and reduces whole arrays."""
    total: Counter[tuple[str, str]] = Counter()
    for c in collectives:
        kind = "all-reduce" if c.kind == "reduce-scatter" else c.kind
        total[kind, c.axis] += c.count * c.array_bytes
    return total


def assert_same(seen: Counter[tuple[str, str]], counted: Counter[tuple[str, str]]) -> None:
    allowed = NORMS_SHARE * sum(counted.values())
    for key in seen | counted:
        assert abs(seen[key] - counted[key]) <= allowed, (key, seen, counted)


@pytest.mark.parametrize(("sizes", "tied"), [((1, 8, 1), False), *((m, True) for m in MESHES)])
def test_a_training_program_moves_what_the_cost_model_counts(
    sizes: tuple[int, int, int], tied: bool
) -> None:
    model = replace(MODEL, tied_embeddings=tied)
    layout = Layout(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    local = ROWS // layout.row_shards * TOKENS
    counted = counted_bytes(
        traffic.forward(model, layout, local)
        + traffic.scored_head(model, layout, local, trains=True)
        + traffic.layers(model, layout, local)
        + traffic.gradients(model, layout)
    )
    assert_same(seen_bytes(compiled(accumulate, model, sizes, trains=True), sizes), counted)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (8, 1, 1), (2, 2, 2)])
def test_a_scoring_program_moves_what_the_cost_model_counts(sizes: tuple[int, int, int]) -> None:
    layout = Layout(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    local = ROWS // layout.row_shards * TOKENS
    counted = counted_bytes(
        traffic.forward(MODEL, layout, local)
        + traffic.scored_head(MODEL, layout, local, trains=False)
    )

    assert_same(seen_bytes(compiled(score, MODEL, sizes, trains=False), sizes), counted)


def test_one_device_exchanges_nothing() -> None:
    assert not compiled_collectives(compiled(accumulate, MODEL, (1, 1, 1), trains=True))
