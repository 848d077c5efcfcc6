"""Programs like the trainer's, at one shape each, beside what they cost.

They repeat the trainer's structure (one jitted loop of sampling steps, one packed micro-batch
forward and backward with the gradient added to a donated accumulator, AdamW after a global norm,
cast and copy) and its compiler options, because fixed times and fusion decide the speed of small models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models.attention import DecodeAttention, decode_by_structure, rows_by_structure
from models.cache import KVCache, init_cache, insert_prompts
from models.compiler_options import decode_options, train_options
from models.config import ModelConfig
from models.decoder import (
    Decoder,
    Policy,
    abstract_decoder,
    decode_step,
    hidden_states,
    prefill,
)
from models.fused import FusedLayer, can_view, fused, split_layers
from models.head import head_logits, target_logprobs
from models.rows import RowAttention
from roofline import cost
from roofline.calibrate.timing import Device, Run, caller, replacer
from roofline.kernels import Layout
from roofline.machine import Workload
from roofline.phases import PhaseCost


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A program at one shape."""

    name: str
    cost: PhaseCost
    make: Callable[[], Run]
    """Compiles; what it returns runs the program once and waits."""
    held_out: bool = False
    """True: not fitted, but used to check the fit."""


def probes(
    model: ModelConfig, w: Workload, device: Device, *, thorough: bool = False
) -> list[Probe]:
    """Programs in the order in which they matter.

    A run's micro-batches and slots never change shape, so these shapes suffice for it; `thorough`
    adds others, fitted and held out, which show how far the fit carries.
    """
    half_rows, half_tokens = max(1, w.rows // 2), max(2, w.row_tokens // 2)
    quarter, kv_half = max(1, w.slots // 4), max(2, w.kv_len // 2)
    make = _Maker(model, w, device)
    needed = [
        make.train(w.rows, w.row_tokens),
        make.decode(w.slots, w.kv_len),
        make.optimizer(),
        make.publish(),
        make.decode(w.slots, kv_half),
        make.prefill(quarter, kv_half),
    ]
    if w.reference or thorough:
        needed.append(make.score(w.rows, w.row_tokens))
    if not thorough:
        return _distinct(needed)
    more = [
        make.decode(quarter, w.kv_len),
        make.train(half_rows, half_tokens),
        make.score(half_rows, half_tokens),
        make.train(max(1, w.rows // 4), w.row_tokens),
        make.score(max(1, w.rows // 4), w.row_tokens),
        make.decode(max(1, w.slots // 2), max(2, 3 * w.kv_len // 4), held_out=True),
        make.train(half_rows, w.row_tokens, held_out=True),
        make.score(half_rows, w.row_tokens, held_out=True),
        make.prefill(max(1, quarter // 2), w.kv_len, held_out=True),
    ]
    return _distinct([*needed, *more])


def _distinct(several: Sequence[Probe]) -> list[Probe]:
    """The first of each cost: shapes that the cache's blocks round to the same are the same."""
    first: dict[PhaseCost, Probe] = {}
    for probe in several:
        first.setdefault(probe.cost, probe)
    return list(first.values())


def lane_mate(model: ModelConfig, w: Workload, device: Device) -> Run:
    """A program of the learner's kind on `device`: half a micro-batch forward."""
    return _Maker(model, w, device).score(max(1, w.rows // 2), w.row_tokens).make()


class _Maker:
    """Makes probes of one model on one device; the weights are shared between them."""

    def __init__(self, model: ModelConfig, workload: Workload, device: Device) -> None:
        self.model, self.workload, self.device = model, workload, device
        self.dtype = jnp.dtype(workload.dtype)
        kind = workload.dtype
        self.rows: RowAttention = rows_by_structure(device, self.dtype, model.head_size)
        self.cached: DecodeAttention = decode_by_structure(device)
        self.learner = Layout(compute_dtype=kind, kv_dtype=kind, attention=self.rows)
        self.rollout = replace(self.learner, param_dtype=kind)
        self.policy = jax.device_put(random_weights(model), device)
        cast = jax.tree.map(lambda x: x.astype(self.dtype), self.policy)
        self.snapshot: Policy = fused(cast) if can_view(model, device, 1) else cast

    def decode(self, slots: int, kv_len: int, *, held_out: bool = False) -> Probe:
        steps = self.workload.chunk_steps
        work = cost.decode(self.model, self.rollout, slots, kv_len, steps)

        def make() -> Run:
            with jax.default_device(self.device):
                cache = init_cache(self.model, slots, kv_len, self.dtype, self.cached)
                zeros = jnp.zeros(slots, jnp.int32)
                program = decode_program(self.device, self.cached, steps, kv_len, self.dtype)
                layers = jax.jit(split_layers)(self.snapshot)
                arguments = (self.snapshot, layers, jax.random.key(1))
                compiled = program.lower((cache, zeros, zeros + 1), *arguments).compile()
                return replacer(compiled, (cache, zeros, zeros + 1), *arguments)

        return Probe(name=f"decode {slots}x{kv_len}", cost=work, make=make, held_out=held_out)

    def prefill(self, rows: int, tokens: int, *, held_out: bool = False) -> Probe:
        samples = min(self.workload.slots, 4 * rows)
        work = cost.prefill(self.model, self.rollout, rows, tokens, samples)

        def make() -> Run:
            with jax.default_device(self.device):
                prompts = np.ones((rows, tokens), np.int32)
                at = [np.arange(samples, dtype=np.int32) % rows, np.arange(samples, dtype=np.int32)]
                program = jax.jit(partial(prefill, dtype=self.dtype, attention=self.rows))
                run = program.lower(self.snapshot, prompts).compile()
                cache = init_cache(self.model, self.workload.slots, tokens, self.dtype, self.cached)
                keys, values = run(self.snapshot, jax.device_put(prompts, self.device))
                insert = jax.jit(insert_prompts, donate_argnums=0)
                enter = insert.lower(cache, keys, values, *at).compile()

            def refill(cache: KVCache) -> KVCache:
                made = run(self.snapshot, jax.device_put(prompts, self.device))
                return enter(cache, *made, *jax.device_put(at, self.device))

            return replacer(refill, cache)

        return Probe(name=f"prefill {rows}x{tokens}", cost=work, make=make, held_out=held_out)

    def score(self, rows: int, tokens: int, *, held_out: bool = False) -> Probe:
        chunk = self.workload.chunk_tokens
        work = cost.score(self.model, self.learner, tokens, rows, chunk_tokens=chunk)

        def make() -> Run:
            with jax.default_device(self.device):
                program = jax.jit(
                    partial(scores, w=self.workload, attention=self.rows),
                    compiler_options=train_options(self.device),
                )
                batch = packed(rows, tokens)
                return caller(program.lower(self.policy, batch).compile(), self.policy, batch)

        return Probe(name=f"score {rows}x{tokens}", cost=work, make=make, held_out=held_out)

    def train(self, rows: int, tokens: int, *, held_out: bool = False) -> Probe:
        w = self.workload
        work = cost.train(
            self.model, self.learner, tokens, rows, remat=w.remat, chunk_tokens=w.chunk_tokens
        )

        def make() -> Run:
            with jax.default_device(self.device):
                gradients = jax.tree.map(jnp.zeros_like, self.policy)
                arguments = (self.policy, packed(rows, tokens), jnp.ones((rows, tokens)))
                program = jax.jit(
                    partial(accumulate, w=w, attention=self.rows),
                    donate_argnums=0,
                    compiler_options=train_options(self.device),
                )
                compiled = program.lower(gradients, *arguments).compile()
                return replacer(compiled, gradients, *arguments)

        return Probe(name=f"train {rows}x{tokens}", cost=work, make=make, held_out=held_out)

    def optimizer(self) -> Probe:
        def make() -> Run:
            with jax.default_device(self.device):
                adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-9))
                policy = jax.tree.map(jnp.copy, self.policy)
                gradients = jax.tree.map(jnp.ones_like, policy)
                program = jax.jit(partial(apply, optimizer=adamw), donate_argnums=0)
                with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer counts
                    state = (policy, adamw.init(policy))
                    return replacer(program.lower(state, gradients).compile(), state, gradients)

        return Probe(name="optimizer", cost=cost.optimizer(self.model, self.learner), make=make)

    def publish(self) -> Probe:
        work = cost.publish(self.model, self.learner, self.rollout)
        views = can_view(self.model, self.device, 1)

        @jax.jit
        def cast(policy: Decoder) -> Policy:
            copy = jax.tree.map(lambda x: jnp.array(x, dtype=self.dtype, copy=True), policy)
            return fused(copy) if views else copy

        others = [d for d in jax.devices(self.device.platform) if d != self.device]
        target = others[0] if others else self.device

        def make() -> Run:
            return caller(lambda: jax.device_put(cast(self.policy), target))

        return Probe(name="publish", cost=work, make=make)


def random_weights(model: ModelConfig) -> Decoder:
    """Normal matrices and unit norms, made on the host: far quicker than compiling initialisers."""
    draw = np.random.default_rng(0)

    def fill(array: jax.ShapeDtypeStruct) -> np.ndarray:
        values = draw.standard_normal(array.shape, np.float32) * model.width**-0.5
        return values if len(array.shape) > 2 else np.ones_like(values)

    return jax.tree.map(fill, abstract_decoder(model))


def packed(rows: int, tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, positions and segments [rows, tokens] of rows that hold one sequence each."""
    positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (rows, tokens))
    return jnp.ones_like(positions), positions, jnp.ones_like(positions)


def decode_program(
    device: Device, attention: DecodeAttention, steps: int, kv_len: int, dtype: Any
) -> Any:
    """`decode_chunk` jitted with the options that the trainer's has on `device`: on a GPU its loop is part
    of the CUDA graph."""
    return jax.jit(
        partial(decode_chunk, steps=steps, kv_len=kv_len, dtype=dtype, attention=attention),
        donate_argnums=0,
        compiler_options=decode_options(device),
    )


def decode_chunk(
    state: tuple[Any, ...], policy: Policy, layers: tuple[FusedLayer, ...], key: jax.Array, *,
    steps: int, kv_len: int, dtype: Any, attention: DecodeAttention,
) -> tuple[Any, ...]:  # fmt: skip
    """`steps` sampled tokens for every slot: one uniform per slot and the inverse CDF. layers: those of
    `policy` by `split_layers`, laid out once as in a run."""
    slots = state[1].shape[0]

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        index, cache, tokens, positions, _ = carry
        hidden, cache = decode_step(
            policy, cache, tokens, positions, dtype=dtype, layers=layers, attention=attention
        )
        logprobs = jax.nn.log_softmax(head_logits(policy, hidden, dtype=dtype), axis=-1)
        keys = jax.vmap(partial(jax.random.fold_in, key))(positions * slots + jnp.arange(slots))
        total = jnp.cumsum(jnp.exp(logprobs), axis=-1)
        drawn = jax.vmap(jax.random.uniform)(keys)[:, None] * total[:, -1:]
        passed = jnp.sum(total <= drawn, axis=-1, dtype=jnp.int32)
        tokens = jnp.minimum(passed, logprobs.shape[1] - 1)
        chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
        return index + 1, cache, tokens, jnp.minimum(positions + 1, kv_len - 1), chosen

    start = (jnp.int32(0), *state, jnp.zeros(slots, jnp.float32))
    _, cache, tokens, positions, _ = jax.lax.while_loop(lambda c: c[0] < steps, step, start)
    return cache, tokens, positions


def scores(
    policy: Decoder, batch: tuple[Any, ...], *, w: Workload, attention: RowAttention
) -> tuple[Any, Any]:
    """Log-probabilities and entropies of one packed batch."""
    tokens, positions, segments = batch
    dtype, remat = jnp.dtype(w.dtype), w.remat == "block"
    hidden = hidden_states(
        policy, tokens, positions, segments, dtype=dtype, remat=remat, attention=attention
    )
    return target_logprobs(
        policy, hidden, tokens, temperature=1.0, chunk_tokens=w.chunk_tokens, dtype=dtype
    )


def accumulate(
    gradients: Decoder, policy: Decoder, batch: tuple[Any, ...], weights: jax.Array, *, w: Workload,
    attention: RowAttention,
) -> Decoder:  # fmt: skip
    """One micro-batch of a clipped policy loss, its gradient added to `gradients`."""

    def loss(policy: Decoder) -> jax.Array:
        logprobs, _ = scores(policy, batch, w=w, attention=attention)
        ratio = jnp.exp(logprobs - weights)
        clipped = jnp.clip(ratio, 0.8, 1.2)
        return -jnp.sum(jnp.minimum(ratio * weights, clipped * weights))

    return jax.tree.map(jnp.add, gradients, jax.grad(loss)(policy))


def apply(
    state: tuple[Any, Any], gradients: Any, *, optimizer: optax.GradientTransformation
) -> tuple[Any, Any]:
    """One AdamW step, skipped when the gradient norm is not finite."""
    finite = jnp.isfinite(optax.global_norm(gradients))

    def take(state: tuple[Any, Any]) -> tuple[Any, Any]:
        policy, moments = state
        updates, moments = optimizer.update(gradients, moments, policy)
        return optax.apply_updates(policy, updates), moments

    return jax.lax.cond(finite, take, lambda state: state, state)
