"""Bytes that one device must hold, by name, for learner and rollout. Standard library only.

What a compiled program adds to its arguments follows its schedule. In training the layers' activations
stand while the largest of three things comes and goes: the head's chunk of logits with the gradient of its
matrix; one layer differentiated, on several devices beside all gradients; there also the sum of that matrix's
gradient.
The sizes are those of the programs that XLA makes of `models` and `jaxrl.learner`;
tests/jaxrl/test_memory_plan.py compares them with the compiler's own plan.
Letters: B rows, T tokens, L layers, D width, N query heads, K kv heads, H head size, F ffw, V vocabulary,
c tokens whose logits exist at once; a prime marks a size divided over the tensor axis.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from models.config import ModelConfig
from models.rows import MAX_SEGMENTS, PrefixRows, scores_at_once
from roofline.cost import KV_BLOCK_TOKENS, Remat
from roofline.kernels import FLOAT32_BYTES, Layout, cached_bytes, ceil_div, round_up, shard
from roofline.moments import (
    Rows,
    adapted_halves,
    forward_bytes,
    fused_bytes,
    gradients_beside,
    scoring_bytes,
    training_bytes,
)
from roofline.parameters import held_parameters, trained_parameters
from roofline.phases import Phase

HELD = frozenset({
    "parameters", "adapter", "gradients", "optimizer", "reference", "snapshots", "fused_weights",
    "other_weights", "kv_cache", "prefixes",
})  # fmt: skip
"""Names of what stands before and after a program; the others come and go within one."""
FORWARD_SCORES, BACKWARD_SCORES = 2, 3
"""Arrays of them: the scores and the weights; in backward also the gradient."""
BACKWARD_SHARE, REMADE_SHARE = 1.9, 0.4
"""Elsewhere than on one GPU with cuDNN's attention (`roofline.moments` counts there): values of one layer in
backward, per value of its weight products: gradients and what is always made
again, and more where the products are. Least squares over 22 programs of small models compiled for a CPU
(float32: 1.7 to 2.5, and 0.9 more) and an H200 (bfloat16: 1.2 to 2.7, and 0.1 more)."""
HIDDEN_ARRAYS = 4
"""Arrays [B, T, D] beside the head's logits: its input and gradient, as they are and in chunks."""


def memory_per_device(
    model: ModelConfig,
    layout: Layout,
    *,
    trains: bool = False,
    rows: int = 0,
    row_tokens: int = 0,
    remat: Remat = "none",
    chunk_tokens: int = 0,
    slots: int = 0,
    max_len: int = 0,
    prefixes: PrefixRows | None = None,
    snapshots: int = 0,
) -> dict[str, int]:
    """Bytes by name on the busiest device: what stays, and the largest thing that comes and goes.

    `trains`: parameters in the stored type, float32 gradients, AdamW's mean and square in float32,
    activations of one micro-batch of [rows, row_tokens] and the logits of `chunk_tokens` tokens (0:
    of all tokens at once). `slots`, `max_len`, `prefixes`: key and value cache of the rollout; with
    `prefixes` max_len is what a slot holds besides its row of them. `snapshots`:
    copies of the weights in the compute type held by the rollout (2 while a new version arrives). Fewer slots
    for a batch's last samples take the place of all, array by array, and add nothing. Of an
    adapted model the adapter alone has gradients and optimizer state and is what snapshots copy.

    Raises:
        ValueError: the layout does not divide the model.
    """
    sizes: dict[str, float] = {}
    if trains:
        trained = trained_parameters(model, layout)
        sizes["parameters"] = held_parameters(model, layout) * layout.param_bytes
        if model.lora:
            sizes["adapter"] = trained * FLOAT32_BYTES
        sizes["gradients"] = trained * FLOAT32_BYTES
        sizes["optimizer"] = trained * 2 * FLOAT32_BYTES
        tokens = _local(layout, rows) * row_tokens
        chunk = _chunk(layout, rows, row_tokens, chunk_tokens)
        sizes["activations"] = _kept_bytes(model, layout, tokens, remat)
        sizes["working"] = _training_bytes(model, layout, rows, row_tokens, chunk, remat)
    if snapshots:
        sizes["snapshots"] = _snapshot_bytes(model, layout, snapshots)
    if slots:
        sizes["kv_cache"] = kv_cache_bytes(model, layout, slots, max_len)
        if prefixes is not None:
            sizes["prefixes"] = kv_cache_bytes(model, layout, prefixes.rows, prefixes.tokens)
        vocab = shard(model, layout).vocab
        sizes["step_logits"] = 2 * _local(layout, slots) * vocab * FLOAT32_BYTES
        if layout.copies_weights:
            sizes["fused_weights"] = _matrix_bytes(model, layout)
    return {name: round(size) for name, size in sizes.items()}


def program_memory(
    model: ModelConfig,
    layout: Layout,
    phase: Phase,
    *,
    rows: int = 0,
    row_tokens: int = 0,
    remat: Remat = "none",
    chunk_tokens: int = 0,
    prefixes: PrefixRows | None = None,
) -> dict[str, int]:
    """Bytes by name on the busiest device while one program of the phase runs, without what only
    other programs use.

    rows and row_tokens are those of the packed batch, of the prompts, or of the slots and their cache
    (which have `prefixes` besides).

    Raises:
        ValueError: a phase that is no program, or a layout that does not divide the model.
    """
    of_training = ("parameters", "adapter", "gradients", "optimizer")
    every = memory_per_device(
        model, layout, trains=True, rows=rows, row_tokens=row_tokens, remat=remat,
        chunk_tokens=chunk_tokens, slots=rows, max_len=row_tokens, prefixes=prefixes, snapshots=1,
    )  # fmt: skip
    tokens = _local(layout, rows) * row_tokens
    match phase:
        case Phase.TRAIN:
            names = ("parameters", "adapter", "gradients", "activations", "working")
        case Phase.OPTIMIZER:
            names = ("adapter", "gradients", "optimizer") if model.lora else of_training
        case Phase.DECODE:
            every["fused_weights"] = round(_matrix_bytes(model, layout))
            every["other_weights"] = every["snapshots"] - every["fused_weights"]
            names = ("fused_weights", "other_weights", "kv_cache", "prefixes", "step_logits")
        case Phase.SCORE | Phase.REFERENCE:
            chunk = _chunk(layout, rows, row_tokens, chunk_tokens)
            every["scoring"] = round(_scoring_bytes(model, layout, rows, row_tokens, chunk))
            names = ("parameters", "adapter", "scoring")
        case Phase.PREFILL:
            kv = 2 * shard(model, layout).kv * layout.kv_bytes
            every["prompt_cache"] = model.num_layers * tokens * kv
            every["layer"] = round(_forward_bytes(model, layout, rows, row_tokens))
            every["layer"] += 0 if layout.written_out else tokens * kv
            every["keys_laid_out"] = every["prompt_cache"] // 2
            names = ("snapshots", "prompt_cache", "layer", "keys_laid_out")
        case Phase.PUBLISH:
            whole = trained_parameters(model, layout) * layout.fsdp * layout.compute_bytes
            if model.lora:
                one = replace(layout, fsdp=1)
                whole = trained_parameters(model, one) * layout.compute_bytes
            every["copy"] = whole
            several = layout.fsdp > 1 and not model.lora
            every["gathering"] = _under_way_bytes(model, layout) if several else 0
            names = ("adapter" if model.lora else "parameters", "copy", "gathering")
        case _:
            raise ValueError(f"phase {phase} is no program")
    return {name: every[name] for name in names if name in every}


def kv_cache_bytes(model: ModelConfig, layout: Layout, slots: int, max_len: int) -> int:
    """Keys and values of one device, 2 L B' S K' H values and their scales; S rounded up to the cache's
    blocks."""
    tokens = _local(layout, slots) * round_up(max_len, KV_BLOCK_TOKENS)
    return round(2 * model.num_layers * tokens * cached_bytes(shard(model, layout), layout))


def _under_way_bytes(model: ModelConfig, layout: Layout) -> int:
    """Arrays as gathered, their split dimension first, before they are laid out as wanted: on a GPU the two
    largest, one laid out while the next one arrives; on a CPU the outer matrices and those that read the
    width: gate, up, the queries' and the keys'."""
    part, deep = shard(model, layout), model.num_layers
    matrices = [part.vocab] * (1 if model.tied_embeddings else 2)
    experts = max(1, model.num_experts // layout.expert)
    if layout.written_out:
        under_way = [*matrices, deep * part.query, deep * part.kv, deep * part.ffw * experts]
        under_way += [deep * part.ffw * experts] if model.gated_mlp else []
    else:
        inside = (part.query, part.ffw * experts, part.ffw * experts)
        under_way = sorted([*matrices, *(deep * size for size in inside)])[-2:]
    return sum(under_way) * part.width * layout.compute_bytes


def _rows(
    model: ModelConfig,
    layout: Layout,
    rows: int,
    row_tokens: int,
    chunk: int,
    *,
    prompts: bool = False,
) -> Rows:
    """One device's rows; `prompts` share one mask."""
    local = _local(layout, rows)
    return Rows(
        tokens=local * row_tokens, mask_bytes=(1 if prompts else local) * row_tokens**2,
        scores=_scores(model, layout, rows, row_tokens), logit_tokens=chunk,
        at_once=rows * model.num_heads * row_tokens**2 <= scores_at_once(layout.attention),
    )  # fmt: skip


def _local(layout: Layout, rows: int) -> int:
    """Rows of the fullest device."""
    return ceil_div(rows, layout.row_shards)


def _chunk(layout: Layout, rows: int, row_tokens: int, chunk_tokens: int) -> int:
    """c on one device: chunks run along the row, T in ceil(T / max(1, chunk // B)) equal parts."""
    parts = ceil_div(row_tokens, max(1, chunk_tokens // max(1, rows))) if chunk_tokens else 1
    return _local(layout, rows) * ceil_div(row_tokens, max(1, parts))


def _kept_bytes(model: ModelConfig, layout: Layout, tokens: int, remat: Remat) -> float:
    """Kept for backward: of each layer its input, the attended heads and, where nothing is
    recomputed, the results of all its weight products but the last; by cuDNN's attention also one
    float32 log-sum-exp for every segment that a row may have, head and token."""
    part = shard(model, layout)
    values = part.width + part.query
    if remat == "none":
        values += _product_values(model, layout)
    sums = MAX_SEGMENTS * part.heads * FLOAT32_BYTES if layout.attention == "cudnn" else 0
    return float(model.num_layers * tokens * (values * layout.compute_bytes + sums))


def _product_values(model: ModelConfig, layout: Layout) -> int:
    """Results of one token's weight products in a layer: q, k, v, attention out, gate and up."""
    part, halves = shard(model, layout), 2 if model.gated_mlp else 1
    return part.query + 2 * part.kv + part.width + halves * _hidden_units(model, layout)


def _hidden_units(model: ModelConfig, layout: Layout) -> int:
    """F' of the MLP, or of all experts that a token goes through."""
    return shard(model, layout).ffw * max(1, model.experts_per_token)


def _training_bytes(
    model: ModelConfig, layout: Layout, rows: int, row_tokens: int, chunk: int, remat: Remat
) -> float:
    """What comes and goes beside the kept activations: the head's backward, or a layer's; on several devices
    at last the sum of the head's gradient, as accumulated and laid out anew for it, beside the embedding's
    in the compute type and the layers'. Until then the head's gradient stands beside the layers' backward,
    on CPUs also the gathered matrix and the embedding's gradient."""
    if layout.written_out:
        held = _rows(model, layout, rows, row_tokens, chunk)
        return training_bytes(model, layout, held, remade=remat == "block")
    part, e = shard(model, layout), layout.compute_bytes
    matrix, tokens = part.vocab * part.width, _local(layout, rows) * row_tokens
    logits = chunk * part.vocab * (FLOAT32_BYTES + e)  # and their gradient
    of_matrix = 0 if model.lora else matrix * FLOAT32_BYTES
    head = _copied_matrix(model, layout) + of_matrix + logits
    head += HIDDEN_ARRAYS * tokens * part.width * e
    if layout.fsdp > 1:
        head += _weight_bytes(model, layout) / 2  # backward's first layer arrives meanwhile
    gradients = trained_parameters(model, layout) * FLOAT32_BYTES
    if layout.devices == 1 and not model.lora and layout.attention == "cudnn":
        sums = tokens * MAX_SEGMENTS * part.heads * FLOAT32_BYTES
        return max(head, sums + fused_bytes(model, layout, tokens, remade=remat == "block"))
    layer = gradients_beside(model, layout, gradients) + _weight_bytes(model, layout)
    layer += _backward_bytes(model, layout, rows, row_tokens, remat)
    if layout.devices > 1 and not model.lora:
        layer += of_matrix
    summed = 0.0
    if layout.row_shards > 1 and not model.lora:
        outer = (1 if model.tied_embeddings else 2) * matrix * FLOAT32_BYTES / layout.fsdp
        summed = gradients - outer + 2 * of_matrix + matrix * e
    return float(max(head, layer, summed))


def _backward_bytes(
    model: ModelConfig, layout: Layout, rows: int, row_tokens: int, remat: Remat
) -> float:
    """One layer differentiated: what backward makes again of it, the gradients of its products, and
    the float32 scores of one block of attention."""
    e, tokens = layout.compute_bytes, _local(layout, rows) * row_tokens
    values = BACKWARD_SHARE * _product_values(model, layout)
    if remat == "block":
        values += REMADE_SHARE * _product_values(model, layout)
    values += _repeated(model, layout)
    scores = _scores(model, layout, rows, row_tokens)
    return tokens * values * e + BACKWARD_SCORES * scores * FLOAT32_BYTES


def _scoring_bytes(
    model: ModelConfig, layout: Layout, rows: int, row_tokens: int, chunk: int
) -> float:
    """What comes and goes in a forward pass: over fsdp the embedding as it arrives and as rows are read from
    it, the inside of one layer, or one chunk of logits."""
    if layout.written_out:
        return scoring_bytes(model, layout, _rows(model, layout, rows, row_tokens, chunk))
    part, matrix = shard(model, layout), _copied_matrix(model, layout)
    logits = chunk * part.vocab * FLOAT32_BYTES
    hidden = _local(layout, rows) * row_tokens * part.width * layout.compute_bytes
    looked_up = 2 * matrix + hidden if layout.fsdp > 1 else 0
    head = matrix + logits + hidden
    return float(max(looked_up, head, _forward_bytes(model, layout, rows, row_tokens)))


def _forward_bytes(model: ModelConfig, layout: Layout, rows: int, row_tokens: int) -> float:
    """The inside of one layer, with its input and the residual: the MLP's halves, what an adapter adds to
    them, and their product; or the queries (also rotated), keys, values, heads and scores of attention."""
    if layout.written_out:
        return forward_bytes(model, layout, _rows(model, layout, rows, row_tokens, 0, prompts=True))
    part, halves = shard(model, layout), (2 if model.gated_mlp else 1) + adapted_halves(model)
    of_tokens = _local(layout, rows) * row_tokens * layout.compute_bytes
    units = _hidden_units(model, layout) * of_tokens
    attention = (3 * part.query + 2 * part.kv + _repeated(model, layout)) * of_tokens
    attention += FORWARD_SCORES * _scores(model, layout, rows, row_tokens) * FLOAT32_BYTES
    inside = max((halves + 1) * units, attention) + 2 * model.width * of_tokens
    return float(inside + (_beside_layers(model, layout) if layout.fsdp > 1 else 0))


def _beside_layers(model: ModelConfig, layout: Layout) -> float:
    """Over fsdp, while layers run forward: the stacks of attention out and of down, whose width is last, laid
    out anew with it in front, as gathers want it; this device's part of the embedding, cast, for the head;
    and one layer's weights as gathered, with the next one's."""
    part, held = shard(model, layout), model.width // layout.fsdp
    inputs = part.query + part.ffw * max(1, model.num_experts // layout.expert)
    stacks = model.num_layers * inputs * held * layout.param_bytes
    cast = 0 if layout.param_dtype == layout.compute_dtype else part.vocab * held
    return stacks + cast * layout.compute_bytes + _weight_bytes(model, layout)


def _repeated(model: ModelConfig, layout: Layout) -> int:
    """Keys and values of one token repeated for every query head, as the kernels of attention read them."""
    return 0 if scores_at_once(layout.attention) else 2 * shard(model, layout).query


def _scores(model: ModelConfig, layout: Layout, rows: int, row_tokens: int) -> float:
    """One device's float32 scores of one block of queries: all rows' scores [B, N, T, T] in the fewest
    equal blocks of at most `scores_at_once` (models.layers.packed_attention); kernels write none."""
    most = scores_at_once(layout.attention)
    if not most:
        return 0.0
    every = rows * model.num_heads * row_tokens * row_tokens
    return every / _blocks(every, row_tokens, most) / (layout.row_shards * layout.tensor)


@functools.cache
def _blocks(scores: int, queries: int, most: int) -> int:
    """The least divisor of `queries` that makes blocks of at most `most` scores."""
    fitting = (n for n in range(1, queries + 1) if queries % n == 0 and scores <= n * most)
    return next(fitting, max(1, queries))


def _copied_matrix(model: ModelConfig, layout: Layout) -> int:
    """The head's matrix in the compute type with its width gathered; 0 where it stands so anyway."""
    if layout.fsdp == 1 and layout.compute_bytes == layout.param_bytes:
        return 0
    part = shard(model, layout)
    return part.vocab * part.width * layout.compute_bytes


def _weight_bytes(model: ModelConfig, layout: Layout) -> float:
    """One layer's weights in the compute type, and its gradients or the next layer's weights."""
    return 2 * model.layer_parameters / layout.tensor * layout.compute_bytes


def _matrix_bytes(model: ModelConfig, layout: Layout) -> float:
    """Matrices of all layers, laid side by side for decode."""
    part = shard(model, layout)
    matrices = part.width * (2 * part.query + 2 * part.kv)
    matrices += model.mlp_parameters * max(1, model.num_experts) // (layout.tensor * layout.expert)
    return float(model.num_layers * matrices * layout.compute_bytes)


def _snapshot_bytes(model: ModelConfig, layout: Layout, snapshots: int) -> float:
    """Weights in the compute type; of an adapted model one base and the adapter of each snapshot, of dealt
    experts those of the device alone."""
    whole = model.num_parameters / layout.tensor
    if layout.expert > 1:
        whole = held_parameters(model, layout)
    if model.lora:
        return (whole + snapshots * trained_parameters(model, layout)) * layout.compute_bytes
    return snapshots * whole * layout.compute_bytes
