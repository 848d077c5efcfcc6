"""Work of every phase on the busiest device, from the architecture alone. Standard library only.

Conventions, printed in every report:
  - flops are those of matrix products (a multiply-add is two), as many as the program executes:
    attention over the full packed row or the cache window actually read (nothing saved by the
    causal mask), the head on every scored token and its padding, recomputation where backward
    recomputes. Elementwise work appears as bytes.
  - hbm_bytes counts each operand of each kernel once; a fused elementwise pass is one kernel.
  - link_bytes is what one device sends: an all-gather or reduce-scatter of A bytes over n devices
    sends A (n-1)/n, an all-reduce twice that (scaling book, gpus chapter).
Letters: B rows, T tokens, S cached keys, L layers, D width, N query heads, K kv heads, H head size,
F ffw, V vocabulary; a prime marks a size divided over the tensor axis.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from models.config import ModelConfig
from models.rows import PrefixRows, SharedPrompts, attended, scores_at_once
from roofline import traffic
from roofline.adapters import (
    adapter_arrays,
    adapter_made_again,
    adapter_parameters,
    adapter_products,
)
from roofline.experts import expert_mlp, grouped
from roofline.kernels import (
    FLOAT32_BYTES,
    Layout,
    Shard,
    Work,
    all_gather,
    all_reduce,
    as_cost,
    cached_bytes,
    ceil_div,
    passes,
    product,
    round_up,
    shard,
    streaming,
)
from roofline.parameters import held_parameters, num_arrays, trained_arrays, trained_parameters
from roofline.phases import Phase, PhaseCost
from roofline.publication import publish, reshard
from roofline.step_kernels import step_kernels
from roofline.traffic import as_work

__all__ = [
    "Layout", "Remat", "checkpoint", "decode", "optimizer", "prefill", "publish", "reference",
    "reshard", "score", "train",
]  # fmt: skip

Remat = Literal["none", "block"]

KV_BLOCK_TOKENS = 32
"""The cache is read in blocks of so many tokens; equals models.cache.KEY_BLOCK."""


def prefill(
    model: ModelConfig, layout: Layout, rows: int, tokens: int, samples: int = 0
) -> PhaseCost:
    """Keys and values of `rows` prompts padded to `tokens`, copied to `samples` slots.

    Every layer, no head. Started from Python: two transfers, the prefill, the copy.
    """
    local = ceil_div(rows, layout.row_shards)
    part = shard(model, layout)
    work = _embed(local * tokens, part, layout)
    work += _layer(model, part, layout, local, tokens).times(model.num_layers)
    work += as_work(traffic.forward(model, layout, local * tokens))
    held = 2 * model.num_layers * round_up(tokens, KV_BLOCK_TOKENS) * cached_bytes(part, layout)
    work += passes(held * local, 1, 2)
    if samples:
        entering = ceil_div(samples, layout.row_shards)
        work += passes(2 * held * entering, 1, 2 * model.num_layers)
    return as_cost(Phase.PREFILL, work, layout, dispatches=4)


def decode(
    model: ModelConfig,
    layout: Layout,
    slots: int,
    kv_len: int,
    steps: int,
    prefixes: PrefixRows | None = None,
) -> PhaseCost:
    """One chunk of `steps` decode steps over `slots`, each reading `kv_len` cached tokens, rounded up
    to the cache's blocks; with `prefixes` besides what all of them read of the shared rows.
    """
    local = ceil_div(slots, layout.row_shards)
    part = shard(model, layout)
    read = round_up(kv_len, KV_BLOCK_TOKENS)
    step = _embed(local, part, layout)
    step += _layer(model, part, layout, local, 1, cached=read).times(model.num_layers)
    step += _head(local, part, layout) + _sample(local, model, part)
    if not layout.written_out:
        step = replace(step, launches=step_kernels(model, layout))
    if prefixes is not None:
        step += _shared_rows(part, layout, local, prefixes).times(model.num_layers)
    step += as_work(traffic.forward(model, layout, local))
    work = step.times(steps) + as_work(traffic.samples(layout, slots, steps))
    return as_cost(Phase.DECODE, work, layout, dispatches=1)


def score(
    model: ModelConfig,
    layout: Layout,
    row_tokens: int,
    rows: int,
    microbatches: int = 1,
    chunk_tokens: int = 4096,
    shared: SharedPrompts | None = None,
) -> PhaseCost:
    """Log-probabilities of `microbatches` packed batches of [rows, row_tokens], forward only."""
    work = _scoring(model, layout, row_tokens, rows, chunk_tokens, shared).times(microbatches)
    return as_cost(Phase.SCORE, work, layout, dispatches=microbatches)


def reference(
    model: ModelConfig,
    layout: Layout,
    row_tokens: int,
    rows: int,
    microbatches: int = 1,
    chunk_tokens: int = 4096,
    shared: SharedPrompts | None = None,
) -> PhaseCost:
    """`score` under the frozen reference: the same work."""
    work = _scoring(model, layout, row_tokens, rows, chunk_tokens, shared).times(microbatches)
    return as_cost(Phase.REFERENCE, work, layout, dispatches=microbatches)


def train(
    model: ModelConfig,
    layout: Layout,
    row_tokens: int,
    rows: int,
    microbatches: int = 1,
    remat: Remat = "none",
    chunk_tokens: int = 4096,
    shared: SharedPrompts | None = None,
) -> PhaseCost:
    """Forward and backward of `microbatches` packed batches of [rows, row_tokens], accumulated.

    Backward does two products for each one of forward, and makes the attention scores again. remat
    "block" also makes each layer's weight products again, but for the last, whose output backward
    does not read. The head's logits are always made again in backward, chunk by chunk: 4 times its
    forward in all. Under an adapter the frozen weights, embedding and head have no gradient. Where rows
    have shared prompts, a part of a row attends to these and itself, and only parts meet the head.
    """
    local = ceil_div(rows, layout.row_shards)
    part = shard(model, layout)
    tokens = local * row_tokens
    layer = _layer(model, part, layout, local, row_tokens, shared=shared)
    attention = _packed_attention(part, layout, local, row_tokens, shared)
    layers = layer.times(3) + _scores(part, layout, local, row_tokens, shared)
    if remat == "block":
        last = product(tokens, part.ffw, part.width, layout.compute_bytes)
        if model.num_experts:
            last = grouped(model, layout, tokens, part.ffw, part.width)
        layers += layer + (attention + last).times(-1)
    if model.lora:
        layers += _weight_products(model, part, layout, tokens).times(-1)
        again, together = remat == "none", layout.devices > 1
        found = adapter_made_again(model, part, layout, tokens, together=together, down=not again)
        layers += found if again else found.times(-1)
    once = layers.times(model.num_layers)
    once += _embed(tokens, part, layout).times(1 if model.lora else 2)
    head = _scored_head(local, _predicting(row_tokens, shared), part, layout, chunk_tokens)
    once += head.times(3 if model.lora else 4)
    once += _cast_weights(model, layout).times(2) + _add_gradients(model, layout)
    once += as_work(traffic.train(model, layout, tokens, local * _predicting(row_tokens, shared)))
    return as_cost(Phase.TRAIN, once.times(microbatches), layout, dispatches=microbatches)


def optimizer(model: ModelConfig, layout: Layout) -> PhaseCost:
    """Gradient norm, clipping and AdamW in float32: 32 bytes per trained parameter held.

    The norm reads the gradient (4); the update reads p, g, m, v (16) and writes p, m, v (12). With an
    adapter it alone is trained.
    """
    held, arrays = trained_parameters(model, layout), trained_arrays(model)
    work = passes(8 * held, FLOAT32_BYTES, 3 * arrays)
    work += all_reduce(FLOAT32_BYTES, layout.fsdp * layout.tensor)
    return as_cost(Phase.OPTIMIZER, work, layout, dispatches=1)


def checkpoint(model: ModelConfig, layout: Layout) -> PhaseCost:
    """The trained parameters and AdamW's two moments in float32, read once on their way to the host: 12
    bytes per parameter held. What the host and its disk take depends on neither model nor mesh."""
    read = 3.0 * FLOAT32_BYTES * trained_parameters(model, layout)
    return as_cost(
        Phase.CHECKPOINT, Work(hbm_bytes=read, streamed_bytes=read), layout, dispatches=0
    )


def _scoring(
    model: ModelConfig, layout: Layout, row_tokens: int, rows: int, chunk_tokens: int,
    shared: SharedPrompts | None,
) -> Work:  # fmt: skip
    local = ceil_div(rows, layout.row_shards)
    part = shard(model, layout)
    work = _embed(local * row_tokens, part, layout)
    work += _layer(model, part, layout, local, row_tokens, shared=shared).times(model.num_layers)
    predicting = _predicting(row_tokens, shared)
    work += _scored_head(local, predicting, part, layout, chunk_tokens)
    tokens = local * row_tokens
    work += as_work(traffic.score(model, layout, tokens, local * predicting))
    return work + _cast_weights(model, layout)


def _layer(
    model: ModelConfig, part: Shard, layout: Layout, rows: int, tokens: int, cached: int = 0,
    shared: SharedPrompts | None = None,
) -> Work:  # fmt: skip
    """One layer forward on [rows, tokens]; against `cached` keys each, or within rows when 0."""
    e, m = layout.compute_bytes, rows * tokens
    work = passes(2 * m * part.width, e, 2)  # RMSNorm: mean square, scale
    work += product(m, part.width, part.query + 2 * part.kv, e)
    rotated = 2 * m * (part.query + part.kv)
    work += passes(rotated * (2 if model.qk_norm else 1), e, 4 if model.qk_norm else 2)
    if cached:
        work += _cached_attention(part, layout, rows, cached)
    else:
        work += _packed_attention(part, layout, rows, tokens, shared)
    work += product(m, part.query, part.width, e)
    work += passes(5 * m * part.width, e, 3)  # residual sum, RMSNorm
    work += _mlp(model, part, layout, m)
    together = cached > 0 or layout.devices > 1
    work += adapter_products(model, part, layout, m, together=together)
    return work + passes(3 * m * part.width, e)  # residual sum


def _mlp(model: ModelConfig, part: Shard, layout: Layout, tokens: int) -> Work:
    """Two products and what is between them; of a mixture, those of the chosen experts."""
    if model.num_experts:
        return expert_mlp(model, part, layout, tokens)
    e, halves = layout.compute_bytes, 2 if model.gated_mlp else 1
    work = product(tokens, part.width, halves * part.ffw, e)
    work += passes((halves + 1) * tokens * part.ffw, e)
    return work + product(tokens, part.ffw, part.width, e)


def _weight_products(model: ModelConfig, part: Shard, layout: Layout, tokens: int) -> Work:
    """One product for each weight of a layer: q, k and v as one, gate and up as one."""
    e, halves = layout.compute_bytes, 2 if model.gated_mlp else 1
    return (
        product(tokens, part.width, part.query + 2 * part.kv, e)
        + product(tokens, part.query, part.width, e)
        + product(tokens, part.width, halves * part.ffw, e)
        + product(tokens, part.ffw, part.width, e)
    )


def _predicting(row_tokens: int, shared: SharedPrompts | None) -> int:
    """Positions of a row that meet the head."""
    return row_tokens - (shared.prompt_tokens if shared else 0)


def _packed_attention(
    part: Shard, layout: Layout, rows: int, tokens: int, shared: SharedPrompts | None
) -> Work:
    """Scores and mix, 4 B T T N' H flops; the float32 scores pass through memory five times. A kernel
    writes no scores and leaves out the half that the causal mask hides; keys and values are first repeated
    for every query head."""
    pairs, keys = attended(tokens, shared)
    if not scores_at_once(layout.attention):
        values = rows * (4 * tokens * part.query + 2 * keys * (part.query + part.kv))
        half = 2.0 * rows * pairs * part.query
        return Work(flops=half, hbm_bytes=float(values * layout.compute_bytes), launches=3)
    both = _scores(part, layout, rows, tokens, shared).times(2)
    return both + passes(3 * rows * part.heads * pairs, FLOAT32_BYTES, 3)


def _scores(
    part: Shard, layout: Layout, rows: int, tokens: int, shared: SharedPrompts | None
) -> Work:
    """One of the two products of attention, 2 B T T N' H flops. A kernel makes it again for half of them,
    inside what else it does."""
    pairs, keys = attended(tokens, shared)
    if not scores_at_once(layout.attention):
        return Work(flops=1.0 * rows * pairs * part.query)
    e, scores = layout.compute_bytes, rows * part.heads * pairs
    return Work(
        flops=2.0 * scores * part.query / part.heads,
        hbm_bytes=float(e * rows * (tokens * part.query + keys * part.kv) + FLOAT32_BYTES * scores),
        launches=1 if shared is None else 2,
    )


def _cached_attention(part: Shard, layout: Layout, rows: int, keys: int) -> Work:
    """One query per row: 4 B S N' H flops, bound by reading the keys and values whatever B is."""
    scores = rows * part.heads * keys
    read = Work(
        flops=4.0 * scores * part.query / part.heads,
        hbm_bytes=2.0 * rows * keys * cached_bytes(part, layout),
        launches=2,
    )
    write = passes(2 * rows * cached_bytes(part, layout), 1, 2)
    return streaming(read) + write + passes(4 * scores, FLOAT32_BYTES, 4)


def _shared_rows(part: Shard, layout: Layout, slots: int, prefixes: PrefixRows) -> Work:
    """Every lane's query over its row, whose keys and values are read once for all lanes: 4 R C P N' H
    flops; then both parts of each slot's attention joined."""
    rows, tokens = ceil_div(prefixes.rows, layout.row_shards), prefixes.tokens
    keys, lanes = round_up(tokens, KV_BLOCK_TOKENS), rows * prefixes.lanes
    scores = lanes * part.heads * keys
    read = Work(
        flops=4.0 * scores * part.query / part.heads,
        hbm_bytes=2.0 * rows * keys * cached_bytes(part, layout),
        launches=2,
    )
    moved = passes(2 * (lanes + slots) * part.query, layout.compute_bytes, 2)
    join = passes(4 * slots * part.query, FLOAT32_BYTES, 2)
    return streaming(read) + moved + join + passes(4 * scores, FLOAT32_BYTES, 3)


def _embed(tokens: int, part: Shard, layout: Layout) -> Work:
    """Rows of the embedding."""
    return passes(2 * tokens * part.width, layout.compute_bytes)


def _head(tokens: int, part: Shard, layout: Layout) -> Work:
    """Final norm and logits."""
    work = product(tokens, part.width, part.vocab, layout.compute_bytes)
    return work + passes(2 * tokens * part.width, layout.compute_bytes, 2)


def _scored_head(
    rows: int, row_tokens: int, part: Shard, layout: Layout, chunk_tokens: int
) -> Work:
    """Head, log-sum-exp, entropy and the target's logit on [rows, row_tokens], padded to chunks.

    Chunks run along the row: C = ceil(T / max(1, chunk // B)) of ceil(T / C) tokens each.
    """
    chunks = ceil_div(row_tokens, max(1, chunk_tokens // rows))
    tokens = rows * ceil_div(row_tokens, chunks)
    once = _head(tokens, part, layout) + passes(3 * tokens * part.vocab, FLOAT32_BYTES, 4)
    return once.times(chunks)


def _sample(rows: int, model: ModelConfig, part: Shard) -> Work:
    """Noise, log-softmax and argmax over all logits of each row."""
    gathered = all_gather(FLOAT32_BYTES * rows * model.vocab_size, part.vocab_shards)
    return passes(4 * rows * model.vocab_size, FLOAT32_BYTES, 8) + gathered


def _cast_weights(model: ModelConfig, layout: Layout) -> Work:
    """Stored parameters in the compute type, once. Frozen ones are stored in it; the adapter in float32."""
    if model.lora:
        both = FLOAT32_BYTES + layout.compute_bytes
        same = layout.compute_bytes == FLOAT32_BYTES
        held, arrays = adapter_parameters(model, layout), adapter_arrays(model)
        return Work() if same else passes(held, both, arrays)
    if layout.param_dtype == layout.compute_dtype:
        return Work()
    both = layout.param_bytes + layout.compute_bytes
    return passes(held_parameters(model, layout), both, num_arrays(model))


def _add_gradients(model: ModelConfig, layout: Layout) -> Work:
    """One micro-batch's gradients added to the accumulated ones, in float32."""
    return passes(3 * trained_parameters(model, layout), FLOAT32_BYTES, trained_arrays(model))
