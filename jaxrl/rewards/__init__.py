"""Verifiers, and the pool of processes that runs them beside the rollout. Nothing here loads jax."""
