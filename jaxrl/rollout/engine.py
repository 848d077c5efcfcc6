"""Continuous batching over fixed slots: the host side of sampling. Single-threaded; its caller drives it.

    submit(request)                 any number of samples of one prompt, queued
    run_chunk(snapshot)             1 all slots if samples wait; the last ones are gathered into fewer
                                    2 free slots take queued samples; a prompt is prefilled once and its
                                      keys and values are copied to every slot that samples it, or to a row
                                      that these slots share
                                    3 new weights are laid out for decoding once, and one jitted loop of
                                      decode steps runs over the slots; it ends early when samples wait and
                                      idle slots have cost as much as refilling them will
                                    4 finished completions are returned, their slots are free again
Weights may change between two chunks; each token keeps the version that produced it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl.attention import ON_CPU, Programs
from jaxrl.observe import Observer
from jaxrl.rollout.admission import (
    Entering,
    Prefilled,
    Request,
    SamplingParams,
    admission_of,
    pad_prompts,
    seats_of,
)
from jaxrl.rollout.laid_out import LaidOut
from jaxrl.rollout.narrow import (
    Tail,
    fitting_width,
    moved_slots,
    new_slots,
    take_rows,
    widths_of,
)
from jaxrl.rollout.prefix_rows import RowTable
from jaxrl.rollout.samples import Live
from jaxrl.rollout.sampling import (
    Chunk,
    Rest,
    Slots,
    admit,
    decode_chunk,
    empty_slots,
    parts_pay,
    recompute_cache,
    slot_shardings,
    split_slots,
    whole_slots,
)
from jaxrl.tracing import num_traces
from jaxrl.types import Completion, Snapshot
from models.compiler_options import decode_options
from models.config import ModelConfig
from models.decoder import prefill
from models.rows import PrefixRows

__all__ = ["NO_BUDGET", "Request", "RolloutEngine", "SamplingParams"]

NO_BUDGET = np.iinfo(np.int32).max
"""Idle slot-steps when there is nothing to refill slots with."""


class RolloutEngine:
    """Samples completions for queued requests, `num_slots` sequences at a time."""

    def __init__(
        self, config: ModelConfig, mesh: Mesh, *, num_slots: int, max_prompt_tokens: int,
        max_new_tokens: int, chunk_steps: int, refill_cost_steps: float, num_stop_ids: int,
        dtype: jnp.dtype, seed: int, kv_on_swap: str = "keep", observer: Observer,
        cache_dtype: jnp.dtype | None = None, programs: Programs = ON_CPU,
        prefixes: PrefixRows | None = None, narrow_tail: bool = True,
    ) -> None:  # fmt: skip
        """cache_dtype: None, as `dtype`. prefixes: rows for prompts that slots share; the mesh divides them
        as it divides the slots. None: every slot has its own copy. narrow_tail: the last samples are decoded
        on fewer slots (`jaxrl.rollout.narrow`)."""
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
        self._live: dict[int, Live] = {}
        self._kept: Prefilled | None = None
        self._own_tokens = self.max_tokens if prefixes is None else max_new_tokens
        self._devices = mesh.shape["data"] * mesh.shape["fsdp"]  # that divide the slots
        self._rows = None if prefixes is None else RowTable(prefixes, num_slots, self._devices)
        each = num_slots // self._devices
        self._widths = widths_of(each) if narrow_tail else (each,)
        self._read = self._wasted = 0.0  # of `narrow.Tail`
        self._version: int | None = None

        slots = partial(
            empty_slots, config, num_slots=num_slots, max_tokens=self._own_tokens,
            num_stop_ids=num_stop_ids, cache_dtype=cache_dtype or dtype, attention=programs.decode,
            prefixes=prefixes,
        )  # fmt: skip
        shardings = slot_shardings(config, mesh, shares=prefixes is not None)
        self.places = shardings  # of `slots`, a tree prefix
        self._slots = jax.jit(slots, out_shardings=shardings)()
        self._prefill = jax.jit(partial(prefill, dtype=dtype, attention=programs.prompts))
        self._admit = jax.jit(admit, donate_argnums=(0,), out_shardings=shardings)
        self._decode = jax.jit(
            partial(decode_chunk, dtype=dtype, attention=programs.decode),
            static_argnames=("steps", "filtered", "greedy"),
            donate_argnums=(2,),
            out_shardings=(shardings, self._host),
            compiler_options=decode_options(mesh.devices.flat[0]),
        )
        self.weights = LaidOut(config, mesh, dtype)
        self._idle = jax.jit(
            lambda remaining, freed: jnp.where(freed, 0, remaining),
            out_shardings=shardings.remaining,
        )
        # partial: a function of this engine alone, so that its traces are counted alone
        self._take = jax.jit(partial(take_rows), static_argnames=("place",))
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
        """State of the slots that are decoded now."""
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
        return num_traces(
            self._prefill, self._admit, self.weights.program, self._decode, self._recompute, self._take
        )  # fmt: skip

    def submit(self, request: Request) -> None:
        """Queue the samples of a request."""
        if not 1 <= len(request.prompt) <= self.max_prompt_tokens:
            raise ValueError(
                f"prompt of {len(request.prompt)} tokens; this engine takes 1 to {self.max_prompt_tokens}; "
                "raise rollout.max_prompt_tokens"
            )
        room = min(self._own_tokens, self.max_tokens - len(request.prompt))
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
        tokens = sum(sum(map(len, self._release(slot).tokens)) for slot in freed)
        if freed:
            flags = np.isin(np.arange(self._width), freed)
            remaining = self._idle(self._slots.remaining, jax.device_put(flags, self._host))
            self._slots = replace(self._slots, remaining=remaining)
        return len(queued) + len(freed), tokens

    def free(self) -> None:
        """Give the slots' memory back; the engine is of no use afterwards."""
        for leaf in jax.tree.leaves((self._slots, self.weights.layers)):
            leaf.delete()

    def run_chunk(
        self, snapshot: Snapshot, *, more_waits: bool = False
    ) -> list[tuple[Request, Completion]]:
        """Refill free slots, decode one chunk with these weights, return what finished.

        `more_waits`: the caller could submit more at once, so idle slots are worth a refill.
        """
        with jax.set_mesh(self._mesh):
            self._fit(more_waits)
            self._swap_to(snapshot)
            self._refill(snapshot)
            if not self._live:
                return []
            chunk = self._decode_live(snapshot, more_waits or bool(self._queue))
        finished = self._collect(chunk, snapshot.version)
        if self.is_idle:
            self.weights.drop()  # an engine that waits, as the evaluation's does, holds no copy
        return finished

    # -- steps of run_chunk ------------------------------------------------------------------------

    def _fit(self, more_waits: bool) -> None:
        """All slots for samples that wait; the last ones go where the rule of `jaxrl.rollout.narrow` says."""
        if self._queue or more_waits or not self._live:
            self._wasted = 0.0
            if self._queue:
                self._move_to(self._widths[0])
            return
        width, live = self._width // self._devices, self._live.values()
        tail = Tail(
            width=width, live=max(Counter(slot // width for slot in self._live).values()),
            steps=max(one.steps_left for one in live), read=self._read, wasted=self._wasted,
        )  # fmt: skip
        self._move_to(fitting_width(self._widths, tail))

    def _move_to(self, width: int) -> None:
        """Give each device so many slots, with the live samples in the first ones."""
        present = self._width // self._devices
        if width == present:
            return
        names, sources = new_slots(self._live, present, width, self._devices)
        rows = None
        if self._rows is not None:
            self._rows, rows = self._rows.moved(names, len(sources))
        self._slots = moved_slots(self._slots, sources, rows, self._take)
        self._live = {names[slot]: live for slot, live in self._live.items()}
        self._wasted = 0.0

    def _swap_to(self, snapshot: Snapshot) -> None:
        if snapshot.version == self._version:
            return
        self._kept = None  # prefilled under the old weights
        if self._rows is not None:
            self._rows.forget()
        if self._recomputes and self._live and self._version is not None:
            needed, rest = self._split_slots(0)
            tokens = needed.cache.max_tokens
            if needed.prefixes is not None:
                tokens += needed.prefixes.cache.max_tokens
            self._slots = whole_slots(self._recompute(snapshot.policy, needed, tokens=tokens), rest)
        self._version = snapshot.version

    def _refill(self, snapshot: Snapshot) -> None:
        free = [slot for slot in range(self._width) if slot not in self._live]
        if self._rows is not None:
            self._refill_sharing(snapshot, self._rows, free)
            return
        entering = [Entering(slot, *self._queue.popleft()) for slot in free[: len(self._queue)]]
        if not entering:
            return
        kept = self._kept
        known = [e for e in entering if kept is not None and e.request.stream in kept.row_of]
        new = [e for e in entering if kept is None or e.request.stream not in kept.row_of]
        if kept is not None and known:
            self._enter(snapshot, known, kept)
        if new:
            kept = self._enter(snapshot, new)
        waits = self._queue and kept is not None and self._queue[0][0].stream in kept.row_of
        self._kept = kept if waits else None

    def _refill_sharing(self, snapshot: Snapshot, rows: RowTable, free: Sequence[int]) -> None:
        """Samples enter in turn; the first without a row for its prompt waits, and the others behind it."""
        entering: list[Entering] = []
        for slot in free:
            seat = rows.seat(self._queue[0][0].stream, slot) if self._queue else None
            if seat is not None:
                entering.append(Entering(slot, *self._queue.popleft(), *seat))
        filling = {one.request.stream for one in entering if one.fills}
        for fills in (False, True):
            some = [one for one in entering if (one.request.stream in filling) == fills]
            if some:
                self._enter(snapshot, some)

    def _enter(
        self, snapshot: Snapshot, entering: Sequence[Entering], kept: Prefilled | None = None
    ) -> Prefilled:
        """Start samples of prompts that are `kept`, or are prefilled, and copied to where slots read them."""
        source = kept or pad_prompts(entering, self.max_prompt_tokens, self._devices)
        admission = admission_of(
            source.row_of, entering, num_slots=self.num_slots, num_stop_ids=self._num_stop_ids
        )
        seats, copies = None, len(entering)
        if self._rows is not None:
            seats, copies = seats_of(source.row_of, entering, self._rows.members)
            seats = jax.device_put(seats, self._host)
        traced, rows = self.trace_count, 0
        with self._observer.prefill(version=snapshot.version) as work:
            if source.keys_values is None:
                prompts, lengths = jax.device_put((source.prompts, source.lengths), self._host)
                made = None
                if copies:
                    rows, made = prompts.shape[0], self._prefill(snapshot.policy, prompts)
                source = Prefilled(made, prompts, lengths, source.row_of)
            self._slots = self._admit(
                self._slots, source.keys_values, source.prompts, source.lengths,
                jax.device_put(admission, self._host), self._root, seats,
            )  # fmt: skip
            jax.block_until_ready(self._slots.positions)
            work.update(
                prompts=rows, tokens=source.prompts.shape[1], samples=copies,
                compiled=self.trace_count - traced,
            )  # fmt: skip
        for one in entering:
            length = len(one.request.prompt)
            start = 0 if self._rows is None else length - 1
            self._live[one.slot] = Live(one.request, one.sample_index, length, start)
        return source

    def _decode_live(self, snapshot: Snapshot, more_waits: bool) -> Chunk:
        params = [live.request.params for live in self._live.values()]
        needed, rest = self._split_slots(self.chunk_steps)
        traced = self.trace_count
        with self._observer.decode(version=snapshot.version) as work:
            slots, on_device = self._decode(
                snapshot.policy, self.weights.of(snapshot), needed,
                np.int32(self._refill_cost if more_waits and self._has_room else NO_BUDGET),
                steps=self.chunk_steps,
                filtered=any(p.top_p < 1 or p.top_k > 0 for p in params),
                greedy=any(p.temperature == 0 for p in params),
            )  # fmt: skip
            self._slots = whole_slots(slots, rest)
            chunk: Chunk = jax.device_get(on_device)
            work.update(
                slots=self._width, kv_len=needed.cache.max_tokens, steps=int(chunk.steps),
                tokens=int(chunk.sampled.sum()), compiled=self.trace_count - traced,
            )  # fmt: skip
            if needed.prefixes is not None:
                work["prefix_rows"] = needed.prefixes.members.shape[0]
                work["prefix_len"] = needed.prefixes.cache.max_tokens
        idle = chunk.steps * self._width - chunk.sampled.sum()
        self._read = needed.cache.max_tokens / self._slots.cache.max_tokens
        self._wasted += float(idle) / self._devices * self._read
        return chunk

    def _collect(self, chunk: Chunk, version: int) -> list[tuple[Request, Completion]]:
        finished = []
        # a slot samples from the first step on until it ends, so a count says which steps
        counts = chunk.sampled.sum(0).tolist()
        ended = (chunk.remaining == 0).tolist()
        tokens, logprobs = chunk.tokens.T.copy(), chunk.logprobs.T.copy()
        for slot, live in list(self._live.items()):
            count = counts[slot]
            live.add(tokens[slot, :count], logprobs[slot, :count], version)
            if ended[slot]:
                self._release(slot)
                finished.append((live.request, live.completion()))
        return finished

    @property
    def _width(self) -> int:
        """Slots that are decoded now."""
        return self._slots.positions.shape[0]

    @property
    def _has_room(self) -> bool:
        """Whether a slot that falls free could take a waiting sample."""
        rows = self._rows
        if rows is None or rows.has_room:
            return True
        return bool(self._queue) and rows.has_lane(self._queue[0][0].stream)

    def _release(self, slot: int) -> Live:
        """Take the sample out of its slot, and out of the row it shares."""
        if self._rows is not None:
            self._rows.leave(slot)
        return self._live.pop(slot)

    def _split_slots(self, steps: int) -> tuple[Slots, Rest]:
        """The slots with as much of the caches as `steps` more tokens of every sequence need, and the rest."""
        alive = self._live.values()
        if not parts_pay(self._slots.cache, self._devices, self.weights.nbytes):
            return split_slots(self._slots, self._own_tokens, self.max_prompt_tokens)
        own = max(live.length - live.start for live in alive) + steps
        return split_slots(self._slots, own, max(1, *(live.start for live in alive)))
