"""The jitted phases of a run as programs to compile: nothing is allocated, no device is needed.

Learner and engine are built as a run builds them, but under jax.eval_shape, so that the arrays they
would make are shapes only; their own jitted functions are then lowered with arguments of those shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl import build
from jaxrl.batch import Batch
from jaxrl.config import Config
from jaxrl.errors import UserError
from jaxrl.learner.learner import Learner
from jaxrl.observe import Observer, Shapes
from jaxrl.plan import make_shapes
from jaxrl.rollout.admission import prompt_bucket
from jaxrl.rollout.engine import RolloutEngine
from models.attention_kernels import lowering_for
from models.config import ModelConfig
from models.decoder import abstract_decoder
from models.fused import FusedDecoder, fused, split_layers
from models.lora import AdaptedDecoder, init_adapter
from models.sharding import (
    adapter_shardings,
    batch_sharding,
    fused_shardings,
    policy_shardings,
)
from roofline import cost, traffic
from roofline.kernels import ceil_div
from roofline.memory import program_memory
from roofline.phases import Phase
from roofline.rehearse.executable import Program, local_bytes

PHASES = (
    Phase.PREFILL, Phase.DECODE, Phase.SCORE, Phase.TRAIN, Phase.OPTIMIZER, Phase.PUBLISH,
)  # fmt: skip
"""Phases that are one program each."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A run before it begins, on meshes whose devices need not exist."""

    config: Config
    subject: build.Subject
    learner_mesh: Mesh
    rollout_mesh: Mesh

    @property
    def model(self) -> ModelConfig:
        """The architecture."""
        return self.subject.model

    @cached_property
    def shapes(self) -> Shapes:
        """Static shapes, from which costs follow."""
        return make_shapes(self.config, self.model, self.learner_mesh.devices.flat[0])

    def program(self, phase: Phase) -> Program:
        """The phase as one program. Raises: UserError for a phase that is none."""
        makers: dict[Phase, Callable[[], Program]] = {
            Phase.PREFILL: self._prefill, Phase.DECODE: self._decode, Phase.SCORE: self._score,
            Phase.TRAIN: self._train, Phase.OPTIMIZER: self._optimizer, Phase.PUBLISH: self._publish,
        }  # fmt: skip
        if phase not in makers:
            raise UserError(f"{phase} is no single program; use some of {', '.join(PHASES)}")
        return makers[phase]()

    # -- what would be on the devices --------------------------------------------------------------

    @cached_property
    def policy(self) -> Any:
        """The learner's weights, float32; under an adapter frozen ones in the compute type."""
        if self.model.lora is None:
            return self._weights(self.learner_mesh, jnp.float32)
        base = self._weights(self.learner_mesh, self._dtype)
        return AdaptedDecoder(base=base, adapter=self._adapter(self.learner_mesh, jnp.float32))

    @cached_property
    def trained(self) -> Any:
        """What of them has gradients: all, or the adapter."""
        return self.policy if self.frozen is None else self.policy.adapter

    @property
    def frozen(self) -> Any:
        """The base under an adapter."""
        return None if self.model.lora is None else self.policy.base

    @cached_property
    def snapshot(self) -> Any:
        """The rollout's weights, in the compute type."""
        base = self._weights(self.rollout_mesh, self._dtype)
        if not self.shapes.rollout.copies_weights:
            return _placed(
                jax.eval_shape(fused, base), fused_shardings(self.model, self.rollout_mesh)
            )
        if self.model.lora is None:
            return base
        return AdaptedDecoder(base=base, adapter=self._adapter(self.rollout_mesh, self._dtype))

    @property
    def _dtype(self) -> Any:
        return jnp.dtype(self.config.model.dtype)

    def _weights(self, mesh: Mesh, dtype: Any) -> Any:
        return _placed(abstract_decoder(self.model, dtype), policy_shardings(self.model, mesh))

    def _adapter(self, mesh: Mesh, dtype: Any) -> Any:
        fresh = partial(init_adapter, self.model, dtype=dtype)
        return _placed(
            jax.eval_shape(fresh, jax.random.key(0)), adapter_shardings(self.model, mesh)
        )

    @cached_property
    def learner(self) -> Learner:
        """Its state holds shapes."""
        made: list[Learner] = []

        def make(policy: Any) -> Any:
            made.append(
                build.make_learner(self.config, self.model, self.learner_mesh, policy, Observer())
            )
            return made[0].state

        state = jax.eval_shape(make, self.policy)
        made[0].state, made[0].frozen = _placed(state, made[0].places), self.frozen
        return made[0]

    @cached_property
    def engine(self) -> tuple[RolloutEngine, Any]:
        """The engine, and its slots as shapes."""
        made: list[RolloutEngine] = []

        def make() -> Any:
            made.append(build.make_engine(self.config, self.subject, self.rollout_mesh, Observer()))
            return made[0].slots

        slots = jax.eval_shape(make)
        return made[0], _placed(slots, made[0].places)

    @cached_property
    def layers(self) -> Any:
        """The snapshot as decode reads it."""
        weights = self.engine[0].weights
        if isinstance(self.snapshot, FusedDecoder):
            return _placed(jax.eval_shape(split_layers, self.snapshot), weights.whole)
        return _placed(jax.eval_shape(weights.program, self.snapshot), weights.places)

    @cached_property
    def batch(self) -> Batch:
        """One packed micro-batch."""
        train, scored = self.config.train, self.config.grpo.scores_first
        shape, rows = (
            (train.rows_per_microbatch, train.row_tokens),
            batch_sharding(self.learner_mesh),
        )

        def array(dtype: Any) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

        whole, real = array(jnp.int32), array(jnp.float32)
        return Batch(
            tokens=whole, segment_ids=whole, positions=whole, targets=whole,
            loss_mask=array(jnp.bool_), token_weights=real, advantages=real, sampler_logprobs=real,
            prefix_ids=whole if train.shared_prompts else None,
            learner_logprobs=real if scored else None, learner_entropy=real if scored else None,
        )  # fmt: skip

    @property
    def resident(self) -> dict[str, int]:
        """Bytes of one device of each lane between programs: the state with the reference; two
        snapshots, while a version arrives, the one in use as decode reads it if that is a copy, and the
        slots. A frozen base is held once by each lane, and once by both where it lies alike on the same
        devices."""
        reference = self.learner.needs_reference and self.learner.state.reference is None
        state = local_bytes(self.learner.state) + reference * local_bytes(self.trained)
        copied = self.layers if self.shapes.rollout.copies_weights else ()
        rollout = local_bytes((self.engine[1], copied))
        if self.frozen is None:
            return {"learner": state, "rollout": 2 * local_bytes(self.snapshot) + rollout}
        base, adapter = self.snapshot.base, self.snapshot.adapter
        learner, held = local_bytes(self.frozen), local_bytes(base)
        if self.config.mesh.colocated and learner == held:
            held = 0
        return {
            "learner": state + learner, "rollout": rollout + held + 2 * local_bytes(adapter),
        }  # fmt: skip

    # -- programs ----------------------------------------------------------------------------------

    def _prefill(self) -> Program:
        config, layout = self.config, self.shapes.rollout
        new = ceil_div(config.rollout.slots, config.grpo.group_size)
        rows = prompt_bucket(min(config.grpo.prompts_per_step, new), layout.row_shards)
        tokens = config.rollout.max_prompt_tokens
        prompts = self._on_rollout((rows, tokens), jnp.int32)
        return Program(
            phase=Phase.PREFILL, lane="rollout", function=self.engine[0].programs["prefill"],
            arguments=(self.snapshot, prompts), mesh=self.rollout_mesh,
            cost=self.shapes.prefill(rows, tokens, 0),
            traffic=traffic.forward(self.model, layout, ceil_div(rows, layout.row_shards) * tokens),
            memory=program_memory(self.model, layout, Phase.PREFILL, rows=rows, row_tokens=tokens),
            resident=local_bytes(self.snapshot),
        )  # fmt: skip

    def _decode(self) -> Program:
        rollout, layout = self.config.rollout, self.shapes.rollout
        engine, slots = self.engine
        base = self.snapshot if self.frozen is None else self.snapshot.base
        outer = base.embedding, base.final_norm, base.head
        longest, local = slots.cache.max_tokens, ceil_div(rollout.slots, layout.row_shards)
        shared = self.shapes.prefixes
        once = traffic.forward(self.model, layout, local) + traffic.sampling(
            self.model, layout, local
        )
        return Program(
            phase=Phase.DECODE, lane="rollout", function=engine.programs["decode"],
            arguments=(self.snapshot, self.layers, slots, self._on_rollout((), jnp.int32)),
            options={"steps": rollout.chunk_steps, "filtered": False, "greedy": False},
            mesh=self.rollout_mesh, trips=rollout.chunk_steps,
            cost=self.shapes.decode(longest, rollout.chunk_steps),
            traffic=traffic.repeated(once, rollout.chunk_steps)
            + traffic.samples(layout, rollout.slots, rollout.chunk_steps),
            memory=program_memory(
                self.model, layout, Phase.DECODE, rows=rollout.slots, row_tokens=longest,
                prefixes=shared,
            ),
            resident=local_bytes((outer, self.layers, slots)),
        )  # fmt: skip

    def _score(self) -> Program:
        layout = self.shapes.learner
        return Program(
            phase=Phase.SCORE, lane="learner", function=self.learner.programs["score"],
            arguments=(self.policy, self.batch), mesh=self.learner_mesh,
            cost=self.shapes.reference(1),
            traffic=traffic.score(self.model, layout, self._tokens, self._predicting),
            memory=self._packed_memory(Phase.SCORE), resident=local_bytes(self.policy),
            tokens=self._chunked, vocab=self._vocab,
        )  # fmt: skip

    def _train(self) -> Program:
        layout, learner = self.shapes.learner, self.learner
        rows = self.config.train.rows_per_microbatch, self.config.train.row_tokens
        reference = None
        if learner.needs_reference:
            reference = jax.ShapeDtypeStruct(
                rows, jnp.float32, sharding=batch_sharding(self.learner_mesh)
            )
        return Program(
            phase=Phase.TRAIN, lane="learner", function=learner.programs["accumulate"],
            arguments=(
                self.trained, self.trained, self._metrics(reference), self.batch, reference,
                self.frozen,
            ),
            mesh=self.learner_mesh, cost=self.shapes.train(1),
            traffic=traffic.train(self.model, layout, self._tokens, self._predicting),
            memory=self._packed_memory(Phase.TRAIN), resident=local_bytes(self.policy),
            tokens=self._chunked, vocab=self._vocab,
        )  # fmt: skip

    def _optimizer(self) -> Program:
        return Program(
            phase=Phase.OPTIMIZER, lane="learner", function=self.learner.programs["apply"],
            arguments=(self.learner.state, self.trained), mesh=self.learner_mesh,
            cost=self.shapes.optimizer(), traffic=(),
            memory=program_memory(self.model, self.shapes.learner, Phase.OPTIMIZER),
            resident=local_bytes(self.learner.state),
        )  # fmt: skip

    def _publish(self) -> Program:
        """The part on the learner's devices; the copy to the rollout's is no program."""
        store = build.make_store(self.config, self.model, self.learner_mesh, self.rollout_mesh)
        learner, rollout = self.shapes.learner, self.shapes.rollout
        return Program(
            phase=Phase.PUBLISH, lane="learner", function=store.program,
            arguments=(self.trained,), mesh=self.learner_mesh,
            cost=cost.reshard(self.model, learner, rollout),
            traffic=traffic.publication(self.model, learner, rollout),
            memory=program_memory(self.model, learner, Phase.PUBLISH),
            resident=local_bytes(self.trained),
        )  # fmt: skip

    # ----------------------------------------------------------------------------------------------

    @property
    def _predicting(self) -> int:
        """Of these, the ones that meet the head."""
        shared, train = self.shapes.shared, self.config.train
        in_front = shared.prompt_tokens / train.row_tokens if shared else 0.0
        return round(self._tokens * (1 - in_front))

    @property
    def _tokens(self) -> int:
        """Of one device's rows of a micro-batch."""
        train = self.config.train
        return (
            ceil_div(train.rows_per_microbatch, self.shapes.learner.row_shards) * train.row_tokens
        )

    @property
    def _chunked(self) -> int:
        """Those tokens where their logits come in chunks, else 0."""
        return self._tokens if self._tokens > self.config.train.logprob_chunk_tokens else 0

    @property
    def _vocab(self) -> tuple[int, ...]:
        whole = self.model.vocab_size
        return tuple({whole, ceil_div(whole, self.shapes.learner.tensor)})

    def _packed_memory(self, phase: Phase) -> dict[str, int]:
        train = self.config.train
        return program_memory(
            self.model, self.shapes.learner, phase, rows=train.rows_per_microbatch,
            row_tokens=train.row_tokens, remat=self.config.model.remat,
            chunk_tokens=train.logprob_chunk_tokens,
        )  # fmt: skip

    def _metrics(self, reference: Any) -> Any:
        mesh = self.learner_mesh
        with jax.set_mesh(mesh), lowering_for(mesh.devices.flat[0]):
            shapes = jax.eval_shape(
                lambda *given: self.learner.programs["loss"](*given)[1],
                self.policy,
                self.batch,
                reference,
            )
        everywhere = NamedSharding(self.learner_mesh, PartitionSpec())
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes
        )

    def _on_rollout(self, shape: tuple[int, ...], dtype: Any) -> Any:
        everywhere = NamedSharding(self.rollout_mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)


def _placed(shapes: Any, places: Any) -> Any:
    """Shapes with the shardings of `places`, a tree prefix of theirs."""
    return jax.tree.map(
        lambda place, part: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), part
        ),
        places,
        shapes,
    )
