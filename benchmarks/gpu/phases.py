"""jaxrl's own programs, one phase at a time, ready to be measured. Random weights, made on the device.

What runs is what a training run runs: the rollout engine, the learner, the weight store; prefill and
scoring are jitted alone, because they are parts of those.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.cases import Case, Scale
from benchmarks.gpu.floors import decode_floor, model_flops, rows_floor
from benchmarks.gpu.measure import Prepared, Result, Stopwatch, seconds_of
from jaxrl.attention import Programs, Table, fastest, stored_name
from jaxrl.batch import Batch
from jaxrl.config import GrpoConfig, RolloutConfig
from jaxrl.learner.learner import Learner
from jaxrl.learner.optimizer import adamw, learning_rate
from jaxrl.learner.steps import ForwardSettings, score
from jaxrl.observe import Observer
from jaxrl.packing import TrainSequence, pack
from jaxrl.rollout.engine import Request, RolloutEngine, SamplingParams
from jaxrl.types import Snapshot
from jaxrl.weights import WeightStore
from models.attention import DecodeAttention, decode_by_structure, rows_by_structure
from models.config import ModelConfig
from models.decoder import Decoder, prefill
from models.rows import PrefixRows, RowAttention
from models.sharding import init_sharded, make_mesh
from roofline import cost
from roofline.kernels import Layout, stored_in
from roofline.phases import Phase, PhaseCost

SAMPLES_PER_PROMPT = 32
"""decode: so many slots hold samples of one prompt, which is prefilled once."""
STOPPING = ("cudnn", "pallas")
"""Programs of decode attention that read a slot's keys up to its own position; others read a prefix."""
RATE = 1e-6
"""Learning rate: real updates that leave random weights finite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """One model at one scale on the first device, and the objects that cases are made of."""

    scale: Scale
    name: str
    table: Table = dataclasses.field(default_factory=dict)
    """Programs of attention measured so far, as `jaxrl.attention` reads them; whole steps take the fastest."""

    @property
    def model(self) -> ModelConfig:
        """The architecture."""
        return self.scale.models[self.name]

    @property
    def dtype(self) -> Any:
        """Compute dtype."""
        return jnp.dtype(self.scale.dtype)

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """Learner and rollout share one device."""
        return make_mesh(jax.local_devices()[:1])

    @property
    def learner_layout(self) -> Layout:
        """Float32 parameters, products in the compute dtype."""
        return Layout(
            compute_dtype=self.scale.dtype, kv_dtype=self.scale.dtype, attention=self.row_program
        )

    @property
    def rollout_layout(self) -> Layout:
        """Everything in the compute dtype."""
        return dataclasses.replace(self.learner_layout, param_dtype=self.scale.dtype)

    def policy(self, dtype: Any) -> Decoder:
        """Fresh random weights, from the device's own generator, whose programs compile quickly."""
        return init_sharded(self.model, jax.random.key(0, impl="rbg"), self.mesh, dtype)

    def cache_layout(self, cache_dtype: str) -> Layout:
        """`rollout_layout` with keys and values in this type; empty: in the compute dtype."""
        return dataclasses.replace(
            self.rollout_layout, **stored_in(cache_dtype or self.scale.dtype)
        )

    def decode_program(self, slots: int, tokens: int) -> str:
        """The fastest one measured on this device at the nearest shape."""
        kind = self.mesh.devices.flat[0].device_kind
        found = fastest(self.table, kind, "decode", slots, tokens, get_args(DecodeAttention))
        return found or self.unmeasured_program

    @property
    def unmeasured_program(self) -> str:
        """What `rollout.attention=auto` takes on a device without measurements."""
        return decode_by_structure(self.mesh.devices.flat[0])

    @property
    def row_program(self) -> RowAttention:
        """What `model.attention=auto` takes on a device without measurements."""
        return rows_by_structure(self.mesh.devices.flat[0], self.dtype, self.model.head_size)

    def engine(
        self, *, slots: int, prompt_tokens: int, new_tokens: int, observer: Observer,
        attention: str = "", cache_dtype: str = "", prefixes: PrefixRows | None = None,
    ) -> RolloutEngine:  # fmt: skip
        """The sampling engine; no token stops a completion. attention: empty, the fastest one measured."""
        named = RolloutConfig(cache_dtype=cast("Any", cache_dtype or "auto"))
        stored = jnp.dtype(stored_name(named, self.scale.dtype))
        program = attention or self.decode_program(slots, prompt_tokens + new_tokens)
        return RolloutEngine(
            self.model, self.mesh, num_slots=slots, max_prompt_tokens=prompt_tokens,
            max_new_tokens=new_tokens, chunk_steps=self.scale.chunk_steps,
            refill_cost_steps=RolloutConfig().refill_cost_steps, num_stop_ids=1, dtype=self.dtype,
            seed=0, observer=observer, cache_dtype=stored, prefixes=prefixes,
            programs=Programs(
                prompts=self.row_program, decode=cast("DecodeAttention", program)
            ),
        )  # fmt: skip

    def learner(self, observer: Observer, *, remat: bool, attention: str = "") -> Learner:
        """The learner with AdamW and the GRPO defaults."""
        rate = learning_rate(peak=RATE, warmup_steps=0, steps=1, schedule="constant")
        optimizer = adamw(
            self.model, rate, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, max_grad_norm=1.0
        )
        return Learner(
            self.model, self.mesh, self.policy(jnp.float32), optimizer,
            forward=self.forward(remat=remat, attention=attention),
            grpo=GrpoConfig(drop_zero_advantage=False),
            max_nonfinite_steps=1, observer=observer,
        )  # fmt: skip

    def forward(self, *, remat: bool, attention: str = "") -> ForwardSettings:
        """How the learner runs the model."""
        return ForwardSettings(
            dtype=self.dtype, temperature=1.0, chunk_tokens=self.scale.chunk_tokens, remat=remat,
            attention=cast("RowAttention", attention or self.row_program),
        )  # fmt: skip

    def store(self) -> WeightStore:
        """Publishes from the learner to the rollout, on one device."""
        return WeightStore(
            self.model, learner_mesh=self.mesh, rollout_mesh=self.mesh, dtype=self.dtype
        )

    def prompts(self, count: int, tokens: int) -> list[tuple[int, ...]]:
        """Random prompts."""
        drawn = np.random.default_rng(0).integers(0, self.model.vocab_size, (count, tokens))
        return [tuple(map(int, row)) for row in drawn]

    def batch(self, rows: int, row_tokens: int) -> Batch:
        """Packed rows without padding: sequences of random tokens, the first half of each a prompt."""
        length = self.scale.sequence
        count = rows * (row_tokens // length)
        draw = np.random.default_rng(0)
        mask = np.arange(length) >= length // 2
        sequences = [
            TrainSequence(
                tokens=draw.integers(0, self.model.vocab_size, length, np.int32),
                loss_mask=mask,
                sampler_logprobs=np.where(mask, -np.log(self.model.vocab_size), 0).astype(
                    np.float32
                ),
                advantages=np.where(mask, draw.choice([-1.0, 1.0]), 0).astype(np.float32),
                token_weights=(mask / (mask.sum() * count)).astype(np.float32),
            )
            for _ in range(count)
        ]
        (batch,), stats = pack(sequences, row_tokens=row_tokens, rows_per_microbatch=rows)
        assert stats.padding_ratio == 0, stats
        return batch


def prepare(bench: Bench, case: Case) -> Prepared:
    """The case, ready to run. Raises: ValueError for a kind that is not a single phase."""
    makers: dict[str, Callable[[Bench, Case], Prepared]] = {
        "decode": decode_case, "prefill": prefill_case, "score": score_case, "train": train_case,
        "optimizer": optimizer_case, "publish": publish_case,
    }  # fmt: skip
    if case.kind not in makers:
        raise ValueError(f"{case.kind} is no single phase; those are {', '.join(makers)}")
    return makers[case.kind](bench, case)


def submit(
    engine: RolloutEngine, prompts: Sequence[tuple[int, ...]], *, group: int, new: int, stream: int
) -> None:
    """Queue `group` samples of each prompt, every one of `new` tokens; streams count from `stream`."""
    params = SamplingParams(max_new_tokens=new, stop_ids=())
    for i, prompt in enumerate(prompts):
        engine.submit(
            Request(
                stream=stream + i, prompt=prompt, sample_indices=tuple(range(group)), params=params
            )
        )


def decode_case(bench: Bench, case: Case) -> Prepared:
    """Whole decode chunks of the engine, slots full, the last tokens of a context of `tokens`.

    Three chunks follow a prefill; the first one, which refills the slots, is not timed.
    """
    slots, chunk = case.rows, bench.scale.chunk_steps
    new = 3 * chunk
    group, prompt = min(slots, SAMPLES_PER_PROMPT), case.tokens - new
    watch = Stopwatch()
    rows = PrefixRows(rows=slots // group, lanes=group, tokens=prompt) if case.shares else None
    program = case.attention or bench.unmeasured_program
    engine = bench.engine(
        slots=slots, prompt_tokens=prompt, new_tokens=new, observer=watch, cache_dtype=case.cache_dtype,
        attention=program, prefixes=rows,
    )  # fmt: skip
    snapshot = Snapshot(version=0, policy=bench.policy(bench.dtype))
    prompts = bench.prompts(slots // group, prompt)
    seen = {"stream": 0, "kv_len": case.tokens}

    def before() -> None:
        seen["stream"] += slots // group
        submit(engine, prompts, group=group, new=new, stream=seen["stream"])
        engine.run_chunk(snapshot)
        watch.take()

    def once() -> list[float]:
        while not engine.is_idle:
            engine.run_chunk(snapshot)
        spans = watch.take()
        assert all(s.work["tokens"] == slots * chunk for s in spans), spans
        seen["kv_len"] = spans[-1].work["kv_len"]
        return seconds_of(spans, Phase.DECODE)

    layout = bench.cache_layout(case.cache_dtype)
    mean = case.tokens - chunk  # keys of a slot, halfway through the two chunks

    def least() -> list[PhaseCost]:
        own = mean - (prompt if case.shares else 0)
        held = slots * own + (slots // group * prompt if case.shares else 0)
        return [decode_floor(bench.model, layout, slots, mean, chunk, held)]

    def done() -> list[PhaseCost]:
        read = mean if program in STOPPING else seen["kv_len"]
        return [cost.decode(bench.model, layout, slots, read, chunk, rows)]

    return Prepared(
        once=once, before=before, tokens=slots * chunk, useful=least, executed=done,
        facts=lambda: {"attention": program, "steps": chunk, "keys_read": seen["kv_len"]},
    )  # fmt: skip


def _alone(cost_of_phase: PhaseCost) -> list[PhaseCost]:
    """The phase as one program, without the transfers and copies that surround it in a run."""
    return [dataclasses.replace(cost_of_phase, dispatches=1)]


def _called(function: Callable[..., Any], *arguments: Any) -> Callable[[], list[float]]:
    def once() -> list[float]:
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        return [time.perf_counter() - began]

    return once


def _row_program(bench: Bench, case: Case) -> RowAttention:
    return cast("RowAttention", case.attention or bench.row_program)


def prefill_case(bench: Bench, case: Case) -> Prepared:
    """Keys and values of `rows` prompts of `tokens` tokens."""
    attention = _row_program(bench, case)
    program = jax.jit(partial(prefill, dtype=bench.dtype, attention=attention))
    tokens = jnp.asarray(bench.prompts(case.rows, case.tokens), jnp.int32)
    layout = dataclasses.replace(bench.rollout_layout, attention=attention)
    total = case.rows * case.tokens
    flops = model_flops(bench.model, total, (case.tokens + 1) / 2, headed=0, backward=False)
    floor = rows_floor(bench.model, layout, Phase.PREFILL, flops)
    return Prepared(
        once=_called(program, bench.policy(bench.dtype), tokens), tokens=total,
        useful=lambda: [floor], model_flops=flops, facts=lambda: {"attention": attention},
        executed=lambda: _alone(cost.prefill(bench.model, layout, case.rows, case.tokens)),
    )  # fmt: skip


def score_case(bench: Bench, case: Case) -> Prepared:
    """Log-probabilities and entropies of one packed micro-batch under the learner's float32 parameters."""
    attention = _row_program(bench, case)
    forward = bench.forward(remat=False, attention=attention)
    program = jax.jit(lambda policy, batch: score(policy, batch, forward))
    batch = jax.device_put(bench.batch(case.rows, case.tokens))
    layout = dataclasses.replace(bench.learner_layout, attention=attention)
    work = cost.score(
        bench.model, layout, case.tokens, case.rows, chunk_tokens=bench.scale.chunk_tokens
    )
    flops = _packed_flops(bench, case, backward=False)
    floor = rows_floor(bench.model, layout, Phase.SCORE, flops)
    return Prepared(
        once=_called(program, bench.policy(jnp.float32), batch), tokens=case.rows * case.tokens,
        useful=lambda: [floor], executed=lambda: [work], model_flops=flops,
        facts=lambda: {"attention": attention},
    )  # fmt: skip


def _packed_flops(bench: Bench, case: Case, *, backward: bool) -> float:
    total = case.rows * case.tokens
    return model_flops(
        bench.model, total, (bench.scale.sequence + 1) / 2, headed=total, backward=backward
    )


def train_case(bench: Bench, case: Case) -> Prepared:
    """Forward and backward of one packed micro-batch, in the learner's own step."""
    attention = _row_program(bench, case)
    layout = dataclasses.replace(bench.learner_layout, attention=attention)
    work = cost.train(
        bench.model, layout, case.tokens, case.rows, remat=case.remat,
        chunk_tokens=bench.scale.chunk_tokens,
    )  # fmt: skip
    flops = _packed_flops(bench, case, backward=True)
    floor = rows_floor(bench.model, layout, Phase.TRAIN, flops)
    return Prepared(
        once=_learner_phase(bench, case, Phase.TRAIN), tokens=case.rows * case.tokens,
        useful=lambda: [floor], executed=lambda: [work], model_flops=flops,
        facts=lambda: {"attention": attention}, programs=("jit_accumulate_grpo",),
    )  # fmt: skip


def optimizer_case(bench: Bench, case: Case) -> Prepared:
    """Gradient norm, clipping and AdamW, in the learner's own step on its smallest micro-batch."""
    rows, tokens = bench.scale.packed[0]
    small = dataclasses.replace(case, rows=rows, tokens=tokens, remat="block")
    work = [cost.optimizer(bench.model, bench.learner_layout)]
    return Prepared(
        once=_learner_phase(bench, small, Phase.OPTIMIZER), tokens=0,
        useful=lambda: work, executed=lambda: work, programs=("jit_apply_gradients",),
    )  # fmt: skip


def _learner_phase(bench: Bench, case: Case, phase: Phase) -> Callable[[], list[float]]:
    """One optimizer step on one micro-batch; the seconds of one phase of it."""
    watch = Stopwatch()
    learner = bench.learner(watch, remat=case.remat == "block", attention=case.attention)
    batch = bench.batch(case.rows, case.tokens)

    def once() -> list[float]:
        learner.update([batch])
        return seconds_of(watch.take(), phase)

    return once


def publish_case(bench: Bench, case: Case) -> Prepared:
    """The learner's weights to the rollout on the same device; beside it a bare copy of as many bytes."""
    policy, store = bench.policy(jnp.float32), bench.store()
    versions = iter(range(1, 1_000_000))
    copy = jax.jit(partial(jax.tree.map, jnp.copy))
    copied: list[float] = []
    work = cost.publish(bench.model, bench.learner_layout, bench.rollout_layout, same_devices=True)

    def once() -> Sequence[float]:
        began = time.perf_counter()
        snapshot = store.publish(next(versions), policy)
        ended = time.perf_counter()
        jax.block_until_ready(copy(snapshot.policy))
        copied.append(time.perf_counter() - ended)
        return [ended - began]

    def facts() -> Result:
        return {"copy_s": float(np.median(copied))}

    return Prepared(
        once=once, tokens=0, useful=lambda: [work], executed=lambda: [work], facts=facts,
        programs=("jit__cast", "jit__fused_cast"),
    )  # fmt: skip
