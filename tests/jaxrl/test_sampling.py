"""The distribution that is sampled from, and the slots that sample it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.observe import Observer
from jaxrl.rollout.admission import prompt_bucket
from jaxrl.rollout.engine import Request, RolloutEngine, SamplingParams
from jaxrl.rollout.sampling import (
    LEAST_CACHE,
    decode_chunk,
    empty_slots,
    inverse_cdf,
    parts_pay,
    processed_scores,
)
from jaxrl.tracing import num_traces
from jaxrl.types import Completion, Finish, Snapshot
from models.decoder import Decoder, abstract_decoder, hidden_states
from models.fused import fused, split_layers
from models.head import target_logprobs
from models.sharding import make_mesh

SAME_GRAPH_ATOL = 1e-5
"""Two float32 graphs of the same sums in another order: the project's bound for sampler = learner."""
BF16_ATOL = 0.05
"""Logits of order 1 from hidden states with 8 bits of mantissa, rounded in another order."""
STOP = 1


def make_engine(policy: Decoder, **settings: object) -> RolloutEngine:
    defaults = {
        "num_slots": 6, "max_prompt_tokens": 8, "max_new_tokens": 10, "chunk_steps": 3,
        "refill_cost_steps": 1.0, "num_stop_ids": 1, "dtype": jnp.float32, "seed": 0,
        "observer": Observer(),
    }  # fmt: skip
    return RolloutEngine(policy.config, make_mesh(jax.devices()[:1]), **(defaults | settings))


def prompts(count: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(2, 14, rng.integers(1, 9)).tolist()) for _ in range(count)]


def sample_all(
    engine: RolloutEngine, policy: Decoder, groups: int, group_size: int, **params: object
) -> dict[tuple[int, int], Completion]:
    settings = SamplingParams(**({"max_new_tokens": 10, "stop_ids": (STOP,)} | params))
    for stream, prompt in enumerate(prompts(groups)):
        indices = tuple(range(group_size))
        engine.submit(
            Request(stream=stream, prompt=prompt, sample_indices=indices, params=settings)
        )
    done = {}
    while not engine.is_idle:
        for request, completion in engine.run_chunk(Snapshot(version=0, policy=policy)):
            done[request.stream, completion.sample_index] = completion
    return done


@pytest.fixture(scope="module")
def sampled(tiny_policy: Decoder) -> dict[tuple[int, int], Completion]:
    return sample_all(make_engine(tiny_policy), tiny_policy, 5, 4)


@partial(jax.jit, static_argnames="dtype")
def learner_logprobs(
    policy: Decoder, tokens: jax.Array, segments: jax.Array, *, dtype: Any
) -> jax.Array:
    """Of the token after each one, as the learner computes them: float32 weights, work in `dtype`."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = hidden_states(policy, tokens, positions, segments, dtype=dtype)
    logprobs, _ = target_logprobs(
        policy, hidden, jnp.roll(tokens, -1, axis=1), temperature=1.0, chunk_tokens=64, dtype=dtype
    )
    return logprobs


@pytest.mark.parametrize(
    ("dtype", "atol"),
    [(jnp.float32, SAME_GRAPH_ATOL), (jnp.bfloat16, BF16_ATOL)],
    ids=["float32", "bfloat16"],
)
def test_sampler_logprobs_equal_the_learners(tiny_policy: Decoder, dtype: Any, atol: float) -> None:
    snapshot = jax.tree.map(lambda x: x.astype(dtype), tiny_policy)
    sampled = sample_all(make_engine(tiny_policy, dtype=dtype), snapshot, 5, 4)
    rows = [[*prompts(5)[stream], *seen.tokens] for (stream, _), seen in sampled.items()]
    longest = max(map(len, rows))
    tokens = np.array([row + [0] * (longest - len(row)) for row in rows], np.int32)
    segments = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows], np.int32)
    learner = learner_logprobs(tiny_policy, jnp.array(tokens), jnp.array(segments), dtype=dtype)
    for row, own, seen in zip(rows, np.asarray(learner), sampled.values(), strict=True):
        expected = own[len(row) - len(seen.tokens) - 1 : len(row) - 1]
        np.testing.assert_allclose(seen.sampler_logprobs, expected, atol=atol)


def test_a_rollout_does_not_depend_on_slots_neighbours_or_chunks(tiny_policy, sampled) -> None:
    other = sample_all(make_engine(tiny_policy, num_slots=16, chunk_steps=4), tiny_policy, 5, 4)
    few = sample_all(make_engine(tiny_policy, num_slots=2), tiny_policy, 2, 4)
    for key, completion in sampled.items():
        np.testing.assert_array_equal(completion.tokens, other[key].tokens)
        if key in few:
            np.testing.assert_array_equal(completion.tokens, few[key].tokens)


def test_samples_of_one_prompt_differ(sampled) -> None:
    for stream in range(5):
        texts = {tuple(sampled[stream, i].tokens) for i in range(4)}
        assert len(texts) > 1


def test_another_seed_gives_other_samples(tiny_policy, sampled) -> None:
    other = sample_all(make_engine(tiny_policy, seed=1), tiny_policy, 5, 4)
    assert any(not np.array_equal(c.tokens, other[key].tokens) for key, c in sampled.items())


def test_completions_end_at_the_stop_token_or_the_limit(sampled) -> None:
    finishes = set()
    for completion in sampled.values():
        finishes.add(completion.finish)
        assert (completion.tokens[:-1] != STOP).all()
        if completion.finish is Finish.STOP:
            assert completion.tokens[-1] == STOP
        else:
            assert len(completion.tokens) == 10
        assert (
            len(completion.sampler_logprobs) == len(completion.versions) == len(completion.tokens)
        )
    assert finishes == {Finish.STOP, Finish.LENGTH}


def test_greedy_takes_the_most_likely_token(tiny_policy: Decoder) -> None:
    (first, second) = (
        sample_all(make_engine(tiny_policy, seed=s), tiny_policy, 3, 1, temperature=0.0)
        for s in (0, 1)
    )
    for key, completion in first.items():
        np.testing.assert_array_equal(completion.tokens, second[key].tokens)
    prompt, completion = prompts(1)[0], first[0, 0]
    tokens = jnp.array([[*prompt, *completion.tokens.tolist()]], jnp.int32)
    length = tokens.shape[1]
    hidden = hidden_states(
        tiny_policy, tokens, jnp.arange(length)[None], jnp.ones((1, length), jnp.int32),
        dtype=jnp.float32,
    )  # fmt: skip
    logits = hidden[0] @ tiny_policy.embedding.T
    best = np.asarray(logits.argmax(-1))[len(prompt) - 1 : -1]
    np.testing.assert_array_equal(completion.tokens, best)


def test_new_prompts_compile_nothing_new(tiny_policy: Decoder) -> None:
    engine = make_engine(tiny_policy)
    sample_all(engine, tiny_policy, 5, 4)
    traced = engine.trace_count
    for _ in range(3):
        sample_all(engine, tiny_policy, 5, 4)
    assert engine.trace_count == traced


def test_a_prompt_is_prefilled_once_for_its_group(tiny_policy: Decoder) -> None:
    """Six slots, groups of 4: a group that enters in two parts must not be prefilled again."""
    seen: list[int] = []

    class Counter(Observer):
        @contextmanager
        def prefill(self, *, version: int) -> Iterator[dict[str, int]]:
            work: dict[str, int] = {}
            yield work
            seen.append(work["prompts"])

    sample_all(make_engine(tiny_policy, observer=Counter()), tiny_policy, 5, 4)
    assert 0 in seen  # a second part of a group entered by copies alone
    assert sum(seen) == 5


@pytest.mark.parametrize(
    ("devices", "rows"), [(1, [1, 2, 4, 8, 8]), (4, [1, 4, 4, 8, 8]), (6, [1, 6, 6, 6, 12])]
)
def test_the_rows_of_a_prefill_are_one_or_dealt_evenly(devices: int, rows: list[int]) -> None:
    assert [prompt_bucket(prompts, devices) for prompts in (1, 2, 3, 6, 7)] == rows


def test_weights_are_laid_out_for_decoding_once_per_version(tiny_policy: Decoder) -> None:
    engine, seen = make_engine(tiny_policy, chunk_steps=2), []
    params = SamplingParams(max_new_tokens=10, stop_ids=())
    engine.submit(Request(stream=0, prompt=(2, 3), sample_indices=(0,), params=params))
    for version in (0, 0, 1, 1):
        engine.run_chunk(Snapshot(version=version, policy=tiny_policy))
        seen.append(engine.weights.layers)
    assert [one is seen[0] for one in seen] == [True, True, False, False]
    assert seen[3] is seen[2]
    engine.run_chunk(Snapshot(version=1, policy=tiny_policy))
    assert engine.is_idle
    assert engine.weights.layers == ()  # the evaluation's engine waits most of the time


def test_weights_that_lie_as_decode_reads_them_make_the_same_samples(
    tiny_policy: Decoder, sampled: dict[tuple[int, int], Completion]
) -> None:
    engine = make_engine(tiny_policy)
    stored = fused(tiny_policy)
    again = sample_all(engine, stored, 5, 4)
    for name, one in sampled.items():
        np.testing.assert_array_equal(again[name].tokens, one.tokens)
        np.testing.assert_allclose(
            again[name].sampler_logprobs, one.sampler_logprobs, atol=SAME_GRAPH_ATOL
        )
    engine.free()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(stored))


def test_a_small_cache_is_read_whole_by_one_program(tiny_policy: Decoder) -> None:
    """Programs for its parts are made where they leave out much of what a step reads."""
    cache = empty_slots(
        tiny_policy.config, num_slots=4, max_tokens=128, num_stop_ids=1, cache_dtype=jnp.float32,
        attention="blocks",
    ).cache  # fmt: skip
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert parts_pay(cache, 1, round(held / LEAST_CACHE))
    assert not parts_pay(cache, 1, round(held / LEAST_CACHE) + 10)
    assert not parts_pay(cache, 2, round(held / LEAST_CACHE))


@pytest.mark.parametrize(("larger", "programs"), [(1, 2), (1000, 1)])
def test_a_slot_that_grows_meets_a_program_per_part_of_a_large_cache_alone(
    tiny_policy: Decoder, larger: int, programs: int
) -> None:
    engine = make_engine(tiny_policy, num_slots=1, max_new_tokens=56, chunk_steps=16)
    engine.weights.nbytes *= larger
    params = SamplingParams(max_new_tokens=56, stop_ids=())
    engine.submit(Request(stream=0, prompt=(2, 3), sample_indices=(0,), params=params))
    while not engine.is_idle:
        engine.run_chunk(Snapshot(version=0, policy=tiny_policy))
    assert num_traces(engine.programs["decode"]) == programs


def test_an_engine_that_is_freed_holds_nothing(tiny_policy: Decoder) -> None:
    engine = make_engine(tiny_policy, chunk_steps=2)
    params = SamplingParams(max_new_tokens=6, stop_ids=())
    engine.submit(Request(stream=0, prompt=(2, 3), sample_indices=(0,), params=params))
    engine.run_chunk(Snapshot(version=0, policy=tiny_policy))
    held = jax.tree.leaves((engine.slots, engine.weights.layers))
    engine.free()
    assert all(leaf.is_deleted() for leaf in held)


def test_a_chunk_ends_once_idle_slots_cost_a_refill_and_work_waits(tiny_policy: Decoder) -> None:
    engine = make_engine(tiny_policy, num_slots=4, chunk_steps=8, refill_cost_steps=0.5)
    snapshot = Snapshot(version=0, policy=tiny_policy)
    for stream, limit in enumerate((2, 8, 8, 8, 3)):
        params = SamplingParams(max_new_tokens=limit, stop_ids=())
        engine.submit(Request(stream=stream, prompt=(2, 3), sample_indices=(0,), params=params))
    # one slot is idle after step 2: two slot-steps are lost after step 3
    assert [len(c.tokens) for _, c in engine.run_chunk(snapshot)] == [2]
    assert {live.length for live in engine._live.values()} == {2 + 3}
    # nothing waits any more: the next chunk runs until all are done
    assert sorted(len(c.tokens) for _, c in engine.run_chunk(snapshot)) == [3, 8, 8, 8]


def test_tokens_carry_the_version_that_made_them(tiny_policy: Decoder) -> None:
    engine = make_engine(tiny_policy, num_slots=1, chunk_steps=2)
    params = SamplingParams(max_new_tokens=6, stop_ids=())
    engine.submit(Request(stream=0, prompt=(2, 3), sample_indices=(0,), params=params))
    finished, version = [], 0
    while not finished:
        finished = engine.run_chunk(Snapshot(version=version, policy=tiny_policy))
        version += 1
    np.testing.assert_array_equal(finished[0][1].versions, [0, 0, 1, 1, 2, 2])


def test_recomputed_cache_equals_one_made_by_the_new_weights(tiny_policy: Decoder) -> None:
    """Swap weights in the middle: with recompute, later tokens are as if the new weights saw all of it."""
    other = jax.tree.map(lambda x: x * 1.1, tiny_policy)
    params = SamplingParams(max_new_tokens=8, stop_ids=())
    engine = make_engine(tiny_policy, num_slots=1, chunk_steps=4, kv_on_swap="recompute")
    engine.submit(Request(stream=0, prompt=(2, 3, 4), sample_indices=(0,), params=params))
    engine.run_chunk(Snapshot(version=0, policy=tiny_policy))
    ((_, completion),) = engine.run_chunk(Snapshot(version=1, policy=other))
    tokens = jnp.array([[2, 3, 4, *completion.tokens.tolist()]], jnp.int32)
    hidden = hidden_states(
        other, tokens, jnp.arange(11)[None], jnp.ones((1, 11), jnp.int32), dtype=jnp.float32
    )
    logprobs, _ = target_logprobs(
        other, hidden, jnp.roll(tokens, -1, 1), temperature=1.0, chunk_tokens=64, dtype=jnp.float32
    )
    np.testing.assert_allclose(
        completion.sampler_logprobs[4:], np.asarray(logprobs)[0, 6:10], atol=SAME_GRAPH_ATOL
    )


def test_inverse_cdf_follows_the_distribution() -> None:
    """70 tokens, more than two blocks; a chi-square statistic below its 99.9 % quantile."""
    rng = np.random.default_rng(0)
    logprobs = jax.nn.log_softmax(jnp.array(rng.normal(size=70) * 2, jnp.float32))
    draws = 40_000
    tokens, drawn = inverse_cdf(
        jnp.broadcast_to(logprobs, (draws, 70)), jax.random.uniform(jax.random.key(0), (draws,))
    )
    np.testing.assert_allclose(drawn, logprobs[tokens], atol=1e-5)  # float32 sums in another order
    expected = np.exp(np.asarray(logprobs, np.float64)) * draws
    counts = np.bincount(np.asarray(tokens), minlength=70)
    often = expected > 5
    statistic = (((counts - expected) ** 2 / expected)[often]).sum()
    assert statistic < 120  # 99.9 % quantile of chi-square with 69 degrees of freedom is 111.1


def test_inverse_cdf_never_picks_an_impossible_token() -> None:
    logprobs = jnp.where(jnp.arange(100) == 63, 0.0, -jnp.inf)[None]
    for uniform in (0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))):
        assert int(inverse_cdf(logprobs, jnp.array([uniform], jnp.float32))[0][0]) == 63


def test_top_k_and_top_p_renormalise_what_they_keep() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]] * 3))
    ones, zeros = jnp.ones(3), jnp.zeros(3, jnp.int32)
    scores = processed_scores(
        logits, ones, jnp.array([1.0, 0.7, 0.3]), zeros.at[0].set(2), filtered=True
    )
    expected = [[0.625, 0.375, 0, 0], [0.625, 0.375, 0, 0], [1, 0, 0, 0]]
    np.testing.assert_allclose(jax.nn.softmax(scores), expected, atol=1e-6)


def test_a_decode_step_makes_at_most_three_arrays_of_all_logits(tiny_policy: Decoder) -> None:
    """On a CPU: the head's product, the scores, and their exponentials by blocks."""
    config, slots = replace(tiny_policy.config, vocab_size=96), 6
    state = empty_slots(
        config, num_slots=slots, max_tokens=32, num_stop_ids=1,
        cache_dtype=jnp.dtype("float32"), attention="blocks",
    )  # fmt: skip
    program = jax.jit(
        decode_chunk, static_argnames=("steps", "dtype", "filtered", "greedy"), donate_argnums=2
    )
    policy = abstract_decoder(config)
    text = program.lower(
        policy, jax.eval_shape(split_layers, policy), state, jnp.int32(1000), steps=4,
        dtype=jnp.dtype("float32"), filtered=False, greedy=False,
    ).compile().as_text()  # fmt: skip
    body = max(re.split(r"\n(?=%\S+ \(|ENTRY )", text), key=lambda part: part.count(" = "))
    made = re.findall(rf"= f32\[{slots},(?:96|3,32)\]\S* ([\w-]+)\(", body)
    made = [name for name in made if name not in ("bitcast", "reshape", "get-tuple-element")]
    assert 1 <= len(made) <= 3, made
