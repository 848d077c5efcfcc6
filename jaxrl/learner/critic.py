"""The value model of PPO: a linear head on the policy's own layers, or on a copy of them that it trains.

A value speaks of the state before the target of its position is sampled. R rows, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl.learner.optimizer import clip_to
from models.config import ModelConfig
from models.decoder import Decoder
from models.sharding import policy_shardings


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class Critic:
    """Parameters of the critic. The head starts at zero, so that a fresh critic says 0 everywhere."""

    trunk: (
        Decoder | None
    )  # float32; None: the policy's layers, which the value loss then trains too
    weight: Any  # [D] float32
    bias: Any  # [] float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class ActorCritic:
    """What one optimizer step of PPO trains; also the shape of its gradients."""

    policy: Decoder
    critic: Critic


def make_critic(policy: Decoder, *, shared: bool) -> Critic:
    """A critic whose trunk is the policy's (`shared`) or a copy of it."""
    return Critic(
        trunk=None if shared else jax.tree.map(jnp.copy, policy),
        weight=jnp.zeros(policy.config.width, jnp.float32),
        bias=jnp.zeros((), jnp.float32),
    )


def critic_shardings(config: ModelConfig, mesh: Mesh, *, shared: bool) -> Critic:
    """A Critic of shardings: the trunk lies as the policy does, the head is replicated."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    trunk = None if shared else policy_shardings(config, mesh)
    return Critic(trunk=trunk, weight=everywhere, bias=everywhere)


def values_of(critic: Critic, hidden: jax.Array) -> jax.Array:
    """Values [R, T] float32 of the trunk's final hidden states [R, T, D]."""
    products = jnp.einsum("rtd,d->rt", hidden.astype(jnp.float32), critic.weight)
    return products + critic.bias[None, None]


def critic_adam(
    *, learning_rate: float, max_grad_norm: float
) -> optax.GradientTransformationExtraArgs:
    """Adam at a constant rate without decay, the critic's gradient norm clipped by itself (0: not)."""
    return optax.chain(clip_to(max_grad_norm), optax.adam(learning_rate))
