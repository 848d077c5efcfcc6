"""Continuous batching over fixed slots: the host side of sampling. Single-threaded; its caller drives it.

    submit(request)                 any number of samples of one prompt, queued
    run_chunk(snapshot)             1 free slots take queued samples; a prompt is prefilled once and its
                                      keys and values are copied to every slot that samples it
                                    2 one jitted loop of decode steps over all slots
                                    3 finished completions are returned, their slots are free again
Weights may change between two chunks; each token keeps the version that produced it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl.observe import Observer
from jaxrl.rollout.sampling import (
    Admission,
    Chunk,
    Slots,
    admit,
    decode_chunk,
    empty_slots,
    recompute_cache,
)
from jaxrl.tracing import num_traces
from jaxrl.types import Completion, Finish, Snapshot
from models.cache import KEY_BLOCK
from models.config import ModelConfig
from models.decoder import prefill
from models.sharding import cache_shardings

SMALLEST_BUCKET = 8
"""Prompt lengths and prompt counts are padded to powers of two from here (counts from 1)."""
KV_BUCKETS = 4
"""Attention reads one of this many prefixes of the cache: the shortest that holds every live sequence."""


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
    tokens: list[np.ndarray]
    logprobs: list[np.ndarray]
    versions: list[np.ndarray]
    length: int  # prompt and generated tokens


@dataclass(frozen=True, slots=True)
class _Prefilled:
    """Prompts whose keys and values are on the device, under the weights in use."""

    keys_values: tuple[jax.Array, jax.Array]
    prompts: jax.Array
    lengths: jax.Array
    row_of: dict[int, int]  # stream -> row


class RolloutEngine:
    """Samples completions for queued requests, `num_slots` sequences at a time."""

    def __init__(
        self, config: ModelConfig, mesh: Mesh, *, num_slots: int, max_prompt_tokens: int,
        max_new_tokens: int, chunk_steps: int, num_stop_ids: int, dtype: jnp.dtype, seed: int,
        kv_on_swap: str = "keep", observer: Observer,
    ) -> None:  # fmt: skip
        self.num_slots = num_slots
        self._mesh = mesh
        self.max_prompt_tokens = max_prompt_tokens
        self.max_tokens = max_prompt_tokens + max_new_tokens
        self.chunk_steps = chunk_steps
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
            num_stop_ids=num_stop_ids, dtype=dtype,
        )  # fmt: skip
        shardings = _slot_shardings(config, mesh, jax.eval_shape(slots))
        self._slots = jax.jit(slots, out_shardings=shardings)()
        self._prefill = jax.jit(partial(prefill, dtype=dtype))
        self._admit = jax.jit(admit, donate_argnums=(0,), out_shardings=shardings)
        self._decode = jax.jit(
            partial(decode_chunk, dtype=dtype),
            static_argnames=("steps", "kv_limit", "filtered", "greedy"),
            donate_argnums=(1,),
            out_shardings=(shardings, self._host),
        )
        self._recompute = jax.jit(
            partial(recompute_cache, dtype=dtype),
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

    def run_chunk(self, snapshot: Snapshot) -> list[tuple[Request, Completion]]:
        """Refill free slots, decode one chunk with these weights, return what finished."""
        with jax.set_mesh(self._mesh):
            self._swap_to(snapshot)
            self._refill(snapshot)
            if not self._live:
                return []
            chunk = self._decode_live(snapshot)
        return self._collect(chunk, snapshot.version)

    # -- steps of run_chunk ------------------------------------------------------------------------

    def _swap_to(self, snapshot: Snapshot) -> None:
        if snapshot.version == self._version:
            return
        self._kept = None  # prefilled under the old weights
        if self._recomputes and self._live and self._version is not None:
            longest = max(live.length for live in self._live.values())
            self._slots = self._recompute(
                snapshot.policy, self._slots, tokens=self._kv_limit(longest)
            )
        self._version = snapshot.version

    def _refill(self, snapshot: Snapshot) -> None:
        free = [slot for slot in range(self.num_slots) if slot not in self._live]
        entering = [(slot, *self._queue.popleft()) for slot in free[: len(self._queue)]]
        if not entering:
            return
        traced = self.trace_count
        with self._observer.prefill(version=snapshot.version) as work:
            kept = self._kept
            known = [e for e in entering if kept is not None and e[1].stream in kept.row_of]
            new = [e for e in entering if kept is None or e[1].stream not in kept.row_of]
            if kept is not None and known:
                self._enter(kept, known)
            work.update(samples=len(entering), prompts=0, tokens=0)
            if new:
                kept = self._prefill_prompts(snapshot, [request for _, request, _ in new])
                self._enter(kept, new)
                work.update(prompts=kept.prompts.shape[0], tokens=kept.prompts.shape[1])
            jax.block_until_ready(self._slots.positions)
            work["compiled"] = self.trace_count - traced
        waits = self._queue and kept is not None and self._queue[0][0].stream in kept.row_of
        self._kept = kept if waits else None

    def _prefill_prompts(self, snapshot: Snapshot, requests: Sequence[Request]) -> _Prefilled:
        """Prefill each distinct prompt once, in shapes padded to powers of two."""
        distinct = list({request.stream: request for request in requests}.values())
        rows = _bucket(len(distinct), 1)
        longest = max(len(request.prompt) for request in distinct)
        columns = min(_bucket(longest, SMALLEST_BUCKET), self.max_prompt_tokens)
        prompts = np.zeros((rows, columns), np.int32)
        lengths = np.ones(rows, np.int32)
        for row, request in enumerate(distinct):
            prompts[row, : len(request.prompt)] = request.prompt
            lengths[row] = len(request.prompt)
        on_device, on_device_lengths = jax.device_put((prompts, lengths), self._host)
        return _Prefilled(
            keys_values=self._prefill(snapshot.policy, on_device),
            prompts=on_device,
            lengths=on_device_lengths,
            row_of={request.stream: row for row, request in enumerate(distinct)},
        )

    def _enter(self, source: _Prefilled, entering: Sequence[tuple[int, Request, int]]) -> None:
        """Copy prompts into slots and start their samples."""
        size = _bucket(len(entering), SMALLEST_BUCKET)
        stop_ids = np.full((size, self._num_stop_ids), -1, np.int32)
        streams = np.zeros((size, 2), np.uint32)
        slots = np.full(size, self.num_slots, np.int32)  # past the end: dropped
        rows, max_new, top_k = (np.zeros(size, np.int32) for _ in range(3))
        temperature, top_p = np.ones(size, np.float32), np.ones(size, np.float32)
        for i, (slot, request, sample_index) in enumerate(entering):
            params = request.params
            slots[i], rows[i] = slot, source.row_of[request.stream]
            streams[i] = request.stream, sample_index
            max_new[i], top_k[i] = params.max_new_tokens, params.top_k
            temperature[i], top_p[i] = params.temperature, params.top_p
            stop_ids[i, : len(params.stop_ids)] = params.stop_ids
            self._live[slot] = _Live(request, sample_index, [], [], [], len(request.prompt))
        admission = Admission(
            slots=slots, rows=rows, stream=streams, max_new_tokens=max_new,
            temperature=temperature, top_p=top_p, top_k=top_k, stop_ids=stop_ids,
        )  # fmt: skip
        self._slots = self._admit(
            self._slots, source.keys_values, source.prompts, source.lengths,
            jax.device_put(admission, self._host), self._root,
        )  # fmt: skip

    def _decode_live(self, snapshot: Snapshot) -> Chunk:
        params = [live.request.params for live in self._live.values()]
        longest = max(live.length for live in self._live.values())
        kv_limit = self._kv_limit(longest + self.chunk_steps)
        traced = self.trace_count
        with self._observer.decode(version=snapshot.version) as work:
            self._slots, on_device = self._decode(
                snapshot.policy,
                self._slots,
                steps=self.chunk_steps,
                kv_limit=kv_limit,
                filtered=any(p.top_p < 1 or p.top_k > 0 for p in params),
                greedy=any(p.temperature == 0 for p in params),
            )
            chunk: Chunk = jax.device_get(on_device)
            work.update(
                kv_len=kv_limit,
                steps=int(chunk.steps),
                tokens=int(chunk.sampled.sum()),
                compiled=self.trace_count - traced,
            )
        return chunk

    def _collect(self, chunk: Chunk, version: int) -> list[tuple[Request, Completion]]:
        finished = []
        for slot, live in list(self._live.items()):
            sampled = chunk.sampled[:, slot]
            tokens = chunk.tokens[sampled, slot]
            live.tokens.append(tokens)
            live.logprobs.append(chunk.logprobs[sampled, slot])
            live.versions.append(np.full(len(tokens), version, np.int32))
            live.length += len(tokens)
            if chunk.remaining[slot] == 0:
                del self._live[slot]
                finished.append((live.request, _completion(live)))
        return finished

    def _kv_limit(self, longest: int) -> int:
        capacity = self._slots.cache.max_tokens
        bucket = -(-capacity // (KV_BUCKETS * KEY_BLOCK)) * KEY_BLOCK
        return min(-(-longest // bucket) * bucket, capacity)


def _completion(live: _Live) -> Completion:
    tokens = np.concatenate(live.tokens)
    stopped = int(tokens[-1]) in live.request.params.stop_ids
    return Completion(
        tokens=tokens,
        sampler_logprobs=np.concatenate(live.logprobs),
        versions=np.concatenate(live.versions),
        finish=Finish.STOP if stopped else Finish.LENGTH,
        sample_index=live.sample_index,
    )


def _bucket(number: int, smallest: int) -> int:
    """The smallest power-of-two multiple of `smallest` that holds `number`."""
    return smallest << (-(-number // smallest) - 1).bit_length()


def _slot_shardings(config: ModelConfig, mesh: Mesh, shapes: Slots) -> Slots:
    """Slots over the data axis, kv heads over the tensor axis."""
    per_slot = NamedSharding(mesh, PartitionSpec("data"))
    cache = cache_shardings(config, mesh)
    return Slots(
        cache=cache, tokens=per_slot, positions=per_slot, remaining=per_slot, keys=per_slot,
        temperature=per_slot, top_p=per_slot, top_k=per_slot, stop_ids=per_slot,
    )  # fmt: skip
