"""The policy: what it computes, where its arrays live, how it is read and written. No RL in here."""

JAXRL_MODELS = True
"""Marks this package as jaxrl's own `models`; `jaxrl` and `roofline` check for it on import."""
