"""Losses of preference pairs, on the device.

With margins D = sum over a completion's tokens of log policy - log reference, of the chosen and the
rejected completion of a pair; no length normalisation. All shapes [pairs], one loss per pair.
"""

from __future__ import annotations

from typing import Literal, assert_never

import jax

PreferenceLoss = Literal["dpo", "apo_zero", "apo_down"]


def preference_loss(
    chosen: jax.Array, rejected: jax.Array, *, beta: float, kind: PreferenceLoss
) -> jax.Array:
    """The loss of each pair.

    dpo: -log sigmoid(beta (D_c - D_r)) (arXiv:2305.18290 eq. 7);
    apo_zero: 1 - sigmoid(beta D_c) + sigmoid(beta D_r), chosen up and rejected down, for chosen
    completions better than the model (arXiv:2408.06266 section 4);
    apo_down: sigmoid(beta D_c) + 1 - sigmoid(beta (D_c - D_r)), both down and the rejected one
    faster, for a model better than the chosen completions (same section).

    Args:
        chosen: [pairs] float32, D of the chosen completions.
        rejected: [pairs] float32, D of the rejected ones.
        beta: inverse temperature; 0.1 in DPO, 0.05 in SmolLM3's APO.
        kind: which loss.
    """
    if kind == "dpo":
        return -jax.nn.log_sigmoid(beta * (chosen - rejected))
    if kind == "apo_zero":
        return 1.0 - jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(beta * rejected)
    if kind == "apo_down":
        return jax.nn.sigmoid(beta * chosen) + 1.0 - jax.nn.sigmoid(beta * (chosen - rejected))
    assert_never(kind)
