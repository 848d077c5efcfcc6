"""Equations of the scaling book, one function each. Standard library only.

Source: "How to Scale Your Model", jax-ml.github.io/scaling-book; each docstring names its chapter.
What the book shares with this package's own predictions (exact counts, collectives, cache sizes)
stands in `cost`, `kernels`, `memory` and `hardware`; here are its rules of thumb, as printed.

Letters: B sequences (or tokens, where `tokens` says so), T tokens, L layers, D width, N query
heads, K kv heads, H head size, F ffw, V vocabulary, E experts, k experts in use, C peak [flop/s],
W bandwidth [bytes/s], alpha = C / W [flop/byte]. Rates are per device unless a name says otherwise.
"""

from __future__ import annotations

import math

from models.config import ModelConfig

BFLOAT16_BYTES = 2
DAY_S = 86400.0

# -- devices (gpus chapter) ------------------------------------------------------------------------


def vector_lanes(multiprocessors: int, subpartitions: int = 4, lanes: int = 32) -> int:
    """float32 lanes ("CUDA cores") of a GPU: multiprocessors * subpartitions * lanes."""
    return multiprocessors * subpartitions * lanes


def vector_flops_per_s(lanes: int, clock_hz: float, flops_per_cycle: int = 1) -> float:
    """Peak of the vector units; a fused multiply-add counts 2 per cycle."""
    return lanes * clock_hz * flops_per_cycle


def clock_hz(flops_per_s: float, lanes: int, flops_per_cycle: int = 2) -> float:
    """Clock that a vector peak implies [Hz]."""
    return flops_per_s / (lanes * flops_per_cycle)


def links_bytes_per_s(links: int, bytes_per_s: float) -> float:
    """Egress over `links` equal links, or through as many equal ports."""
    return links * bytes_per_s


def node_bytes_per_s(switch_bytes_per_s: float, gpus: int, gpu_bytes_per_s: float) -> float:
    """What all GPUs of a node exchange: the slower of its switches and of their own links."""
    return min(switch_bytes_per_s, gpus * gpu_bytes_per_s)


def bits_to_bytes_per_s(bits_per_s: float) -> float:
    """A network's bits in bytes."""
    return bits_per_s / 8


def memory_sweep_s(hbm_bytes: float, hbm_bytes_per_s: float) -> float:
    """Time to read all of a memory once (applied-inference chapter)."""
    return hbm_bytes / hbm_bytes_per_s


# -- rooflines (roofline chapter) ------------------------------------------------------------------


def intensity(flops: float, moved_bytes: float) -> float:
    """Flops per byte of an algorithm."""
    return flops / moved_bytes


def critical_batch_tokens(
    flops_per_s: float, bytes_per_s: float, *, weight_to_compute_bits: float = 1.0
) -> float:
    """Tokens from which products are bound by compute: beta C / W.

    `weight_to_compute_bits` is beta, bits of a stored weight over bits of a computed value: 1/2 for
    int8 weights in bfloat16 products. With a link's rate it is the bound of data parallelism, in
    tokens per device (training, gpus chapters).
    """
    return weight_to_compute_bits * flops_per_s / bytes_per_s


def critical_moe_batch_tokens(dense_tokens: float, experts: int, active: int) -> float:
    """Tokens that keep every expert's weights busy: the dense bound times E / k."""
    return dense_tokens * experts / active


def dot_product_intensity(size: int, value_bytes: int = BFLOAT16_BYTES) -> float:
    """[n] . [n] -> []: (2n - 1) flops over 2n + 1 values."""
    return intensity(2 * size - 1, value_bytes * (2 * size + 1))


def per_example_matmul_intensity(batch: int, inner: int, columns: int, value_bytes: int) -> float:
    """[B, D] . [B, D, F]: every example has weights of its own; tends to 2 / value_bytes."""
    values = batch * inner + batch * inner * columns + batch * columns
    return intensity(2.0 * batch * inner * columns, value_bytes * values)


# -- collectives (sharding, gpus chapters) ---------------------------------------------------------


def replicas(*unused_axes: int) -> int:
    """Copies of an array on a mesh: the product of the axes that do not shard it."""
    return math.prod(unused_axes)


def gather_s(array_bytes: float, bytes_per_s: float) -> float:
    """All-gather or reduce-scatter over many devices: A / W, the (n-1)/n left out."""
    return array_bytes / bytes_per_s


def all_to_all_s(array_bytes: float, parts: int, bytes_per_s: float) -> float:
    """Each of `parts` (GPUs, or nodes) sends over `bytes_per_s`: A / (parts W)."""
    return array_bytes / (parts * bytes_per_s)


def tree_gather_bytes_per_s(children: int, bytes_per_s: float) -> float:
    """Bandwidth that one level of a switched tree gives to all-gathers: W d / (d - 1)."""
    return bytes_per_s * children / (children - 1)


def latency_bound_bytes(devices: int, bytes_per_s: float, hop_s: float) -> float:
    """Array size below which a ring collective is bound by latency: n W t (inference chapter)."""
    return devices * bytes_per_s * hop_s


# -- counts of a transformer (transformers chapter) ------------------------------------------------


def mlp_parameters(model: ModelConfig, experts: int = 1) -> int:
    """Parameters of all MLPs: 3 L D F E gated, 2 L D F E otherwise."""
    matrices = 3 if model.gated_mlp else 2
    return matrices * model.num_layers * model.width * model.ffw_size * experts


def attention_parameters(model: ModelConfig) -> int:
    """Parameters of all attention projections: 2 L D (N + K) H."""
    heads = model.num_heads + model.num_kv_heads
    return 2 * model.num_layers * model.width * heads * model.head_size


def vocabulary_parameters(model: ModelConfig) -> int:
    """Embedding and head: V D if tied, 2 V D otherwise."""
    return (1 if model.tied_embeddings else 2) * model.vocab_size * model.width


def moe_parameters(model: ModelConfig, experts: int) -> int:
    """Matrices of the model with `experts` copies of each MLP; the router and norms left out."""
    return (
        mlp_parameters(model, experts) + attention_parameters(model) + vocabulary_parameters(model)
    )


def attention_share(model: ModelConfig) -> float:
    """Attention's share of the parameters of a layer's matrices."""
    attention = attention_parameters(model)
    return attention / (attention + mlp_parameters(model))


def context_of_equal_attention(model: ModelConfig) -> float:
    """Context at which the scores cost as many flops as the projections [tokens].

    Per token 4 T N H against 4 D (N + K) H: T = D (N + K) / N, which is 2 D with as many kv heads.
    """
    return model.width * (model.num_heads + model.num_kv_heads) / model.num_heads


def train_flops(parameters: float, tokens: float) -> float:
    """Forward and backward: 6 flops per parameter and token."""
    return 6 * parameters * tokens


def forward_flops(parameters: float, tokens: float) -> float:
    """Forward only: 2 flops per parameter and token."""
    return 2 * parameters * tokens


def saved_activation_bytes(
    tokens: float, widths: int, layers: int, value_bytes: int = BFLOAT16_BYTES
) -> float:
    """Kept for backward when each layer saves values of `widths` columns in all per token.

    `widths` is D with block recomputation, 20 D without any, D + 2 F for the MLP's checkpoints.
    """
    return value_bytes * tokens * widths * layers


def activation_bytes(tokens: float, width: int, value_bytes: int = BFLOAT16_BYTES) -> float:
    """One activation [tokens, D]."""
    return tokens * width * value_bytes


# -- training (training, applied-training, gpus chapters) ------------------------------------------


def available_flops(device_seconds: float, flops_per_s: float) -> float:
    """What devices could do at their peak in that time."""
    return device_seconds * flops_per_s


def utilisation(flops: float, device_seconds: float, flops_per_s: float) -> float:
    """Model flops over what the devices could do: MFU."""
    return flops / available_flops(device_seconds, flops_per_s)


def run_s(flops: float, devices: float, flops_per_s: float, utilisation: float = 1.0) -> float:
    """Wall time of `flops` on `devices` at a given MFU [s]."""
    return flops / (devices * flops_per_s * utilisation)


def rescaled_s(seconds: float, devices: float, new_devices: float) -> float:
    """The same work on another number of devices, scaling perfectly."""
    return seconds * devices / new_devices


def tokens_per_device(tokens: float, devices: float) -> float:
    """Batch of one device."""
    return tokens / devices


def devices_of_batch(tokens: float, tokens_per_device: float) -> float:
    """Devices that a batch can be split over."""
    return tokens / tokens_per_device


def data_parallel_tokens(alpha: float, *, model_parallel: int = 1, axes: int = 1) -> float:
    """Tokens per device from which data parallelism is bound by compute: alpha / (axes * m).

    `model_parallel` nodes of one replica, each with the egress that alpha was made with; `axes`
    mesh axes whose links work together (TPU).
    """
    return alpha / (axes * model_parallel)


def data_parallel_tokens_of_nodes(alpha: float, nodes: int) -> float:
    """The same over few nodes, of which each sends (n - 1) / n of the gradient."""
    return alpha * (nodes - 1) / nodes


def max_tensor_parallel(ffw_size: float, alpha: float, node: int = 0) -> float:
    """Largest tensor axis bound by compute: F / alpha, beyond `node` devices whose links are free."""
    return node + ffw_size / alpha


def ffw_of_tensor_parallel(tensor: int, alpha: float) -> float:
    """F that a tensor axis of this size needs to be bound by compute."""
    return tensor * alpha


def mixed_tokens_per_device(alpha: float, ffw_size: float, axes: int = 2) -> float:
    """Bound of FSDP and tensor parallelism together: alpha^2 / (Mx My F); `axes` = Mx My."""
    return alpha**2 / (axes * ffw_size)


def best_fsdp_axis(tokens: float, devices: float, ffw_size: float, axes_ratio: float = 2) -> float:
    """FSDP ways that balance both collectives: sqrt(B / F * Mx / My * n); `axes_ratio` = Mx / My."""
    return math.sqrt(tokens / ffw_size * axes_ratio * devices)


def train_state_bytes(parameters: float, bytes_per_parameter: float, devices: float = 1) -> float:
    """Weights and optimizer state of one device: 10 bytes per parameter with bfloat16 weights and
    float32 Adam."""
    return parameters * bytes_per_parameter / devices


# -- inference (inference, applied-inference chapters) ---------------------------------------------


def min_decode_step_s(
    batch: float, kv_bytes: float, weight_bytes: float, bytes_per_s: float
) -> float:
    """(B KV + weights) / W; `kv_bytes` per sequence, `bytes_per_s` of all devices together."""
    return (batch * kv_bytes + weight_bytes) / bytes_per_s


def decode_tokens_per_s(batch: float, step_s: float, devices: int = 1) -> float:
    """Tokens per second, of one of `devices`."""
    return batch / step_s / devices


def weight_load_s(weight_bytes: float, devices: int, hbm_bytes_per_s: float) -> float:
    """Time for all devices to read their part of the weights once."""
    return weight_bytes / (devices * hbm_bytes_per_s)


def serving_bytes(weight_bytes: float, batch: float, kv_bytes: float) -> float:
    """Weights and the caches of `batch` sequences."""
    return weight_bytes + batch * kv_bytes


def devices_for(needed_bytes: float, hbm_bytes: float) -> float:
    """Devices whose memory holds so much (not rounded)."""
    return needed_bytes / hbm_bytes


def max_batch(devices: int, hbm_bytes: float, weight_bytes: float, kv_bytes: float) -> float:
    """Sequences that fit beside the weights (not rounded)."""
    return (devices * hbm_bytes - weight_bytes) / kv_bytes


def prefill_s(
    parameters: float, tokens: float, devices: int, flops_per_s: float, utilisation: float
) -> float:
    """Prefill of a prompt: 2 P T / (n C MFU)."""
    return run_s(forward_flops(parameters, tokens), devices, flops_per_s, utilisation)


def max_decode_tensor_parallel(ffw_size: float, batch: float, hbm_to_link: float) -> float:
    """Tensor ways until a decode step is bound by links: F / (B beta), beta = W_hbm / W_link."""
    return ffw_size / (batch * hbm_to_link)


def weight_stationary_2d_devices(width: int, ffw_size: int) -> float:
    """Devices from which sharding weights over two axes beats one: 32 (F / D) (3 / 4)^2."""
    return 32 * ffw_size / width * (3 / 4) ** 2


def evicted_tokens_per_step(batch: float, prompt_tokens: float, new_tokens: float) -> float:
    """Cached tokens that leave per step under continuous batching: B (P + G) / G."""
    return batch * (prompt_tokens + new_tokens) / new_tokens


def prefill_per_decode_servers(
    prefill_s: float, batch: float, step_s: float, new_tokens: float
) -> float:
    """Prefill servers that keep one decode server busy: t_prefill B / (t_step G)."""
    return prefill_s * batch / (step_s * new_tokens)


def requests_per_s(batch: float, step_s: float, new_tokens: float) -> float:
    """Requests that finish per second: B / (t_step G)."""
    return batch / (step_s * new_tokens)
