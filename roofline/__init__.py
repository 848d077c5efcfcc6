"""What every phase of a run should cost, and how far it is from that. Loads no jax, except in `calibrate`."""

import models

if not hasattr(models, "JAXRL_MODELS"):
    _where = getattr(models, "__file__", None) or list(models.__path__)
    raise ImportError(
        f"roofline needs jaxrl's own package 'models', but Python found {_where}. "
        "Run from another folder, or with `python -P -m ...`."
    )
