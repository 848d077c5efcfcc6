"""Holds the training state on the learner mesh and runs optimizer steps on packed micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl.algorithms.loss_metrics import LossMetrics, finish_metrics, zero_metrics
from jaxrl.batch import Batch
from jaxrl.checkpoint import FIRST_STEP, Checkpoints
from jaxrl.config import GrpoConfig
from jaxrl.errors import UserError
from jaxrl.learner.critic import ActorCritic, critic_shardings, make_critic
from jaxrl.learner.steps import (
    ForwardSettings,
    TrainState,
    accumulate_grpo,
    accumulate_sft,
    apply_gradients,
    grpo_loss,
    score,
    score_with_values,
    whole,
)
from jaxrl.learner.sums import GradientSums, zeros_like
from jaxrl.observe import Observer
from jaxrl.tracing import num_traces
from models.compiler_options import train_options
from models.config import ModelConfig
from models.decoder import Decoder, Policy
from models.lora import AdaptedDecoder
from models.sharding import adapter_shardings, batch_sharding, policy_shardings


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """One micro-batch under the weights before its first update. All [R, T] float32, on the host."""

    logprobs: np.ndarray
    entropy: np.ndarray
    reference_logprobs: np.ndarray | None
    values: np.ndarray | None


class Learner:
    """The policy being trained, its optimizer, and where the algorithm has them, critic and reference."""

    def __init__(
        self, config: ModelConfig, mesh: Mesh, policy: Policy,
        optimizer: optax.GradientTransformation, *, forward: ForwardSettings, grpo: GrpoConfig,
        max_nonfinite_steps: int, observer: Observer,
        critic_optimizer: optax.GradientTransformation | None = None,
    ) -> None:  # fmt: skip
        """Takes ownership of `policy` (float32, sharded over `mesh`): its buffers are donated.

        Of an AdaptedDecoder the adapter is trained and the base, in whatever dtype, only read: it has
        neither gradient nor optimizer state, and is not part of `state`.
        With a critic_optimizer there is a critic, and every batch must have values and returns.
        """
        self.mesh = mesh
        self.num_nonfinite_steps = 0
        self._nonfinite_in_a_row = 0
        self._max_nonfinite_steps = max_nonfinite_steps
        self._observer = observer
        self._grpo = grpo
        self._frozen_reference: Any = None
        self.frozen: Decoder | None = None
        self._make_metrics: Callable[[], LossMetrics] | None = None
        shardings: Any = policy_shardings(config, mesh)
        first: Any = policy
        if isinstance(policy, AdaptedDecoder):
            self.frozen, first = policy.base, policy.adapter
            shardings = adapter_shardings(config, mesh)
        self._everywhere = scalar = NamedSharding(mesh, PartitionSpec())
        self._rows = batch_sharding(mesh)
        self._copy = jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=shardings)
        shared = grpo.critic_trunk == "shared"
        trained = shardings
        if critic_optimizer is not None:
            of_critic = critic_shardings(config, mesh, shared=shared)
            trained = ActorCritic(policy=shardings, critic=of_critic)
        self._make_programs(forward, grpo, shardings, trained)

        def first_state(policy: Any) -> TrainState:  # a pytree, to optax
            state = TrainState(policy=policy, optimizer=optimizer.init(policy), step=jnp.int32(0))
            if critic_optimizer is not None:
                critic: Any = make_critic(policy, shared=shared)
                state = replace(
                    state, critic=critic, critic_optimizer=critic_optimizer.init(critic)
                )
            if grpo.reference_refresh_steps > 0:
                state = replace(state, reference=jax.tree.map(jnp.copy, policy))
            if grpo.kl_target > 0:
                state = replace(state, kl_weight=jnp.float32(grpo.kl_weight))
            return state

        places = _state_shardings(
            jax.eval_shape(first_state, first), optimizer, critic_optimizer, trained, scalar
        )
        self.places = places  # shardings of `state`
        self.state = jax.jit(first_state, donate_argnums=(0,), out_shardings=places)(first)
        self._make_apply(optimizer, critic_optimizer, places)

    def _make_programs(
        self, forward: ForwardSettings, grpo: GrpoConfig, shardings: Any, trained: Any
    ) -> None:
        scalar, options = self._everywhere, train_options(self.mesh.devices.flat[0])
        self._zeros = jax.jit(zeros_like, out_shardings=trained)
        self._zeros_sft = jax.jit(zeros_like, out_shardings=shardings)
        self._sums = GradientSums(self.mesh.devices.flat[0], trained)
        self._score = jax.jit(lambda p, b: score(p, b, forward)[0], compiler_options=options)
        self._score_all = jax.jit(
            partial(score_with_values, settings=forward), compiler_options=options
        )
        self._grpo_loss = partial(grpo_loss, forward=forward, grpo=grpo)
        self._accumulate = jax.jit(
            partial(accumulate_grpo, forward=forward, grpo=grpo),
            donate_argnums=(1, 2), out_shardings=(trained, scalar), compiler_options=options,
        )  # fmt: skip
        self._accumulate_sft = jax.jit(
            partial(accumulate_sft, forward=forward),
            donate_argnums=(1, 2), out_shardings=(shardings, scalar), compiler_options=options,
        )  # fmt: skip

    def _make_apply(
        self,
        optimizer: optax.GradientTransformation,
        critic_optimizer: optax.GradientTransformation | None,
        places: TrainState,
    ) -> None:
        def program(*, train_policy: bool) -> Any:
            return jax.jit(
                partial(
                    apply_gradients, optimizer=optimizer, critic_optimizer=critic_optimizer,
                    train_policy=train_policy,
                ),
                donate_argnums=(0,),
                out_shardings=(places, self._everywhere),
            )  # fmt: skip

        self._apply = program(train_policy=True)
        self._apply_critic = program(train_policy=False)

    @property
    def trace_count(self) -> int:
        """Programs traced so far: flat after the first step."""
        return num_traces(
            self._zeros, self._zeros_sft, self._sums.program, self._score, self._score_all,
            self._accumulate, self._accumulate_sft, self._apply, self._apply_critic,
        )  # fmt: skip

    @property
    def programs(self) -> dict[str, Any]:
        """The jitted phases and the loss that they differentiate, by name, for `jaxrl.programs`."""
        return {
            "score": self._score, "accumulate": self._accumulate, "apply": self._apply,
            "loss": self._grpo_loss,
        }  # fmt: skip

    @property
    def needs_reference(self) -> bool:
        """The loss, the rewards or the curves use a reference."""
        return self._grpo.uses_reference

    @property
    def kl_weight(self) -> float:
        """Weight of the KL in the reward: the configured one, or where it has been adapted to."""
        adapted = self.state.kl_weight
        return self._grpo.kl_weight if adapted is None else float(adapted)

    def set_kl_weight(self, weight: float) -> None:
        """Replace the adapted weight."""
        value = jax.device_put(jnp.float32(weight), self._everywhere)
        self.state = replace(self.state, kl_weight=value)

    def restore(self, checkpoints: Checkpoints, step: int, *, reference: bool = False) -> None:
        """Take over the state of checkpoint `step`, the frozen base if there is one, and with `reference`
        what checkpoint 0 holds as the reference, if the loss needs one."""
        if self.frozen is not None:
            self.frozen = checkpoints.restore_frozen(self.frozen)
        if reference and self.needs_reference:
            self.state = checkpoints.restore_state(FIRST_STEP, self.state)
            self.freeze_reference()
        self.state = checkpoints.restore_state(step, self.state)

    def freeze_reference(self) -> None:
        """Keep a copy of the present weights as the reference."""
        copy = self._copy(self.state.policy)
        if self._grpo.reference_refresh_steps > 0:
            self.state = replace(self.state, reference=copy)
        else:
            self._frozen_reference = copy

    @property
    def policy(self) -> Any:
        """The weights in training: a Decoder, or an AdaptedDecoder."""
        return whole(self.state.policy, self.frozen)

    @property
    def _reference(self) -> Any:
        """Of an adapter only the adapter was copied: the base is the same."""
        kept = self.state.reference if self._frozen_reference is None else self._frozen_reference
        return None if kept is None else whole(kept, self.frozen)

    @property
    def _trained(self) -> Any:
        if self.state.critic is None:
            return self.state.policy
        return ActorCritic(policy=self.state.policy, critic=self.state.critic)

    @property
    def _model(self) -> Any:
        return whole(self._trained, self.frozen)

    def score_batches(self, batches: Sequence[Batch]) -> list[Scores]:
        """Every micro-batch under the present weights, and under the reference if there is one."""
        with jax.set_mesh(self.mesh):
            on_device = [self._put(batch) for batch in batches]
            traced = self.trace_count
            with self._observer.reference(len(batches)) as work:
                scored = [self._score_all(self._model, batch) for batch in on_device]
                jax.block_until_ready(scored)
                work.update(microbatches=len(batches), compiled=self.trace_count - traced)
            reference = self._score_reference(on_device)
        return [
            Scores(
                logprobs=np.asarray(logprobs),
                entropy=np.asarray(entropy),
                reference_logprobs=None if under is None else np.asarray(under),
                values=None if values is None else np.asarray(values),
            )
            for (logprobs, entropy, values), under in zip(scored, reference, strict=True)
        ]

    def update_step(self, minibatches: Sequence[Sequence[Batch]], step: int) -> dict[str, float]:
        """All optimizer updates on one batch of rollouts, the `step`-th; returns mean curves.

        Curves that end in _max are maxima over the updates. The reference is refreshed afterwards
        if it is due.

        Raises:
            UserError: as `update`.
        """
        seen = [self.update(batches) for _ in range(self._grpo.epochs) for batches in minibatches]
        every = self._grpo.reference_refresh_steps
        if every > 0 and step % every == 0:
            self.freeze_reference()
        if len(seen) == 1:
            return seen[0]
        return {
            name: float((max if name.endswith("_max") else np.mean)([one[name] for one in seen]))
            for name in seen[0]
        }

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
            model = self._trained
            gradients = self._sums.take(model, self._zeros)
            metrics = self._zero_metrics(on_device[0], reference[0])
            for batch, logprobs in zip(on_device, reference, strict=True):
                gradients, metrics = self._accumulate(
                    model, gradients, metrics, batch, logprobs, self.frozen
                )
                self._sums.added(metrics)
            jax.block_until_ready(gradients)
            work.update(microbatches=len(batches), compiled=self.trace_count - traced)
        applied = self._take_step(gradients)
        return {**finish_metrics(metrics), **applied}

    def update_sft(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One optimizer step of supervised training; returns its curves."""
        with jax.set_mesh(self.mesh):
            return self._update_sft(batches)

    def _update_sft(self, batches: Sequence[Batch]) -> dict[str, float]:
        traced = self.trace_count
        with self._observer.train(len(batches)) as work:
            gradients = self._sums.take(self.state.policy, self._zeros_sft)
            total = jax.device_put(jnp.float32(0), self._everywhere)
            for batch in batches:
                gradients, total = self._accumulate_sft(
                    self.state.policy, gradients, total, self._put(batch), self.frozen
                )
                self._sums.added(total)
            jax.block_until_ready(gradients)
            work.update(microbatches=len(batches), compiled=self.trace_count - traced)
        return {"sft/loss": float(total), **self._take_step(gradients)}

    def sft_loss(self, batches: Sequence[Batch]) -> float:
        """The loss of `update_sft` on these micro-batches under the present weights; trains nothing."""
        with jax.set_mesh(self.mesh):
            scores = [np.asarray(self._score(self.policy, self._put(batch))) for batch in batches]
        return -sum(
            float(np.sum(logprobs * batch.token_weights, where=batch.loss_mask))
            for logprobs, batch in zip(scores, batches, strict=True)
        )

    def _put(self, batch: Batch) -> Batch:
        return jax.device_put(batch, self._rows)

    def _score_reference(self, batches: Sequence[Batch]) -> list[jax.Array | None]:
        if self._reference is None or batches[0].reference_logprobs is not None:
            return [batch.reference_logprobs for batch in batches]
        traced = self.trace_count
        with self._observer.reference(len(batches)) as work:
            scores = [self._score(self._reference, batch) for batch in batches]
            jax.block_until_ready(scores)
            work.update(microbatches=len(batches), compiled=self.trace_count - traced)
        return [*scores]

    def _zero_metrics(self, batch: Batch, reference: jax.Array | None) -> LossMetrics:
        if self._make_metrics is None:
            _, shape = jax.eval_shape(self._grpo_loss, self._model, batch, reference)
            make = partial(zero_metrics, shape)
            self._make_metrics = jax.jit(make, out_shardings=self._everywhere)
        return self._make_metrics()

    def _take_step(self, gradients: Any) -> dict[str, float]:
        traced = self.trace_count
        warms_up = isinstance(gradients, ActorCritic) and self._grpo.critic_warmup_steps > 0
        if warms_up and int(self.state.step) < self._grpo.critic_warmup_steps:
            apply = self._apply_critic
        else:
            apply = self._apply
        with self._observer.optimizer() as work:
            self.state, applied = apply(self.state, gradients)
            host = jax.device_get(applied)
            self._sums.keep(gradients, self._trained)
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


def _state_shardings(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    critic_optimizer: optax.GradientTransformation | None,
    trained: Any,
    scalar: NamedSharding,
) -> TrainState:
    """Where the leaves of `state` (abstract) lie; `trained` are the shardings of what is trained."""
    policy = trained.policy if isinstance(trained, ActorCritic) else trained
    places = TrainState(
        policy=policy,
        optimizer=_optimizer_shardings(optimizer, state.policy, policy, scalar),
        step=scalar,
        reference=None if state.reference is None else policy,
        kl_weight=None if state.kl_weight is None else scalar,
    )
    if critic_optimizer is None:
        return places
    moments = _optimizer_shardings(critic_optimizer, state.critic, trained.critic, scalar)
    return replace(places, critic=trained.critic, critic_optimizer=moments)


def _optimizer_shardings(
    optimizer: optax.GradientTransformation, parameters: Any, shardings: Any, scalar: NamedSharding
) -> Any:
    """Moments lie as their parameters do; counters are replicated."""
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, parameters),
        shardings,
        transform_non_params=lambda _: scalar,
    )
