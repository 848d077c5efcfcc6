"""Kinds of whole steps: decode with few sequences, serving under load, training. Standard library
only.

No row of these kinds was used to fit a predictor: the operators come from tables of single kernels
and collectives, what a framework does comes from its documentation. Two things were chosen with
these rows in view: which terms a step is made of, and how far calibration lets a factor go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from models.config import ModelConfig
from roofline.estimate import Estimate, Factor, fit_stack
from roofline.kernel_times import Gpu, gpu
from roofline.network import Network
from roofline.serving import SERVING_FACTORS, decode_step, serving_step
from roofline.training import (
    TRAINING_FACTORS,
    Framework,
    Parallel,
    Recompute,
    TrainStep,
    train_step,
)
from roofline.validate.kinds import Kind, Predictor, Row

Estimator = Callable[[Row], Estimate | None]

EAGER_FSDP = Framework(attention="flash1", exposed_gathers=1.0, recomputes_last=False)
"""MosaicML's MPT on PyTorch FSDP: Triton port of the first FlashAttention, no
compiled overlap; the loss is fused. Its configurations set activation_checkpointing_reentrant: false, and
PyTorch's checkpoint without re-entry stops once everything that backward needs is there
(torch.utils.checkpoint, set_checkpoint_early_stop): the layer's last product is not repeated."""
EAGER_FSDP2 = Framework(exposed_gathers=1.0, logit_bytes=44)
"""PyTorch FSDP2 with the device's own FlashAttention."""
MEGATRON_2022 = Framework(
    attention="unfused", exposed_gathers=1.0, gradient_bytes=2, logit_bytes=44
)
"""Megatron-LM before FlashAttention and overlapped gradient reduction, float16 gradients."""
MEGATRON_CORE = Framework(logit_bytes=44)
"""Megatron-core (NeMo, Megatron-Bridge): Transformer Engine kernels, overlapped gradient reduction,
the loss in eager PyTorch."""
VTRAIN_NETWORK = Network(node_bytes_per_s=100e9)
"""800 Gbit/s per node of eight: inter_node_bandwidth of VIA-Research/vTrain's configurations."""

RECOMPUTE: Mapping[str, Recompute] = {
    "none": "none", "unknown": "none", "selective": "selective", "full": "full", "block": "full",
}  # fmt: skip


def model_of(row: Row) -> ModelConfig:
    """Architecture of a row; its `model` has the letters' long names."""
    shape: Mapping[str, Any] = row["model"]
    return ModelConfig(
        vocab_size=shape["vocab"],
        width=shape["hidden"],
        num_layers=shape["num_layers"],
        num_heads=shape["num_heads"],
        num_kv_heads=shape["num_kv_heads"],
        head_size=shape["head_dim"],
        ffw_size=shape["ffw"],
        gated_mlp=shape["gated_ffw"],
        tied_embeddings=shape["tied_embeddings"],
    )


def decode_estimate(row: Row) -> Estimate | None:
    """Estimate of a `decode_step` row."""
    device = _device(row)
    if device is None:
        return None
    weight = row.get("weight_dtype", row["dtype"])
    return decode_step(
        model_of(row),
        device,
        batch=row["batch"],
        kv_len=row["kv_len"],
        tensor=row["parallel"].get("tensor", 1),
        dtype="bf16" if weight == "int8" else row["dtype"],
        weight_dtype=weight,
    )


def serving_estimate(row: Row) -> Estimate | None:
    """Estimate of a `serving_step` row."""
    device = _device(row)
    if device is None:
        return None
    return serving_step(
        model_of(row),
        device,
        batch=row["batch"],
        prompt_tokens=row["prompt_tokens"],
        new_tokens=row["new_tokens"],
        tensor=row["parallel"].get("tensor", 1),
        dtype=row["dtype"],
    )


def training_estimate(row: Row) -> Estimate | None:
    """Estimate of a `train_step` row."""
    device = _device(row)
    if device is None:
        return None
    axes = dict(row["parallel"])
    parallel = Parallel(
        **{k: int(axes.get(k, 1)) for k in ("data", "fsdp", "tensor", "pipeline", "context")},
        interleave=int(axes.get("virtual_pipeline", axes.get("interleave", 1))),
    )
    step = TrainStep(
        global_batch=row["global_batch"],
        micro_batch=row["micro_batch"],
        seq=row["seq"],
        recompute=RECOMPUTE[row["remat"]],
        dtype=row["dtype"],
    )
    framework, network = _framework(row)
    return train_step(model_of(row), device, parallel, step, framework=framework, network=network)


def _framework(row: Row) -> tuple[Framework, Network | None]:
    stack = str(row["stack"]).lower()
    if "megatron-style" in stack:
        return MEGATRON_2022, VTRAIN_NETWORK
    if any(name in stack for name in ("megatron", "mcore", "nemo")):
        return MEGATRON_CORE, None
    if "llm-foundry" in stack:
        if row.get("shard_gradients_only"):
            return replace(EAGER_FSDP, shard_gradients=True, gradient_bytes=2), None
        return EAGER_FSDP, None
    if "fsdp2" in stack:
        return EAGER_FSDP2, None
    return Framework(), None


def _device(row: Row) -> Gpu | None:
    try:
        return gpu(row["hardware"])
    except ValueError:
        return None


def _kind(name: str, estimate: Estimator, factors: Sequence[Factor]) -> Kind:
    def seconds(read: Callable[[Estimate], float]) -> Predictor:
        def predict(row: Row) -> float | None:
            made = estimate(row)
            return None if made is None else read(made)

        return predict

    def interval(row: Row) -> tuple[float, float] | None:
        made = estimate(row)
        return None if made is None else made.interval_s

    def calibrate(rows: Sequence[Row], _uncalibrated: Predictor) -> Predictor:
        known = [(made, float(row["measured_s"])) for row in rows if (made := estimate(row))]
        if not known:
            return _uncalibrated
        stack = fit_stack([made for made, _ in known], [time for _, time in known], factors)
        return seconds(lambda made: stack.apply(made).expected_s)

    return Kind(
        name=name,
        predict=seconds(lambda made: made.expected_s),
        bound=seconds(lambda made: made.lower_s),
        math=seconds(lambda made: made.math_s),
        interval=interval,
        calibrate=calibrate,
    )


DECODE_STEP = _kind("decode_step", decode_estimate, SERVING_FACTORS)
SERVING_STEP = _kind("serving_step", serving_estimate, SERVING_FACTORS)
TRAIN_STEP = _kind("train_step", training_estimate, TRAINING_FACTORS)
