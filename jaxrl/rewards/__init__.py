"""Verifying completions beside the rollout: a pool of processes. Nothing here loads jax."""

from jaxrl.rewards.pool import Item, RewardPool, RewardStats, VerifierError

__all__ = ["Item", "RewardPool", "RewardStats", "VerifierError"]
