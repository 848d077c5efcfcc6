"""Continuous batching over fixed slots: the host side of sampling. Single-threaded; its caller drives it.

    submit(request)                 any number of samples of one prompt, queued
    run_chunk(snapshot)             1 free slots take queued samples; a prompt is prefilled once and its
                                      keys and values are copied to every slot that samples it
                                    2 one jitted loop of decode steps over all slots; it ends early when
                                      samples wait and idle slots have cost as much as refilling them will
                                    3 finished completions are returned, their slots are free again
Weights may change between two chunks; each token keeps the version that produced it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl.attention import ON_CPU, Programs
from jaxrl.devices import decode_options
from jaxrl.observe import Observer
from jaxrl.rollout.sampling import (
    Admission,
    Chunk,
    Slots,
    admit,
    decode_chunk,
    empty_slots,
    recompute_cache,
    slot_shardings,
)
from jaxrl.tracing import num_traces
from jaxrl.types import Completion, Finish, Snapshot
from models.cache import KVCache, join_cache, split_cache
from models.config import ModelConfig
from models.decoder import prefill

SMALLEST_BUCKET = 8
"""Prompt lengths and prompt counts are padded to powers of two from here (counts from 1)."""
NO_BUDGET = np.iinfo(np.int32).max
"""Idle slot-steps when there is nothing to refill slots with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the samples of a request are drawn."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Samples `sample_indices` of one prompt. `stream` names the prompt's random stream within the run."""

    stream: int
    prompt: tuple[int, ...]
    sample_indices: tuple[int, ...]
    params: SamplingParams


@dataclass(slots=True)
class _Live:
    """A sample in a slot, with what it has generated so far."""

    request: Request
    sample_index: int
    length: int  # prompt and generated tokens
    tokens: list[np.ndarray] = field(default_factory=list)  # of each chunk
    logprobs: list[np.ndarray] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Prefilled:
    """Distinct prompts, right-padded; their keys and values under the weights in use, once made."""

    keys_values: tuple[jax.Array, jax.Array] | None
    prompts: Any  # [P, T] int32
    lengths: Any  # [P] int32
    row_of: dict[int, int]  # stream -> row


class RolloutEngine:
    """Samples completions for queued requests, `num_slots` sequences at a time."""

    def __init__(
        self, config: ModelConfig, mesh: Mesh, *, num_slots: int, max_prompt_tokens: int,
        max_new_tokens: int, chunk_steps: int, refill_cost_steps: float, num_stop_ids: int,
        dtype: jnp.dtype, seed: int, kv_on_swap: str = "keep", observer: Observer,
        cache_dtype: jnp.dtype | None = None, programs: Programs = ON_CPU,
    ) -> None:  # fmt: skip
        """cache_dtype: None, as `dtype`."""
        self.num_slots = num_slots
        self._mesh = mesh
        self.max_prompt_tokens = max_prompt_tokens
        self.max_tokens = max_prompt_tokens + max_new_tokens
        self.chunk_steps = chunk_steps
        self._refill_cost = max(1, round(refill_cost_steps * num_slots))  # [slot-steps]
        self._num_stop_ids = num_stop_ids
        self._recomputes = kv_on_swap == "recompute"
        self._observer = observer
        self._host = NamedSharding(mesh, PartitionSpec())
        self._root = jax.device_put(jax.random.key_data(jax.random.key(seed)), self._host)
        self._queue: deque[tuple[Request, int]] = deque()
        self._live: dict[int, _Live] = {}
        self._kept: _Prefilled | None = None
        self._version: int | None = None

        slots = partial(
            empty_slots, config, num_slots=num_slots, max_tokens=self.max_tokens,
            num_stop_ids=num_stop_ids, cache_dtype=cache_dtype or dtype, attention=programs.decode,
        )  # fmt: skip
        shardings = slot_shardings(config, mesh)
        self.places = shardings  # of `slots`, a tree prefix
        self._slots = jax.jit(slots, out_shardings=shardings)()
        self._prefill = jax.jit(partial(prefill, dtype=dtype, attention=programs.prompts))
        self._admit = jax.jit(admit, donate_argnums=(0,), out_shardings=shardings)
        self._decode = jax.jit(
            partial(decode_chunk, dtype=dtype, attention=programs.decode),
            static_argnames=("steps", "filtered", "greedy"),
            donate_argnums=(1,),
            out_shardings=(shardings, self._host),
            compiler_options=decode_options(mesh.devices.flat[0]),
        )
        self._idle = jax.jit(
            lambda remaining, freed: jnp.where(freed, 0, remaining),
            out_shardings=shardings.remaining,
        )
        self._recompute = jax.jit(
            partial(recompute_cache, dtype=dtype, attention=programs.prompts),
            static_argnames=("tokens",),
            donate_argnums=(1,),
            out_shardings=shardings,
        )

    # -- what the caller may ask -------------------------------------------------------------------

    @property
    def num_free_slots(self) -> int:
        """Slots that neither hold a live sample nor are spoken for by the queue."""
        return max(0, self.num_slots - len(self._live) - len(self._queue))

    @property
    def slots(self) -> Slots:
        """State of all slots."""
        return self._slots

    @property
    def programs(self) -> dict[str, Any]:
        """The jitted phases by name, for `jaxrl.programs`."""
        return {"prefill": self._prefill, "decode": self._decode}

    @property
    def is_idle(self) -> bool:
        """Nothing queued, nothing in a slot."""
        return not self._live and not self._queue

    @property
    def trace_count(self) -> int:
        """Programs traced so far over all jitted functions: flat once every bucket was met."""
        return num_traces(self._prefill, self._admit, self._decode, self._recompute)

    def submit(self, request: Request) -> None:
        """Queue the samples of a request."""
        if not 1 <= len(request.prompt) <= self.max_prompt_tokens:
            raise ValueError(
                f"prompt of {len(request.prompt)} tokens; this engine takes 1 to {self.max_prompt_tokens}; "
                "raise rollout.max_prompt_tokens"
            )
        room = self.max_tokens - len(request.prompt)
        if not 1 <= request.params.max_new_tokens <= room:
            raise ValueError(
                f"max_new_tokens={request.params.max_new_tokens} after a prompt of {len(request.prompt)} "
                f"tokens; a slot has room for {room}; raise rollout.max_new_tokens"
            )
        if len(request.params.stop_ids) > self._num_stop_ids:
            raise ValueError(
                f"{len(request.params.stop_ids)} stop ids; this engine was built for {self._num_stop_ids}"
            )
        self._queue.extend((request, index) for index in request.sample_indices)

    def cancel(self, streams: Set[int]) -> tuple[int, int]:
        """Drop the samples of these streams, queued or half done: (samples dropped, their tokens)."""
        queued = [entry for entry in self._queue if entry[0].stream in streams]
        self._queue = deque(entry for entry in self._queue if entry[0].stream not in streams)
        freed = [slot for slot, live in self._live.items() if live.request.stream in streams]
        tokens = sum(sum(map(len, self._live.pop(slot).tokens)) for slot in freed)
        if freed:
            flags = np.isin(np.arange(self.num_slots), freed)
            remaining = self._idle(self._slots.remaining, jax.device_put(flags, self._host))
            self._slots = replace(self._slots, remaining=remaining)
        return len(queued) + len(freed), tokens

    def free(self) -> None:
        """Give the slots' memory back; the engine is of no use afterwards."""
        for leaf in jax.tree.leaves(self._slots):
            leaf.delete()

    def run_chunk(
        self, snapshot: Snapshot, *, more_waits: bool = False
    ) -> list[tuple[Request, Completion]]:
        """Refill free slots, decode one chunk with these weights, return what finished.

        `more_waits`: the caller could submit more at once, so idle slots are worth a refill.
        """
        with jax.set_mesh(self._mesh):
            self._swap_to(snapshot)
            self._refill(snapshot)
            if not self._live:
                return []
            chunk = self._decode_live(snapshot, more_waits or bool(self._queue))
        return self._collect(chunk, snapshot.version)

    # -- steps of run_chunk ------------------------------------------------------------------------

    def _swap_to(self, snapshot: Snapshot) -> None:
        if snapshot.version == self._version:
            return
        self._kept = None  # prefilled under the old weights
        if self._recomputes and self._live and self._version is not None:
            needed, rest = self._split_slots(0)
            self._slots = _with_cache(
                self._recompute(snapshot.policy, needed, tokens=needed.cache.max_tokens), rest
            )
        self._version = snapshot.version

    def _refill(self, snapshot: Snapshot) -> None:
        free = [slot for slot in range(self.num_slots) if slot not in self._live]
        entering = [(slot, *self._queue.popleft()) for slot in free[: len(self._queue)]]
        if not entering:
            return
        self._live |= {slot: _Live(r, i, len(r.prompt)) for slot, r, i in entering}
        kept = self._kept
        known = [e for e in entering if kept is not None and e[1].stream in kept.row_of]
        new = [e for e in entering if kept is None or e[1].stream not in kept.row_of]
        if kept is not None and known:
            self._enter(snapshot, kept, known)
        if new:
            kept = self._enter(snapshot, _pad_prompts(new, self.max_prompt_tokens), new)
        waits = self._queue and kept is not None and self._queue[0][0].stream in kept.row_of
        self._kept = kept if waits else None

    def _enter(
        self, snapshot: Snapshot, source: _Prefilled, entering: Sequence[tuple[int, Request, int]]
    ) -> _Prefilled:
        """Prefill the prompts if they are not yet, copy them into slots and start their samples."""
        admission = self._admission(source.row_of, entering)
        traced, rows = self.trace_count, 0
        with self._observer.prefill(version=snapshot.version) as work:
            if source.keys_values is None:
                rows = source.prompts.shape[0]
                prompts, lengths = jax.device_put((source.prompts, source.lengths), self._host)
                source = _Prefilled(
                    self._prefill(snapshot.policy, prompts), prompts, lengths, source.row_of
                )
            self._slots = self._admit(
                self._slots, source.keys_values, source.prompts, source.lengths,
                jax.device_put(admission, self._host), self._root,
            )  # fmt: skip
            jax.block_until_ready(self._slots.positions)
            work.update(
                prompts=rows, tokens=source.prompts.shape[1], samples=len(entering),
                compiled=self.trace_count - traced,
            )  # fmt: skip
        return source

    def _admission(
        self, row_of: dict[int, int], entering: Sequence[tuple[int, Request, int]]
    ) -> Admission:
        """The entering samples as arrays, padded to a power of two."""
        slots, requests, indices = zip(*entering, strict=True)
        padding = _bucket(len(entering), SMALLEST_BUCKET) - len(entering)
        params = [request.params for request in requests]
        stop_ids = [p.stop_ids + (-1,) * (self._num_stop_ids - len(p.stop_ids)) for p in params]

        def column(values: Sequence[Any], dtype: type, fill: int = 0) -> np.ndarray:
            return np.array([*values, *[fill] * padding], dtype)

        return Admission(
            slots=column(slots, np.int32, self.num_slots),  # past the end: dropped
            rows=column([row_of[r.stream] for r in requests], np.int32),
            stream=np.stack(
                [column([r.stream for r in requests], np.uint32), column(indices, np.uint32)],
                axis=1,
            ),
            max_new_tokens=column([p.max_new_tokens for p in params], np.int32),
            temperature=column([p.temperature for p in params], np.float32, 1),
            top_p=column([p.top_p for p in params], np.float32, 1),
            top_k=column([p.top_k for p in params], np.int32),
            stop_ids=np.array(
                [*stop_ids, *[(-1,) * self._num_stop_ids] * padding], np.int32
            ).reshape(-1, self._num_stop_ids),
        )

    def _decode_live(self, snapshot: Snapshot, more_waits: bool) -> Chunk:
        params = [live.request.params for live in self._live.values()]
        needed, rest = self._split_slots(self.chunk_steps)
        traced = self.trace_count
        with self._observer.decode(version=snapshot.version) as work:
            slots, on_device = self._decode(
                snapshot.policy,
                needed,
                np.int32(self._refill_cost if more_waits else NO_BUDGET),
                steps=self.chunk_steps,
                filtered=any(p.top_p < 1 or p.top_k > 0 for p in params),
                greedy=any(p.temperature == 0 for p in params),
            )
            self._slots = _with_cache(slots, rest)
            chunk: Chunk = jax.device_get(on_device)
            work.update(
                kv_len=needed.cache.max_tokens,
                steps=int(chunk.steps),
                tokens=int(chunk.sampled.sum()),
                compiled=self.trace_count - traced,
            )
        return chunk

    def _collect(self, chunk: Chunk, version: int) -> list[tuple[Request, Completion]]:
        finished = []
        # a slot samples from the first step on until it ends, so a count says which steps
        counts = chunk.sampled.sum(0).tolist()
        ended = (chunk.remaining == 0).tolist()
        tokens, logprobs = chunk.tokens.T.copy(), chunk.logprobs.T.copy()
        for slot, live in list(self._live.items()):
            count = counts[slot]
            live.tokens.append(tokens[slot, :count])
            live.logprobs.append(logprobs[slot, :count])
            live.versions.append(version)
            live.length += count
            if ended[slot]:
                del self._live[slot]
                finished.append((live.request, _completion(live)))
        return finished

    def _split_slots(self, steps: int) -> tuple[Slots, KVCache]:
        """The slots with as much of the cache as `steps` more tokens of every sequence need, and the rest."""
        longest = max(live.length for live in self._live.values())
        needed, rest = split_cache(self._slots.cache, longest + steps)
        return replace(self._slots, cache=needed), rest


def _with_cache(slots: Slots, rest: KVCache) -> Slots:
    """Slots whose cache was split, whole again."""
    return replace(slots, cache=join_cache(slots.cache, rest))


def _completion(live: _Live) -> Completion:
    tokens = np.concatenate(live.tokens)
    stopped = int(tokens[-1]) in live.request.params.stop_ids
    return Completion(
        tokens=tokens,
        sampler_logprobs=np.concatenate(live.logprobs),
        versions=np.repeat(np.array(live.versions, np.int32), [len(part) for part in live.tokens]),
        finish=Finish.STOP if stopped else Finish.LENGTH,
        sample_index=live.sample_index,
    )


def _pad_prompts(
    entering: Sequence[tuple[int, Request, int]], max_prompt_tokens: int
) -> _Prefilled:
    """Each distinct prompt once, in shapes padded to powers of two."""
    distinct = list({request.stream: request for _, request, _ in entering}.values())
    longest = max(len(request.prompt) for request in distinct)
    columns = min(_bucket(longest, SMALLEST_BUCKET), max_prompt_tokens)
    prompts = np.zeros((prompt_bucket(len(distinct)), columns), np.int32)
    lengths = np.ones(len(prompts), np.int32)
    for row, request in enumerate(distinct):
        prompts[row, : len(request.prompt)] = request.prompt
        lengths[row] = len(request.prompt)
    row_of = {request.stream: row for row, request in enumerate(distinct)}
    return _Prefilled(None, prompts, lengths, row_of)


def prompt_bucket(prompts: int) -> int:
    """Rows that a prefill of so many prompts has."""
    return _bucket(prompts, 1)


def _bucket(number: int, smallest: int) -> int:
    """The smallest power-of-two multiple of `smallest` that holds `number`."""
    return smallest << (-(-number // smallest) - 1).bit_length()
