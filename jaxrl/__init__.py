"""Reinforcement learning of language models on one node, beside its roofline."""

import models

if not hasattr(models, "JAXRL_MODELS"):
    _where = getattr(models, "__file__", None) or list(models.__path__)
    raise ImportError(
        f"jaxrl needs its own package 'models', but Python found {_where}. "
        "Run from another folder, or with `python -P -m ...`."
    )
