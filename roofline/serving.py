"""A decode step, a prompt and a step under load on one tensor-parallel replica. Standard library
only.

A decode step reads every weight once and every cached key and value once; with few sequences its
fixed times weigh as much: four products, one attention and two all-reduces per layer. Under load a
server also computes the prompts that replace finished sequences: of B sequences that each make R
tokens, B / R finish per step, so

    time per output token = decode(B, P + R / 2) + B / R * prefill(1, P) + host

Sources: scaling book (jax-ml.github.io/scaling-book), inference chapter, "general decode step";
the operators are those of `roofline.kernel_times`. Letters: B sequences, P prompt tokens, R
response tokens, S cached tokens, L layers, D width, N query heads, K kv heads, H head size, F ffw.
"""

from __future__ import annotations

from models.config import ModelConfig
from roofline.estimate import Estimate, Factor
from roofline.kernel_times import Gpu, dtype_bytes

LAUNCH_IN_GRAPH_S = 5e-6
"""What a collective saves when it is launched inside a captured program: nccl-tests include one
launch from the host per call (5 us: XLA's own model of a GPU kernel, sol_gpu_cost_model.cc)."""
SMALLEST_COLLECTIVE_S = 1e-6
HOST_STEP_S = 200e-6
"""Scheduling, sampling and output of one step under load: assumed, not measured."""
UNCALIBRATED_SPREAD = 0.16
"""Log error of uncalibrated steps: root mean square over the 10 bf16 decode steps and the 517
serving steps (mislabelled ones left out) of the public tables. An error statistic of all rows, used
for intervals only; no prediction depends on it."""

SERVING_FACTORS = (
    Factor(name="products", parts=frozenset({"products"}), spread=0.1),
    Factor(name="attention", parts=frozenset({"attention", "passes"}), spread=0.4),
    Factor(name="collectives", parts=frozenset({"collectives"}), spread=0.3),
    Factor(name="prompts", parts=frozenset({"prompts"}), spread=0.5),
    Factor(name="host", parts=frozenset({"host"}), spread=0.7),
)
"""What differs between servers: kernels, custom all-reduces, overlap of prompts, scheduler."""


def decode_step(
    model: ModelConfig,
    device: Gpu,
    *,
    batch: int,
    kv_len: float,
    tensor: int = 1,
    dtype: str = "bf16",
    weight_dtype: str | None = None,
    kv_dtype: str = "bf16",
) -> Estimate:
    """One token for each of `batch` sequences that see `kv_len` cached tokens on average.

    `dtype`: type of the products; `weight_dtype`: type the weights are stored in, where it is
    narrower (int8 weights in bf16 products).

    Raises:
        ValueError: heads not divisible by `tensor`, or an unknown dtype.
    """
    heads, kv_heads = _heads(model, tensor)
    weight_dtype = weight_dtype or dtype
    kv_bytes = dtype_bytes(kv_dtype)
    attention = device.decode_attention_s(batch, kv_len, heads, kv_heads, model.head_size, kv_dtype)
    parts = _layers(model, device, batch, tensor, dtype, weight_dtype)
    parts["products"] += device.product_s(batch, model.vocab_size // tensor, model.width, "bf16")
    parts["attention"] = model.num_layers * attention
    cache = model.kv_bytes_per_token(kv_bytes) * kv_heads * tensor / model.num_kv_heads
    read = (_weights(model) * dtype_bytes(weight_dtype) + batch * kv_len * cache) / tensor
    flops = 2.0 * batch * _weights(model) + 4.0 * batch * kv_len * _query(model) * model.num_layers
    return _estimate(model, device, parts, flops / tensor, read, batch, tensor, dtype)


def prefill_step(
    model: ModelConfig,
    device: Gpu,
    *,
    rows: int,
    tokens: int,
    tensor: int = 1,
    dtype: str = "bf16",
    weight_dtype: str | None = None,
) -> Estimate:
    """Keys, values and the first token of `rows` prompts of `tokens` tokens: time to first token
    of a prompt that does not queue."""
    heads, kv_heads = _heads(model, tensor)
    weight_dtype = weight_dtype or dtype
    attention = device.prefill_attention_s(rows, tokens, heads, kv_heads, model.head_size)
    parts = _layers(model, device, rows * tokens, tensor, dtype, weight_dtype)
    parts["products"] += device.product_s(rows, model.vocab_size // tensor, model.width, "bf16")
    parts["attention"] = model.num_layers * attention
    inner = _weights(model) - model.vocab_size * model.width
    flops = 2.0 * rows * (tokens * inner + model.vocab_size * model.width)
    flops += 2.0 * rows * tokens * tokens * _query(model) * model.num_layers
    read = _weights(model) * dtype_bytes(weight_dtype) / tensor
    return _estimate(model, device, parts, flops / tensor, read, rows * tokens, tensor, dtype)


def serving_step(
    model: ModelConfig,
    device: Gpu,
    *,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    tensor: int = 1,
    dtype: str = "bf16",
    kv_dtype: str = "bf16",
) -> Estimate:
    """Mean time per output token of a server that always holds `batch` sequences, each of
    `prompt_tokens` and `new_tokens` tokens, prompts computed between decode steps."""
    decode = decode_step(
        model, device, batch=batch, kv_len=prompt_tokens + new_tokens / 2, tensor=tensor,
        dtype=dtype, kv_dtype=kv_dtype,
    )  # fmt: skip
    prompt = prefill_step(model, device, rows=1, tokens=prompt_tokens, tensor=tensor, dtype=dtype)
    entering = batch / new_tokens
    parts = dict(decode.parts)
    parts["prompts"] = entering * prompt.expected_s
    parts["host"] = HOST_STEP_S
    return Estimate(
        parts=parts,
        lower_s=max(decode.lower_s, decode.math_s + entering * prompt.math_s),
        upper_s=decode.upper_s + entering * prompt.upper_s,
        flops=decode.flops + entering * prompt.flops,
        math_s=decode.math_s + entering * prompt.math_s,
        spread=UNCALIBRATED_SPREAD,
    )


def _layers(
    model: ModelConfig, device: Gpu, tokens: int, tensor: int, dtype: str, weight_dtype: str
) -> dict[str, float]:
    """Everything of all layers but attention."""
    heads, kv_heads = _heads(model, tensor)
    width, ffw, halves = model.width, model.ffw_size // tensor, 2 if model.gated_mlp else 1
    shapes = (
        ((heads + 2 * kv_heads) * model.head_size, width),
        (width, heads * model.head_size),
        (halves * ffw, width),
        (width, ffw),
    )
    products = sum(device.product_s(tokens, n, k, dtype, weight_dtype) for n, k in shapes)
    moved = 2.0 * tokens * (10 * width + 2 * halves * ffw)
    return {
        "products": model.num_layers * products,
        "passes": model.num_layers * device.pass_s(moved),
        "collectives": 2 * model.num_layers * _reduce(device, 2.0 * tokens * width, tensor),
    }


def _reduce(device: Gpu, size_bytes: float, tensor: int) -> float:
    if tensor == 1:
        return 0.0
    launched = device.collective_s("all_reduce", size_bytes, tensor)
    return max(launched - LAUNCH_IN_GRAPH_S, SMALLEST_COLLECTIVE_S)


def _estimate(
    model: ModelConfig,
    device: Gpu,
    parts: dict[str, float],
    flops: float,
    read_bytes: float,
    tokens: int,
    tensor: int,
    dtype: str,
) -> Estimate:
    math_s = flops / device.peak(dtype)
    memory_s = read_bytes / device.sheet.hbm_bytes_per_s
    sent = 2 * model.num_layers * 2.0 * tokens * model.width * (tensor - 1) / tensor
    link_s = sent / device.sheet.link_bytes_per_s
    return Estimate(
        parts=parts,
        lower_s=max(math_s, memory_s, link_s),
        upper_s=math_s + memory_s + 2 * link_s,
        flops=flops,
        math_s=math_s,
        spread=UNCALIBRATED_SPREAD,
    )


def _heads(model: ModelConfig, tensor: int) -> tuple[int, int]:
    """Query and kv heads of one device; kv heads are copied where there are too few."""
    if model.num_heads % tensor or model.ffw_size % tensor:
        fits = [n for n in range(1, model.num_heads + 1) if not model.num_heads % n]
        raise ValueError(
            f"tensor={tensor} does not divide {model.num_heads} heads and ffw {model.ffw_size}; "
            f"use one of {fits}"
        )
    return model.num_heads // tensor, max(1, model.num_kv_heads // tensor)


def _query(model: ModelConfig) -> int:
    return model.num_heads * model.head_size


def _weights(model: ModelConfig) -> int:
    """Parameters that every token is multiplied with: all but the input embedding."""
    return model.num_layers * model.layer_parameters + model.vocab_size * model.width
