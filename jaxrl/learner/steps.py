"""The jitted parts of an optimizer step. Pure functions; `Learner` holds the state.

Order within one optimizer step: (scoring) -> accumulate over micro-batches -> apply. With a critic the
model that is trained is an ActorCritic, else the policy alone.
Gradients of micro-batches are summed: the denominators are in the batch's token weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from jaxrl.algorithms.loss import policy_loss, sft_loss, value_loss
from jaxrl.algorithms.loss_metrics import LossMetrics, keep, merge_metrics
from jaxrl.batch import Batch
from jaxrl.config import GrpoConfig
from jaxrl.learner.critic import ActorCritic, values_of
from models.activations import shares_work
from models.decoder import Decoder, Policy, hidden_states
from models.head import target_logprobs
from models.lora import AdaptedDecoder
from models.rows import RowAttention, SharedPrompts


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """What an optimizer step replaces; donated."""

    policy: Any  # Decoder, or the adapter of a frozen one; float32
    optimizer: Any
    step: Any  # [] int32, optimizer steps taken, skipped ones included
    critic: Any = None  # Critic, where advantages need one
    critic_optimizer: Any = None
    reference: Any = None  # Decoder, where it is refreshed; a frozen one is checkpoint 0
    kl_weight: Any = None  # [] float32, where it is adapted


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardSettings:
    """How the learner runs the model."""

    dtype: Any
    temperature: float
    chunk_tokens: int
    remat: bool
    shared: SharedPrompts | None = None
    """How the rows of a batch with prefix_ids are divided."""
    attention: RowAttention = "blocks"


def whole(trained: Any, frozen: Decoder | None) -> Any:
    """The model of what is trained, and of the frozen base if that is an adapter."""
    return trained if frozen is None else AdaptedDecoder(base=frozen, adapter=trained)


def score(policy: Policy, batch: Batch, settings: ForwardSettings) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities [R, T] of the targets and entropies [R, T] of the next-token distributions."""
    return _head(policy, _hidden(policy, batch, settings), batch, settings)


def _hidden(policy: Policy, batch: Batch, settings: ForwardSettings) -> jax.Array:
    return hidden_states(
        policy, batch.tokens, batch.positions, batch.segment_ids, dtype=settings.dtype,
        remat=settings.remat, prefix_ids=batch.prefix_ids, shared=settings.shared,
        attention=settings.attention,
    )  # fmt: skip


def _head(
    policy: Policy, hidden: jax.Array, batch: Batch, settings: ForwardSettings
) -> tuple[jax.Array, jax.Array]:
    """0 at the shared prompts, which predict nothing that is trained on."""
    shared = None if batch.prefix_ids is None else settings.shared
    first = 0 if shared is None else shared.prompt_tokens
    scores = target_logprobs(
        policy, hidden[:, first:], batch.targets[:, first:], temperature=settings.temperature,
        chunk_tokens=settings.chunk_tokens, dtype=settings.dtype,
    )  # fmt: skip
    logprobs, entropy = (jnp.pad(x, [(0, 0), (first, 0)]) for x in scores)
    return logprobs, entropy


def score_with_values(
    model: Policy | ActorCritic, batch: Batch, settings: ForwardSettings
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Log-probabilities, entropies and, with a critic, values; all [R, T] float32."""
    if not isinstance(model, ActorCritic):
        return *score(model, batch, settings), None
    hidden = _hidden(model.policy, batch, settings)
    logprobs, entropy = _head(model.policy, hidden, batch, settings)
    trunk = model.critic.trunk
    states = hidden if trunk is None else _hidden(trunk, batch, settings)
    return logprobs, entropy, values_of(model.critic, states)


def grpo_loss(
    model: Policy | ActorCritic, batch: Batch, reference_logprobs: jax.Array | None, *,
    forward: ForwardSettings, grpo: GrpoConfig,
) -> tuple[jax.Array, LossMetrics]:  # fmt: skip
    """This micro-batch's part of the policy loss (and of the value loss), and its metrics."""
    logprobs, entropy, values = score_with_values(model, batch, forward)
    loss, metrics = policy_loss(
        logprobs, entropy, batch, learner_logprobs=batch.learner_logprobs,
        reference_logprobs=reference_logprobs, settings=grpo,
    )  # fmt: skip
    if values is None:
        return loss, metrics
    of_values, clipped = value_loss(values, batch, clip=grpo.value_clip)
    seen = replace(
        metrics,
        weighted=metrics.weighted | {"critic/value_loss": of_values},
        sums=metrics.sums | {
            "critic/value_mean": jnp.sum(keep(values, batch.loss_mask)),
            "critic/return_mean": jnp.sum(keep(batch.returns, batch.loss_mask)),
            "critic/clipfrac": clipped,
        },
    )  # fmt: skip
    return loss + grpo.value_weight * of_values, jax.lax.stop_gradient(seen)


def accumulate_grpo(
    model: Any, gradients: Any, metrics: LossMetrics, batch: Batch,
    reference_logprobs: jax.Array | None, frozen: Decoder | None = None, *,
    forward: ForwardSettings, grpo: GrpoConfig,
) -> tuple[Any, LossMetrics]:  # fmt: skip
    """Add one micro-batch's gradient, in the shape of the model, and metrics.

    frozen: the base, where the model that is trained is an adapter; it has no gradient.
    """

    def loss(trained: Any) -> tuple[jax.Array, LossMetrics]:
        model = whole(trained, frozen)
        return grpo_loss(model, batch, reference_logprobs, forward=forward, grpo=grpo)

    gradients, seen = add_gradient(loss, model, gradients)
    return gradients, merge_metrics(metrics, seen)


def accumulate_sft(
    trained: Any, gradients: Any, total: jax.Array, batch: Batch, frozen: Decoder | None = None, *,
    forward: ForwardSettings,
) -> tuple[Any, jax.Array]:  # fmt: skip
    """Add one micro-batch's cross-entropy gradient, in the shape of what is trained, and loss."""

    def loss(trained: Any) -> tuple[jax.Array, jax.Array]:
        value = sft_loss(score(whole(trained, frozen), batch, forward)[0], batch)
        return value, value

    gradients, value = add_gradient(loss, trained, gradients)
    return gradients, total + value


def add_gradient(
    loss: Callable[[Any], tuple[jax.Array, Any]], trained: Any, gradients: Any
) -> tuple[Any, Any]:
    """`gradients` plus the gradient of a loss at `trained`, and what the loss returns beside its value.

    On one device backward adds to the sums where they lie, layer by layer, and the gradient is never there as a
    whole. On several, which first sum what each has of it, the compiler would sum an adapter's another way.
    """
    if shares_work():
        new, seen = jax.grad(loss, has_aux=True)(trained)
        return jax.tree.map(jnp.add, gradients, new), seen
    value, backward, seen = jax.vjp(loss, trained, has_aux=True)
    sums = jax.tree.map(jax.new_ref, gradients)
    cast("Any", backward).with_refs(sums)(jnp.ones_like(value))
    return jax.tree.map(jax.freeze, sums), seen


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """What the optimizer saw."""

    grad_norm: Any  # [] float32, before clipping
    is_finite: Any  # [] bool; False: the step left weights and optimizer state as they were


def apply_gradients(
    state: TrainState,
    gradients: Any,
    optimizer: optax.GradientTransformation,
    critic_optimizer: optax.GradientTransformation | None = None,
    *,
    train_policy: bool = True,
) -> tuple[TrainState, Applied]:
    """One optimizer step; a non-finite gradient norm leaves weights and optimizer state untouched.

    Gradients of an ActorCritic step both, the critic with its own optimizer; train_policy=False
    steps the critic alone. grad_norm is the policy's.
    """
    both = isinstance(gradients, ActorCritic)
    of_policy = gradients.policy if isinstance(gradients, ActorCritic) else gradients
    norm = optax.global_norm(of_policy)
    finite = jnp.isfinite(optax.global_norm(gradients) if both else norm)

    def take(state: TrainState) -> TrainState:
        policy: Any = state.policy  # a pytree; optax's types know only arrays and containers
        if train_policy:
            update = optax.with_extra_args_support(optimizer).update
            updates, new = update(cast("Any", of_policy), state.optimizer, policy, norm=norm)
            stepped: Any = optax.apply_updates(policy, updates)
            state = replace(state, policy=stepped, optimizer=new)
        if isinstance(gradients, ActorCritic) and critic_optimizer is not None:
            of_critic: Any = gradients.critic
            update = optax.with_extra_args_support(critic_optimizer).update
            updates, new = update(
                of_critic, state.critic_optimizer, state.critic, norm=optax.global_norm(of_critic)
            )
            state = replace(
                state, critic=optax.apply_updates(state.critic, updates), critic_optimizer=new
            )
        return replace(state, step=state.step + 1)

    def skip(state: TrainState) -> TrainState:
        return replace(state, step=state.step + 1)

    return jax.lax.cond(finite, take, skip, state), Applied(grad_norm=norm, is_finite=finite)
