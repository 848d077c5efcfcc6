"""Holds the training state on the learner mesh and runs optimizer steps on packed micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl.algorithms.loss import LossMetrics, finish_metrics, zero_metrics
from jaxrl.batch import Batch
from jaxrl.config import GrpoConfig
from jaxrl.errors import UserError
from jaxrl.learner.steps import (
    ForwardSettings,
    TrainState,
    accumulate_grpo,
    accumulate_sft,
    apply_gradients,
    grpo_loss,
    score,
    zeros_like,
)
from jaxrl.observe import Observer
from jaxrl.tracing import num_traces
from models.config import ModelConfig
from models.decoder import Decoder
from models.sharding import batch_sharding, policy_shardings


class Learner:
    """The policy being trained, its optimizer, and the frozen reference if one is needed."""

    def __init__(
        self, config: ModelConfig, mesh: Mesh, policy: Decoder,
        optimizer: optax.GradientTransformation, *, forward: ForwardSettings, grpo: GrpoConfig,
        max_nonfinite_steps: int, observer: Observer,
    ) -> None:  # fmt: skip
        """Takes ownership of `policy` (float32, sharded over `mesh`): its buffers are donated."""
        self.mesh = mesh
        self.num_nonfinite_steps = 0
        self._nonfinite_in_a_row = 0
        self._max_nonfinite_steps = max_nonfinite_steps
        self._observer = observer
        self._needs_reference = grpo.kl_weight != 0 or grpo.log_reference
        self._reference: Decoder | None = None
        self._metrics_shape: LossMetrics | None = None
        shardings = policy_shardings(config, mesh)
        self._everywhere = scalar = NamedSharding(mesh, PartitionSpec())
        self._rows = batch_sharding(mesh)
        self._zeros = jax.jit(zeros_like, out_shardings=shardings)
        self._copy = jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=shardings)
        self._score = jax.jit(lambda p, b: score(p, b, forward)[0])
        self._grpo_loss = partial(grpo_loss, forward=forward, grpo=grpo)
        self._accumulate = jax.jit(
            partial(accumulate_grpo, forward=forward, grpo=grpo),
            donate_argnums=(1, 2),
            out_shardings=(shardings, scalar),
        )
        self._accumulate_sft = jax.jit(
            partial(accumulate_sft, forward=forward),
            donate_argnums=(1, 2),
            out_shardings=(shardings, scalar),
        )
        state_shardings = TrainState(
            policy=shardings,
            optimizer=_optimizer_shardings(optimizer, policy, shardings, scalar),
            step=scalar,
        )
        self._apply = jax.jit(
            partial(apply_gradients, optimizer=optimizer),
            donate_argnums=(0,),
            out_shardings=(state_shardings, scalar),
        )
        self.state = jax.jit(
            lambda p: TrainState(policy=p, optimizer=optimizer.init(p), step=jnp.int32(0)),
            donate_argnums=(0,),
            out_shardings=state_shardings,
        )(policy)

    @property
    def trace_count(self) -> int:
        """Programs traced so far: flat after the first step."""
        return num_traces(
            self._zeros, self._score, self._accumulate, self._accumulate_sft, self._apply
        )

    @property
    def needs_reference(self) -> bool:
        """The loss or the curves use a frozen reference."""
        return self._needs_reference

    def freeze_reference(self) -> None:
        """Keep a copy of the present weights as the reference."""
        self._reference = self._copy(self.state.policy)

    def update(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One optimizer step of policy optimisation over all micro-batches; returns its curves.

        Raises:
            UserError: max_nonfinite_steps steps in a row had a non-finite gradient.
        """
        with jax.set_mesh(self.mesh):
            return self._update(batches)

    def _update(self, batches: Sequence[Batch]) -> dict[str, float]:
        on_device = [self._put(batch) for batch in batches]
        reference = self._score_reference(on_device)
        traced = self.trace_count
        with self._observer.train(len(batches)) as work:
            gradients = self._zeros(self.state.policy)
            metrics = self._zero_metrics(on_device[0], reference[0])
            for batch, logprobs in zip(on_device, reference, strict=True):
                gradients, metrics = self._accumulate(
                    self.state.policy, gradients, metrics, batch, logprobs
                )
            jax.block_until_ready(gradients)
            work.update(microbatches=len(batches), compiled=self.trace_count - traced)
        applied = self._take_step(gradients)
        return {**finish_metrics(metrics), **applied}

    def update_sft(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One optimizer step of supervised training; returns its curves."""
        with jax.set_mesh(self.mesh):
            return self._update_sft(batches)

    def _update_sft(self, batches: Sequence[Batch]) -> dict[str, float]:
        gradients = self._zeros(self.state.policy)
        total = jax.device_put(jnp.float32(0), self._everywhere)
        for batch in batches:
            gradients, total = self._accumulate_sft(
                self.state.policy, gradients, total, self._put(batch)
            )
        return {"sft/loss": float(total), **self._take_step(gradients)}

    def _put(self, batch: Batch) -> Batch:
        return jax.device_put(batch, self._rows)

    def _score_reference(self, batches: Sequence[Batch]) -> list[jax.Array | None]:
        if self._reference is None:
            return [None] * len(batches)
        traced = self.trace_count
        with self._observer.reference(len(batches)) as work:
            scores = [self._score(self._reference, batch) for batch in batches]
            jax.block_until_ready(scores)
            work.update(microbatches=len(batches), compiled=self.trace_count - traced)
        return [*scores]

    def _zero_metrics(self, batch: Batch, reference: jax.Array | None) -> LossMetrics:
        shape = self._metrics_shape
        if shape is None:
            _, shape = jax.eval_shape(self._grpo_loss, self.state.policy, batch, reference)
            self._metrics_shape = shape
        return jax.device_put(zero_metrics(shape), self._everywhere)

    def _take_step(self, gradients: Decoder) -> dict[str, float]:
        traced = self.trace_count
        with self._observer.optimizer() as work:
            self.state, applied = self._apply(self.state, gradients)
            host = jax.device_get(applied)
            work["compiled"] = self.trace_count - traced
        if host.is_finite:
            self._nonfinite_in_a_row = 0
        else:
            self.num_nonfinite_steps += 1
            self._nonfinite_in_a_row += 1
            if self._nonfinite_in_a_row >= self._max_nonfinite_steps:
                raise UserError(
                    f"the gradient norm was {float(host.grad_norm)} in {self._nonfinite_in_a_row} "
                    "optimizer steps in a row (train.max_nonfinite_steps); lower "
                    f"train.learning_rate, or train.max_grad_norm, and resume from the last checkpoint"
                )
        return {
            "actor/grad_norm": float(host.grad_norm),
            "actor/nonfinite_steps": float(self.num_nonfinite_steps),
        }


def _optimizer_shardings(
    optimizer: optax.GradientTransformation,
    policy: Decoder,
    shardings: Decoder,
    scalar: NamedSharding,
) -> Any:
    """Moments lie as their parameters do; counters are replicated."""
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, policy),
        shardings,
        transform_non_params=lambda _: scalar,
    )
