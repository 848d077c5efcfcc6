"""What stands on one device at the fullest moments of a layer whose every step a CPU writes out. Standard
library only.

Counts of arrays in the schedules that XLA makes of `models` for CPUs in float32: a layer of forward or
backward has two to four moments that may be its fullest, whichever sizes it has, and a program's peak is the
largest of them. tests/jaxrl/test_memory_plan.py compares them with compiled programs.
Letters as in `roofline.memory`; one device's tokens, heads and units.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from models.config import ModelConfig
from roofline.kernels import FLOAT32_BYTES, Layout, Shard, shard
from roofline.parameters import trained_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """Arrays that stand at once: of so many values a token, and copies of the layer's matrices."""

    units: int = 0
    """F' of a gated MLP."""
    width: int = 0
    """D."""
    query: int = 0
    """N' H."""
    kv: int = 0
    """K' H."""
    scores: int = 0
    """Float32 scores of one block of queries."""
    masks: int = 2
    """Of one byte for each token and key: all of them; also as cut into blocks."""
    mlp: int = 0
    """Matrices [D, F'], laid side by side or as they are cut out of the stack of layers."""
    attention: int = 0
    """Matrices [D, N' H] with half the keys' and values', cut out so; 2: all of them."""


HIDDEN = Moment(units=3, width=1, masks=1, mlp=1)
"""Forward: gate, up and their product wait for the last matrix."""
HALVES = Moment(units=2, width=2, masks=1, mlp=3)
"""Forward: gate and up come out of one product."""
ATTENDED = Moment(width=1, query=2, kv=3, scores=2, mlp=3, attention=1)
"""Forward: scores become weights, and the rest of the layer is cut out already."""
ATTENDED_AT_ONCE = Moment(width=1, query=1, kv=1, scores=2, masks=1, mlp=3, attention=1)
"""The same where all queries are one block: nothing was cut into blocks."""
PROJECTED = Moment(width=2, query=1, kv=2, mlp=3, attention=2)
"""Forward: queries, keys and values as one product of the layer's normalised input."""
PROJECTED_WHOLE = Moment(width=1, query=3, kv=4, mlp=3, attention=2)
"""The same where blocks of queries follow: taken apart, and the block loop's output laid out, before they are
cut."""
PROJECTED_ONE_HEAD = replace(PROJECTED_WHOLE, query=PROJECTED_WHOLE.query + 1)
"""The same of one key-value head on a device: its queries' normalisation is a step of its own, written out
before they are rotated."""
SCORES_BACK = Moment(width=4, query=5, kv=8, scores=3, attention=1)
"""Backward: scores, their weights and the weights' gradient."""
SCORES_BACK_BESIDE = Moment(width=4, query=5, kv=8, scores=3, mlp=3, attention=2)
"""The same where the layer's matrices were laid side by side, or have just arrived."""

BACKWARD_APART = (
    Moment(units=5, width=3, query=3, kv=4, mlp=2, attention=2),
    Moment(units=2, width=11, query=6, kv=6, attention=2),
    SCORES_BACK,
)
"""Backward of kept products on one device: the gradient of the product of gate and up; of the MLP's input, by
way of gate and up apart; of the scores."""
BACKWARD_APART_REMADE = (
    Moment(units=6, width=7, query=5, kv=6, mlp=2, attention=2), SCORES_BACK,
)  # fmt: skip
"""The same where the layer is made again: it stands whole while the MLP is differentiated."""
BACKWARD_BESIDE = (
    Moment(units=8, width=3, query=3, kv=4, mlp=3, attention=2),
    Moment(units=4, width=8, query=5, kv=6, mlp=3, attention=2),
    SCORES_BACK_BESIDE,
)
"""Backward on several devices, gate and up one array: it and its gradient stand twice, as they are and as a
product reads them."""
BACKWARD_GATHERED = (
    Moment(units=8, width=7, query=5, kv=6, mlp=3, attention=2), SCORES_BACK_BESIDE,
)  # fmt: skip
"""The same where weights are gathered: attention is made again before the MLP is done."""
BACKWARD_BESIDE_REMADE = (
    Moment(units=9, width=7, query=6, kv=8, mlp=2, attention=2), SCORES_BACK_BESIDE,
)  # fmt: skip
"""The product of queries, keys and values stands beside them; as it does, cut out of what was kept in one
piece, where the tensor axis divides them."""
BACKWARD_BESIDE_ADAPTED = (Moment(units=11, width=5, query=4, kv=6, mlp=2, attention=2),)
BACKWARD_APART_ADAPTED = Moment(units=9, width=4, query=3, kv=5, mlp=2, attention=2)
"""Each half that an adapter changes is the sum of two products."""

BACKWARD_FUSED = (Moment(units=3, width=3, query=8),)
"""Backward of kept products on one GPU in 16 bits: what cuDNN's attention gives back and what it read."""
BACKWARD_FUSED_REMADE = (
    Moment(units=4, width=4, query=5, kv=1, mlp=2, attention=2),
    Moment(units=3, width=4, query=8, attention=1),
)  # fmt: skip
"""The same where the layer is made again: while the MLP is differentiated, and attention."""

HEAD_LOGITS, HEAD_WIDTH = 4, 4
"""Arrays of one chunk's logits in backward, with their gradient and what a product reads of it; and [B, T, D]
beside them: the head's input and its gradient, as they are and in chunks."""
ADAPTED_HEAD_LOGITS = 2
"""Where the head's matrix has no gradient."""
SCORED_LOGITS, SCORED_LOGITS_DIVIDED = 1, 3
"""In forward: what follows from the logits takes their place; where the tensor axis divides the vocabulary,
devices agree on the largest first, and the logits less it and the target's stand beside them."""
GATHERED_MATRIX = 2
"""The embedding as it arrived, and as it is read."""
ROWS_SHARE_LAYER, ROWS_SHARE_HEAD, ROWS_SHARE_SUM = 2, 2, 4
"""The head's matrix in gradients where devices share the rows: accumulated, and zeros for the embedding's; at
last also the sum, before and after."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """One device's part of a batch."""

    tokens: int
    mask_bytes: float
    """Who sees whom, one byte each."""
    scores: float
    """Float32 scores of one block of queries."""
    at_once: bool = False
    """That block is all of them."""
    logit_tokens: int = 0
    """c, tokens whose logits exist at once."""


def training_bytes(model: ModelConfig, layout: Layout, rows: Rows, *, remade: bool) -> float:
    """What comes and goes beside the kept activations: a layer's backward, the head's, or at last the sum of
    the head's gradient over the devices that share the rows; beside what stands of the layers' gradients."""
    part = shard(model, layout)
    matrix = part.vocab * part.width * FLOAT32_BYTES
    gathered = matrix if layout.fsdp > 1 else 0
    gradients = float(trained_parameters(model, layout) * FLOAT32_BYTES)
    moments = _backward_moments(model, layout, remade=remade)
    layer = _largest(model, layout, rows, moments)
    beside = HEAD_WIDTH * rows.tokens * part.width * FLOAT32_BYTES
    beside += rows.mask_bytes + rows.tokens * model.head_size * FLOAT32_BYTES + gathered
    logits = rows.logit_tokens * part.vocab * FLOAT32_BYTES
    if model.lora:
        gradients = gradients_beside(model, layout, gradients)
        return gradients + max(layer, beside + ADAPTED_HEAD_LOGITS * logits)
    gradients -= (1 if model.tied_embeddings else 2) * matrix / layout.fsdp
    gradients = gradients_beside(model, layout, gradients)
    if layout.row_shards == 1:
        return gradients + max(layer, beside + HEAD_LOGITS * logits + matrix)
    head = beside + HEAD_LOGITS * logits + ROWS_SHARE_HEAD * matrix
    summed = beside + ROWS_SHARE_SUM * matrix
    return gradients + max(layer + ROWS_SHARE_LAYER * matrix, head, summed)


def gradients_beside(model: ModelConfig, layout: Layout, gradients: float) -> float:
    """Of one micro-batch's `gradients`, what stands while a layer is differentiated: all on several devices; on
    one each layer's are added to the sums before the next layer's are made."""
    return gradients / model.num_layers if layout.devices == 1 else gradients


def scoring_bytes(model: ModelConfig, layout: Layout, rows: Rows) -> float:
    """What comes and goes in a forward pass: the embedding as it arrives, the inside of a layer, or one chunk
    of logits."""
    part = shard(model, layout)
    matrix = part.vocab * part.width * FLOAT32_BYTES if layout.fsdp > 1 else 0
    hidden = rows.tokens * part.width * FLOAT32_BYTES
    arrays = SCORED_LOGITS_DIVIDED if part.vocab_shards > 1 else SCORED_LOGITS
    logits = arrays * rows.logit_tokens * part.vocab * FLOAT32_BYTES
    return max(
        GATHERED_MATRIX * matrix + hidden,
        matrix + forward_bytes(model, layout, rows),
        matrix + hidden + logits,
    )


def forward_bytes(model: ModelConfig, layout: Layout, rows: Rows) -> float:
    """Most that stands inside a layer of forward."""
    hidden = replace(HIDDEN, units=HIDDEN.units + adapted_halves(model))
    attended = ATTENDED_AT_ONCE if rows.at_once else ATTENDED
    one_head = shard(model, layout).kv == model.head_size
    in_blocks = PROJECTED_ONE_HEAD if one_head else PROJECTED_WHOLE
    beside = (HALVES, PROJECTED if rows.at_once else in_blocks) if layout.devices > 1 else ()
    return _largest(model, layout, rows, (hidden, attended, *beside))


def fused_bytes(model: ModelConfig, layout: Layout, tokens: int, *, remade: bool) -> float:
    """Most that stands inside a layer of backward on one GPU, with its rotation's angles; what attention kept
    for its own backward is left out."""
    moments = BACKWARD_FUSED_REMADE if remade else BACKWARD_FUSED
    rows = Rows(tokens=tokens, mask_bytes=0.0, scores=0.0)
    return _largest(model, layout, rows, moments) / FLOAT32_BYTES * layout.compute_bytes


def adapted_halves(model: ModelConfig) -> int:
    """Of gate and up, those that an adapter adds a second product to."""
    targets = model.lora.targets if model.lora else ()
    return sum(name in targets for name in (("gate", "up") if model.gated_mlp else ("up",)))


def _backward_moments(model: ModelConfig, layout: Layout, *, remade: bool) -> tuple[Moment, ...]:
    if model.lora and layout.devices > 1:
        return BACKWARD_BESIDE_ADAPTED
    if model.lora:
        return (replace(BACKWARD_APART_ADAPTED, units=5 + 2 * adapted_halves(model)),)
    if layout.devices == 1:
        return BACKWARD_APART_REMADE if remade else BACKWARD_APART
    if remade:
        moments, cut_out = BACKWARD_BESIDE_REMADE, layout.fsdp > 1 and layout.tensor > 1
    else:
        moments = BACKWARD_GATHERED if layout.fsdp > 1 else BACKWARD_BESIDE
        cut_out = layout.tensor > 1
    if not cut_out:
        return moments
    return tuple(replace(one, query=one.query + 1, kv=one.kv + 2) for one in moments)


def _largest(model: ModelConfig, layout: Layout, rows: Rows, moments: tuple[Moment, ...]) -> float:
    part = shard(model, layout)
    return max(_bytes(model, part, rows, moment) for moment in moments)


def _bytes(model: ModelConfig, part: Shard, rows: Rows, moment: Moment) -> float:
    gated = 1.0 if model.gated_mlp else 2 / 3
    units = gated * moment.units * part.ffw * max(1, model.experts_per_token)
    of_token = units + moment.width * part.width + moment.query * part.query + moment.kv * part.kv
    of_token += model.head_size  # cosine and sine of its rotation
    mlp = gated * moment.mlp * part.ffw * max(1, model.num_experts)
    matrices = part.width * (mlp + moment.attention * (part.query + part.kv))
    values = rows.tokens * of_token + matrices + moment.scores * rows.scores
    return FLOAT32_BYTES * values + moment.masks * rows.mask_bytes
