"""Kernels of one decode step as XLA fuses it for a GPU, one by one. Standard library only.

Read from the programs that it makes of `models` and `jaxrl.rollout.sampling` for one H200 in bfloat16. A
normalisation or a softmax is one kernel there, where a CPU has several; what stands between two products is
one with the residual sum or the rotation beside it. Splitting heads over devices adds about one a layer.
"""

from __future__ import annotations

from models.config import ModelConfig
from roofline.adapters import adapter_products
from roofline.experts import expert_mlp
from roofline.kernels import Layout, shard

NORMS, SUMS = 2, 2
"""Of the input of attention and of the MLP; and each one's result added to the residual."""
PROJECTIONS = 2
"""Queries, keys and values as one product; attention out."""
ATTENTION = 6
"""Rotated queries; scores, weights, mix; the new key, rotated as it is written, and the new value."""
HEAD_NORMS = 3
"""Queries and keys are taken out of their product first, and keys normalised on their own."""
EIGHT_BITS = 4
"""Of a cache in 8 bits: the largest value of each new key and value, and the scales written."""
MLP = 3
"""Gate and up as one product, what is between, and down."""
EMBEDDING, HEAD = 1, 1
"""The final norm takes the place of the last layer's sum."""
SAMPLING = 13
"""Over the logits: their largest and their exponentials' sum, each in two stages, and the blocks' masses; three
levels of their running sum; the block and its number; in it the exponentials, their running sum, the token."""
BOOKKEEPING = 15
"""Temperatures, random keys, who is alive (written, too), angles, the cache's mask, three results written, the
sequence and its state, the idle, two counters, a copy of the state, and the loop's condition: two."""


def step_kernels(model: ModelConfig, layout: Layout) -> int:
    """Of one step over any number of slots, without those that read rows shared by prompts."""
    return (
        layer_kernels(model, layout) * model.num_layers + EMBEDDING + HEAD + SAMPLING + BOOKKEEPING
    )


def layer_kernels(model: ModelConfig, layout: Layout) -> int:
    """Of one layer."""
    part = shard(model, layout)
    mlp = expert_mlp(model, part, layout, 1).launches if model.num_experts else MLP
    kernels = NORMS + SUMS + PROJECTIONS + ATTENTION + mlp
    kernels += HEAD_NORMS if model.qk_norm else 0
    kernels += EIGHT_BITS if layout.kv_scale_bytes else 0
    return kernels + adapter_products(model, part, layout, 1, together=True).launches
