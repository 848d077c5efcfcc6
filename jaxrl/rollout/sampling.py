"""The jitted sampling step over fixed slots. Pure: arrays in, arrays out; no thread, file or clock.

A slot holds one sequence. Its last prompt token is its first decode input, so the first sampled token
comes from the same decode graph as every other and prefill only fills the cache.

Randomness: one uniform per token from fold_in(key of the sample, position), so a token depends on its
sample and position alone, never on the slot, its neighbours or the order of arrival. A uniform and the
inverse CDF cost one random number per row where the Gumbel trick costs V.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.attention import DecodeAttention
from models.cache import KVCache, init_cache, insert_prompts, join_cache, split_cache
from models.config import ModelConfig
from models.decoder import Policy, decode_step, prefill, recompute
from models.fused import FusedLayer
from models.head import head_logits
from models.prefixes import Prefixes, fill_rows, init_prefixes, replace_sequences
from models.rows import PrefixRows, RowAttention
from models.sharding import cache_shardings

LEAST_CACHE = 0.15
"""Bytes of the slots' cache, per byte of the weights, from where on decode reads its first parts alone. A
program for each takes seconds to compile, and memory; below this, steps that read all of it read at most so
much more."""
CDF_BLOCK = 32
"""Vocabulary entries per block of the two-level inverse CDF."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class Slots:
    """State of all B slots on the rollout devices."""

    cache: KVCache
    tokens: Any  # [B, S] int32, sequence so far by position
    positions: Any  # [B] int32, position of the next decode input
    remaining: Any  # [B] int32, tokens that may still be sampled; 0: the slot is idle
    keys: Any  # [B, 2] uint32, key data of the sample's random stream
    temperature: Any  # [B] float32, 0 is greedy
    top_p: Any  # [B] float32
    top_k: Any  # [B] int32, 0 is off
    stop_ids: Any  # [B, E] int32, -1 where unused
    prefixes: Prefixes | None = None
    """Where prompts are held once for all slots that sample them; the cache then holds what follows."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """What a decode chunk sampled; entry [i, b] is meaningful where `sampled`."""

    tokens: Any  # [C, B] int32
    logprobs: Any  # [C, B] float32
    sampled: Any  # [C, B] bool
    remaining: Any  # [B] int32, after the chunk
    steps: Any  # [] int32, decode steps really done


def processed_scores(
    logits: jax.Array, temperature: jax.Array, top_p: jax.Array, top_k: jax.Array, *, filtered: bool
) -> jax.Array:
    """Scores [B, V] whose softmax is sampled from: logits / temperature.

    `filtered`: restricted to the top_k most likely tokens and to the smallest set whose mass reaches top_p
    (arXiv:1904.09751), -inf elsewhere; False skips both. Temperature 0 leaves the logits as they are (the
    caller takes the argmax, whose log-probability is then reported).
    """
    scores = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    if not filtered:
        return scores
    vocab = logits.shape[-1]
    order = jnp.argsort(-scores, axis=-1)
    ranked = jax.nn.softmax(jnp.take_along_axis(scores, order, axis=-1), axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    limit = jnp.where(top_k > 0, top_k, vocab)[:, None]
    rank = jnp.arange(vocab)[None, :]
    keep_ranked = (rank < limit) & ((before < top_p[:, None]) | (rank == 0))
    keep = (
        jnp.zeros_like(keep_ranked).at[jnp.arange(logits.shape[0])[:, None], order].set(keep_ranked)
    )
    return jnp.where(keep, scores, -jnp.inf)


def inverse_cdf(
    scores: jax.Array, uniform: jax.Array, best: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Token [B] whose cumulated probability first exceeds `uniform` [B] in [0, 1), and its log-probability [B]
    under softmax(scores [B, V]); tokens of `best` [B] that are not negative are taken as they are.

    Two levels, so that float32 sums stay short: first the block of CDF_BLOCK tokens, then the token in it.
    Nothing of size V is made from the scores: both levels and the sum are reductions of them.
    """
    rows, vocab = scores.shape
    blocks = -(-vocab // CDF_BLOCK)
    padding = ((0, 0), (0, blocks * CDF_BLOCK - vocab))
    peak = jnp.max(scores, axis=-1)
    in_blocks = jnp.pad(scores, padding, constant_values=-jnp.inf).reshape(rows, blocks, CDF_BLOCK)
    masses = jnp.exp(in_blocks - peak[:, None, None]).sum(-1)
    total = masses.sum(-1)
    block, inside = _first_exceeding(masses, uniform * total)
    chosen = jnp.take_along_axis(in_blocks, block[:, None, None], axis=1)[:, 0]
    chosen = jnp.exp(chosen - peak[:, None])
    token, _ = _first_exceeding(chosen, jnp.minimum(inside, chosen.sum(-1)))
    token = block * CDF_BLOCK + token
    if best is not None:
        token = jnp.where(best < 0, token, best)
    score = jnp.take_along_axis(scores, token[:, None], axis=-1)[:, 0]
    return token, score - peak - jnp.log(total)


def _first_exceeding(masses: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index of the entry of `masses` [B, n] where the running sum passes `target`, and the rest inside it."""
    total = jnp.cumsum(masses, axis=-1)
    target = jnp.minimum(target, total[:, -1] * jnp.float32(1 - 2**-23))
    index = jnp.sum(total <= target[:, None], axis=-1, dtype=jnp.int32)
    index = jnp.minimum(index, masses.shape[-1] - 1)
    before = jnp.take_along_axis(total - masses, index[:, None], axis=-1)[:, 0]
    return index, jnp.maximum(target - before, 0.0)


def sample_tokens(
    logits: jax.Array, slots: Slots, *, filtered: bool, greedy: bool
) -> tuple[jax.Array, jax.Array]:
    """Next token [B] of every slot and its log-probability [B] as sampled.

    `greedy=False` promises that no slot has temperature 0, `filtered=False` that none uses top-p or top-k.
    """
    scores = processed_scores(
        logits, slots.temperature, slots.top_p, slots.top_k, filtered=filtered
    )
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(slots.keys), slots.positions)
    best = None
    if greedy:
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        best = jnp.where(slots.temperature > 0, -1, best)
    return inverse_cdf(scores, jax.vmap(jax.random.uniform)(keys), best)


def decode_chunk(
    policy: Policy, layers: tuple[FusedLayer, ...], slots: Slots, idle_budget: jax.Array, *, steps: int,
    dtype: jnp.dtype, filtered: bool, greedy: bool, attention: DecodeAttention = "blocks",
) -> tuple[Slots, Chunk]:  # fmt: skip
    """Up to `steps` decode steps over all slots in one loop.

    layers: those of `policy` by `split_layers`, which is a copy of the weights; made in here, every chunk
    would pay for it.
    Ends early when every slot is idle, or once idle slots have cost `idle_budget` slot-steps ([] int32):
    the caller has work for them and knows what refilling them costs.

    All of the given cache is read: it must hold the longest live sequence plus `steps`, and need not
    hold more (`models.cache.split_cache`). Idle slots are computed and ignored.
    """
    num_slots = slots.positions.shape[0]
    prefixes, slots = slots.prefixes, replace(slots, prefixes=None)  # read, not carried along

    def goes_on(carry: tuple[Slots, Chunk, jax.Array]) -> jax.Array:
        slots, chunk, idle = carry
        return (chunk.steps < steps) & jnp.any(slots.remaining > 0) & (idle < idle_budget)

    def one_step(carry: tuple[Slots, Chunk, jax.Array]) -> tuple[Slots, Chunk, jax.Array]:
        slots, chunk, idle = carry
        step = chunk.steps
        alive = slots.remaining > 0
        # each slot reads and writes its own row, so devices that share the slots exchange nothing
        inputs = jax.vmap(lambda row, at: row[at])(slots.tokens, slots.positions)
        hidden, cache = decode_step(
            policy, slots.cache, inputs, slots.positions, dtype=dtype, layers=layers,
            attention=attention, prefixes=prefixes,
        )  # fmt: skip
        logits = head_logits(policy, hidden, dtype=dtype)
        token, logprob = sample_tokens(logits, slots, filtered=filtered, greedy=greedy)
        stopped = jnp.any(token[:, None] == slots.stop_ids, axis=-1)
        remaining = jnp.where(alive & ~stopped, slots.remaining - 1, 0)
        following = jnp.where(alive, slots.positions + 1, slots.positions)
        written = jnp.where(alive, token, inputs)
        chunk = Chunk(
            tokens=chunk.tokens.at[step].set(token),
            logprobs=chunk.logprobs.at[step].set(logprob),
            sampled=chunk.sampled.at[step].set(alive),
            remaining=remaining,
            steps=step + 1,
        )
        slots = replace(
            slots,
            cache=cache,
            tokens=jax.vmap(lambda row, at, token: row.at[at].set(token, mode="drop"))(
                slots.tokens, following, written
            ),
            positions=jnp.where(remaining > 0, following, slots.positions),
            remaining=remaining,
        )
        return slots, chunk, idle + jnp.sum(remaining == 0, dtype=jnp.int32)

    empty = Chunk(
        tokens=jnp.zeros((steps, num_slots), jnp.int32),
        logprobs=jnp.zeros((steps, num_slots), jnp.float32),
        sampled=jnp.zeros((steps, num_slots), bool),
        remaining=slots.remaining,
        steps=jnp.int32(0),
    )
    slots, chunk, _ = jax.lax.while_loop(goes_on, one_step, (slots, empty, jnp.int32(0)))
    return replace(slots, prefixes=prefixes), chunk


def recompute_cache(
    policy: Policy,
    slots: Slots,
    *,
    tokens: int,
    dtype: jnp.dtype,
    attention: RowAttention = "blocks",
) -> Slots:
    """All cached keys and values of the first `tokens` positions again, under new weights."""
    tokens_so_far = slots.tokens[:, :tokens]
    if slots.prefixes is None:
        cache = recompute(policy, slots.cache, tokens_so_far, dtype=dtype, attention=attention)
        return replace(slots, cache=cache)
    made = prefill(policy, tokens_so_far, dtype=dtype, attention=attention)
    prefixes, cache = replace_sequences(slots.prefixes, slots.cache, *made)
    return replace(slots, prefixes=prefixes, cache=cache)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """N samples that enter slots; rows past the real ones name slot B and are dropped."""

    slots: Any  # [N] int32
    rows: Any  # [N] int32, row of the prefilled prompts
    stream: Any  # [N, 2] uint32, (prompt index, sample index): names the random stream
    max_new_tokens: Any  # [N] int32
    temperature: Any  # [N] float32
    top_p: Any  # [N] float32
    top_k: Any  # [N] int32
    stop_ids: Any  # [N, E] int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class Seats:
    """Where N samples that enter slots read their prompts (`models.prefixes`)."""

    members: Any  # [R, C] int32, of all rows from now on
    lanes: Any  # [N] int32
    filled: Any  # [M] int32, rows that get a prompt; R: none
    sources: Any  # [M] int32, rows of the prefilled prompts


def admit(
    slots: Slots, prefilled: Any, prompts: jax.Array, lengths: jax.Array, entering: Admission,
    root: jax.Array, seats: Seats | None = None,
) -> Slots:  # fmt: skip
    """Copy prefilled prompts into slots, or the rows that slots share, and start their samples.

    `prefilled` holds keys and values of `prompts` [P, T] (right-padded, true `lengths` [P]). Several
    samples may name one prompt row: it was prefilled once; None: the rows that `seats` name have
    them. `root` [2] is the key data of the run's seed.
    """
    at, rows = entering.slots, entering.rows

    def stream_key(name: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(root), name[0])
        return jax.random.key_data(jax.random.fold_in(key, name[1]))

    cache, prefixes = slots.cache, slots.prefixes
    if prefixes is None or seats is None:
        cache = insert_prompts(cache, *prefilled, rows=rows, slots=at)
    else:
        if prefilled is not None:
            prefixes = fill_rows(prefixes, prefilled, lengths, seats.sources, seats.filled)
        prefixes = replace(
            prefixes,
            members=seats.members,
            lanes=prefixes.lanes.at[at].set(seats.lanes, mode="drop"),
            starts=prefixes.starts.at[at].set(lengths[rows] - 1, mode="drop"),
        )
    return Slots(
        cache=cache,
        tokens=slots.tokens.at[at, : prompts.shape[1]].set(prompts[rows], mode="drop"),
        positions=slots.positions.at[at].set(lengths[rows] - 1, mode="drop"),
        remaining=slots.remaining.at[at].set(entering.max_new_tokens, mode="drop"),
        keys=slots.keys.at[at].set(jax.vmap(stream_key)(entering.stream), mode="drop"),
        temperature=slots.temperature.at[at].set(entering.temperature, mode="drop"),
        top_p=slots.top_p.at[at].set(entering.top_p, mode="drop"),
        top_k=slots.top_k.at[at].set(entering.top_k, mode="drop"),
        stop_ids=slots.stop_ids.at[at].set(entering.stop_ids, mode="drop"),
        prefixes=prefixes,
    )


def empty_slots(
    config: ModelConfig, *, num_slots: int, max_tokens: int, num_stop_ids: int,
    cache_dtype: jnp.dtype, attention: DecodeAttention, prefixes: PrefixRows | None = None,
) -> Slots:  # fmt: skip
    """`num_slots` idle slots for sequences of at least `max_tokens` tokens (the cache rounds up); with
    `prefixes` for so many after a prompt in one of these rows."""
    cache = init_cache(config, num_slots, max_tokens, cache_dtype, attention)
    rows, reach = None, cache.max_tokens
    if prefixes is not None:
        rows = init_prefixes(config, prefixes, num_slots, cache_dtype, attention)
        reach += rows.cache.max_tokens
    return Slots(
        cache=cache,
        tokens=jnp.zeros((num_slots, reach), jnp.int32),
        positions=jnp.zeros(num_slots, jnp.int32),
        remaining=jnp.zeros(num_slots, jnp.int32),
        keys=jnp.zeros((num_slots, 2), jnp.uint32),
        temperature=jnp.ones(num_slots, jnp.float32),
        top_p=jnp.ones(num_slots, jnp.float32),
        top_k=jnp.zeros(num_slots, jnp.int32),
        stop_ids=jnp.full((num_slots, num_stop_ids), -1, jnp.int32),
        prefixes=rows,
    )


Rest = tuple[KVCache, KVCache | None]
"""What `split_slots` leaves: of the slots' own cache, and of the rows that they share."""


def parts_pay(cache: KVCache, row_shards: int, weight_bytes: int) -> bool:
    """Whether programs that read the first parts of this cache are worth their making, beside `weight_bytes`.

    row_shards: devices that divide the slots; those that divide the heads divide the weights too.
    """
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    return held / row_shards >= LEAST_CACHE * weight_bytes


def split_slots(slots: Slots, own: int, shared: int) -> tuple[Slots, Rest]:
    """The slots with as much of the caches as sequences of `own` tokens after prompts of `shared` in the rows
    need, and the rest. Copies nothing."""
    needed, rest = split_cache(slots.cache, own)
    prefixes = slots.prefixes
    if prefixes is None:
        return replace(slots, cache=needed), (rest, None)
    read, unread = split_cache(prefixes.cache, shared)
    prefixes = replace(prefixes, cache=read)
    return replace(slots, cache=needed, prefixes=prefixes), (rest, unread)


def whole_slots(slots: Slots, rest: Rest) -> Slots:
    """The inverse of `split_slots`."""
    slots, unread = replace(slots, cache=join_cache(slots.cache, rest[0])), rest[1]
    if slots.prefixes is None or unread is None:
        return slots
    cache = join_cache(slots.prefixes.cache, unread)
    return replace(slots, prefixes=replace(slots.prefixes, cache=cache))


def slot_shardings(config: ModelConfig, mesh: Mesh, *, shares: bool = False) -> Slots:
    """Slots, and with `shares` rows of prompts, over the data axis, kv heads over the tensor axis. A tree
    prefix of Slots."""
    per_slot = NamedSharding(mesh, PartitionSpec("data"))
    cache = cache_shardings(config, mesh)
    rows = None
    if shares:
        rows = Prefixes(
            cache=cache, lengths=per_slot, members=per_slot, lanes=per_slot, starts=per_slot
        )
    return Slots(
        cache=cache, tokens=per_slot, positions=per_slot, remaining=per_slot, keys=per_slot,
        temperature=per_slot, top_p=per_slot, top_k=per_slot, stop_ids=per_slot, prefixes=rows,
    )  # fmt: skip
