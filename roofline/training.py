"""One optimizer step of dense training: data, fsdp, tensor, pipeline and context parallelism, over
one node or several. Standard library only.

A pipeline stage computes its layers for every micro-batch; p stages of v interleaved parts are idle
for (p - 1) / v of m + (p - 1) / v turns (arXiv:2104.04473 section 2.2). The slowest stage, which
has the head, sets the pace:

    products, attention, passes   (m + (p - 1) / v) * layers / p * (forward + backward [+ forward])
                                  + m * head
    tensor    two all-reduces forward, two backward, two more where layers are recomputed
    fsdp      all-gather of the layer forward and backward, reduce-scatter, per micro-batch
    data      one all-reduce of the gradients per step
    pipeline  an activation and its gradient per micro-batch and boundary
    context   keys and values travel round the ring, hidden behind attention where they can

What hides behind computation costs `exposed * min(compute, communication)` beyond the larger of the
two; exposed 0 is perfect overlap. Sources: scaling book, training and gpus chapters; operators and
curves: `roofline.kernel_times`; networks: `roofline.network`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models.config import ModelConfig
from roofline.estimate import Estimate, Factor
from roofline.kernel_times import AttentionKernel, Gpu
from roofline.network import Network

Recompute = Literal["none", "selective", "full"]
"""selective: attention only (arXiv:2205.05198); full: every layer."""

BACKWARD_ATTENTION = 2.5
"""Backward of fused attention does five products for forward's two (arXiv:2307.08691)."""
UNFUSED_BACKWARD_ATTENTION = 2.0
"""Four products for two, 21 bytes per score for 15, and both need their inputs again."""
FP8_SPEEDUP = 2 * 0.709 / 0.803
"""Of cuBLAS products in fp8 over bf16, as Transformer Engine runs them: best measured shares of
the two peaks (stas00/ml-engineering 744d01e1, accelerator chapter). The operator tables' fp8
products are a server's, with a scale per token, and slower."""
SUSTAINED = 1.09
"""Slowdown of products that run for seconds, at the power limit, over the operator tables' short
bursts: the best sustained products reach 86.9 % (A100) and 80.3 % (H100) of the peak
(ml-engineering 744d01e1, accelerator chapter), the tables' best 95.8 % and 86.9 %."""
ADAM_BYTES = 30
"""Reads and writes per parameter: 16-bit parameter and gradient, float32 master, mean, square."""
UNCALIBRATED_SPREAD = 0.25
"""Log error of uncalibrated steps, about its root mean square over all public rows: an error
statistic of all rows, used for intervals only; no prediction depends on it."""

TRAINING_FACTORS = (
    Factor(
        name="kernels",
        parts=frozenset({"products", "attention", "passes", "casts", "loss", "optimizer"}),
        spread=0.05,
    ),
    Factor(name="attention", parts=frozenset({"attention"}), spread=0.1),
    Factor(name="passes", parts=frozenset({"passes"}), spread=0.8),
    Factor(name="collectives", parts=frozenset({"collectives"}), spread=0.3),
)
"""What differs between frameworks: all kernels, the attention kernel, the fusion of elementwise
passes, how much communication hides and how fast the network is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """Devices by axis; their product is the number of devices."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    interleave: int = 1
    """Parts of the layers that each pipeline stage holds; no axis."""

    def __post_init__(self) -> None:
        """Refuse sizes below 1."""
        for name in ("data", "fsdp", "tensor", "pipeline", "context", "interleave"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel {name}={getattr(self, name)} must be at least 1")

    @property
    def devices(self) -> int:
        """All of them."""
        return self.data * self.fsdp * self.tensor * self.pipeline * self.context


@dataclass(frozen=True, kw_only=True, slots=True)
class Framework:
    """How a trainer runs the step; each a fact about its program, not a fitted number."""

    attention: AttentionKernel = "flash"
    exposed_gathers: float = 0.3
    """Share of fsdp and gradient communication that computation does not hide; 1: no overlap."""
    gradient_bytes: int = 4
    """Bytes of a gradient when it is reduced."""
    logit_bytes: int = 12
    """Passes over the logits, per logit: 12 where the loss is fused, in float32. Eager PyTorch: 44
    (cast 6, log-softmax 12, its gradient's zeros 4, log-softmax backward 16, cast back 6)."""
    recomputes_last: bool = True
    """Whether recomputing a layer repeats also its last product, whose result nothing keeps."""
    shard_gradients: bool = False
    """Gradients and optimizer state are sharded over data, parameters gathered once per step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainStep:
    """Batch and arithmetic of one step."""

    global_batch: int
    """Sequences per optimizer step."""
    micro_batch: int
    """Sequences per device (per tensor, pipeline and context group) and pass."""
    seq: int
    """Tokens of a sequence."""
    recompute: Recompute = "none"
    dtype: str = "bf16"

    def micro_batches(self, parallel: Parallel) -> int:
        """Passes per step.

        Raises:
            ValueError: the batch does not split evenly.
        """
        once = self.micro_batch * parallel.data * parallel.fsdp
        if self.micro_batch < 1 or self.global_batch % once:
            lower = max(once, self.global_batch // once * once)
            raise ValueError(
                f"global_batch={self.global_batch} does not split into micro-batches of "
                f"{self.micro_batch} on {parallel.data * parallel.fsdp} replicas; "
                f"use {lower} or {lower + once}"
            )
        return self.global_batch // once


def train_step(
    model: ModelConfig,
    device: Gpu,
    parallel: Parallel,
    step: TrainStep,
    *,
    framework: Framework | None = None,
    network: Network | None = None,
) -> Estimate:
    """Seconds of one optimizer step on the busiest device. Without a framework: a fused, compiled
    program with overlap; without a network: the GPU's usual node of eight.

    Raises:
        ValueError: heads, layers or batch do not split over the parallel sizes.
    """
    _check(model, parallel)
    framework = framework or Framework()
    network = network or Network.of(device)
    micro_batches = step.micro_batches(parallel)
    turns = micro_batches + (parallel.pipeline - 1) / parallel.interleave
    layers = turns * model.num_layers / parallel.pipeline
    layer = _Layer(model, device, parallel, step, framework)
    head_products, head_passes = layer.head()
    compute = {
        "products": layers * layer.products() + micro_batches * head_products,
        "attention": layers * layer.attention(),
        "passes": layers * layer.passes(),
        "casts": layers * layer.casts(),
        "loss": micro_batches * head_passes,
    }
    held = _held(model, parallel)
    sharded = parallel.fsdp * (parallel.data if framework.shard_gradients else 1)
    optimizer = device.pass_s(ADAM_BYTES * held / sharded)
    waiting = layers * _tensor_s(model, device, network, parallel, step)
    waiting += turns * _boundary_s(model, network, parallel, step)
    waiting += layers * _ring_s(model, network, device, parallel, step, layer.attention())
    behind = _weights_s(model, device, network, parallel, framework, micro_batches)
    computed = sum(compute.values())
    hidden = (1 - framework.exposed_gathers) * min(computed, behind)
    parts = {**compute, "optimizer": optimizer, "collectives": waiting + behind - hidden}
    return _with_bounds(model, device, network, parallel, step, parts)


def model_flops(model: ModelConfig, tokens: int, seq: int) -> float:
    """6 flops per weight and token, and causal attention's half of 12 B T^2 N H, per layer; no
    recomputation."""
    weights = model.num_layers * model.layer_parameters + model.vocab_size * model.width
    attention = 6.0 * model.num_layers * model.num_heads * model.head_size * seq
    return tokens * (6.0 * weights + attention)


@dataclass(frozen=True, slots=True)
class _Layer:
    """Kernels of one layer on one device for one micro-batch, forward, backward and again."""

    model: ModelConfig
    device: Gpu
    parallel: Parallel
    step: TrainStep
    framework: Framework

    @property
    def _tokens(self) -> int:
        return max(1, self.step.micro_batch * self.step.seq // self.parallel.context)

    @property
    def _again(self) -> int:
        return 1 if self.step.recompute == "full" else 0

    def products(self) -> float:
        """Weight products: one forward; two backward, of the input and of the weight."""
        model, tensor, m = self.model, self.parallel.tensor, self._tokens
        heads, kv_heads = model.num_heads // tensor, max(1, model.num_kv_heads // tensor)
        ffw, halves = model.ffw_size // tensor, 2 if model.gated_mlp else 1
        total = 0.0
        for n, k in (
            ((heads + 2 * kv_heads) * model.head_size, model.width),
            (model.width, heads * model.head_size),
            (halves * ffw, model.width),
            (model.width, ffw),
        ):
            forward = self._product(m, n, k)
            total += (1 + self._again) * forward + self._product(m, k, n) + self._product(k, n, m)
        if self._again and not self.framework.recomputes_last:
            total -= self._product(m, model.width, ffw)
        return total

    def _product(self, m: int, n: int, k: int) -> float:
        if self.step.dtype == "fp8":
            return SUSTAINED * self.device.product_s(m, n, k, "bf16") / FP8_SPEEDUP
        return SUSTAINED * self.device.product_s(m, n, k, self.step.dtype)

    def attention(self) -> float:
        """Forward and backward; recomputed with the layer, or alone where it is unfused."""
        tensor, kernel = self.parallel.tensor, self.framework.attention
        forward = self.device.prefill_attention_s(
            self.step.micro_batch,
            self.step.seq,
            self.model.num_heads // tensor,
            max(1, self.model.num_kv_heads // tensor),
            self.model.head_size,
            kernel,
        )
        backward = UNFUSED_BACKWARD_ATTENTION if kernel == "unfused" else BACKWARD_ATTENTION
        again = 0 if self.step.recompute == "none" else 1
        return forward * (1 + backward + again) / self.parallel.context

    def passes(self) -> float:
        """Norms, rotary encoding, activation, residuals: ten widths and four inner sizes of 16-bit
        values forward, twice that backward."""
        inner = (4 if self.model.gated_mlp else 2) * self.model.ffw_size / self.parallel.tensor
        values = self._tokens * (10 * self.model.width + inner)
        return self.device.pass_s(2.0 * values * (3 + self._again))

    def casts(self) -> float:
        """With fp8: casts and transposed copies of every operand, kernels of Transformer Engine beside
        its products, however the trainer fuses its own passes."""
        if self.step.dtype != "fp8":
            return 0.0
        operands = 3 * self.model.width + self.model.ffw_size / self.parallel.tensor
        return self.device.pass_s(5.0 * self._tokens * operands * (3 + self._again))

    def head(self) -> tuple[float, float]:
        """Products and passes of the logits, forward and backward, of one micro-batch."""
        vocab = self.model.vocab_size // self.parallel.tensor
        m, width = self._tokens, self.model.width
        products = sum(
            SUSTAINED * self.device.product_s(*shape, "bf16")
            for shape in ((m, vocab, width), (m, width, vocab), (width, vocab, m))
        )
        return products, self.device.pass_s(float(self.framework.logit_bytes * m * vocab))


def _tensor_s(
    model: ModelConfig, device: Gpu, network: Network, parallel: Parallel, step: TrainStep
) -> float:
    """All-reduces of one layer and micro-batch, none of them hidden."""
    activation = 2.0 * step.micro_batch * step.seq / parallel.context * model.width
    count = 6 if step.recompute == "full" else 4
    return count * network.collective_s(device, "all_reduce", activation, parallel.tensor)


def _boundary_s(model: ModelConfig, network: Network, parallel: Parallel, step: TrainStep) -> float:
    """An activation on and its gradient back between stages; the tensor group sends its parts."""
    if parallel.pipeline == 1:
        return 0.0
    activation = 2.0 * step.micro_batch * step.seq / parallel.context * model.width
    return 2 * parallel.interleave * network.send_s(activation / parallel.tensor)


def _ring_s(
    model: ModelConfig,
    network: Network,
    device: Gpu,
    parallel: Parallel,
    step: TrainStep,
    attention_s: float,
) -> float:
    """Part of a layer's key and value exchange that attention does not hide."""
    if parallel.context == 1:
        return 0.0
    kv_heads = max(1, model.num_kv_heads // parallel.tensor)
    block = 4.0 * step.micro_batch * step.seq / parallel.context * kv_heads * model.head_size
    inside = parallel.tensor * parallel.context <= network.devices_per_node
    rate = device.sheet.link_bytes_per_s if inside else network.device_bytes_per_s
    return max(0.0, 3 * (parallel.context - 1) * block / rate - attention_s)


def _weights_s(
    model: ModelConfig,
    device: Gpu,
    network: Network,
    parallel: Parallel,
    framework: Framework,
    micro_batches: int,
) -> float:
    """Gathers of parameters and sums of gradients, as if nothing hid them."""
    held = _held(model, parallel)
    outer = parallel.tensor * parallel.context
    gathered, total = 2.0 * held, 0.0
    if parallel.fsdp > 1:
        gather = network.collective_s(device, "all_gather", gathered, parallel.fsdp, outer)
        scatter = network.collective_s(device, "reduce_scatter", gathered, parallel.fsdp, outer)
        total += micro_batches * (2 * gather + scatter)
    replicas = parallel.data * parallel.context
    if replicas > 1:
        gradients, inner = framework.gradient_bytes * held / parallel.fsdp, parallel.tensor
        if framework.shard_gradients:
            total += network.collective_s(device, "reduce_scatter", gradients, replicas, inner)
            total += network.collective_s(device, "all_gather", gathered, replicas, inner)
        else:
            total += network.collective_s(device, "all_reduce", gradients, replicas, inner)
    return total


def _held(model: ModelConfig, parallel: Parallel) -> float:
    """Parameters of one tensor and pipeline group's device, before fsdp."""
    layers = model.num_layers * model.layer_parameters / parallel.pipeline
    return (layers + model.vocab_size * model.width) / parallel.tensor


def _with_bounds(
    model: ModelConfig,
    device: Gpu,
    network: Network,
    parallel: Parallel,
    step: TrainStep,
    parts: dict[str, float],
) -> Estimate:
    """Bounds from peaks: executed flops; parameters and optimizer once; gathers at link rates."""
    tokens = step.global_batch * step.seq
    flops = model_flops(model, tokens, step.seq) / parallel.devices
    executed = flops * (4 / 3 if step.recompute == "full" else 1)
    held = _held(model, parallel) / parallel.fsdp
    compute_s = executed / device.peak(step.dtype)
    memory_s = ADAM_BYTES * held / device.sheet.hbm_bytes_per_s
    rows = tokens / (parallel.data * parallel.fsdp * parallel.context)
    reduced = 4 * model.num_layers / parallel.pipeline * 2.0 * rows * model.width
    nodes = -(-parallel.tensor // network.devices_per_node)
    link_s = max(
        reduced * (parallel.tensor - 1) / parallel.tensor / device.sheet.link_bytes_per_s,
        reduced * (nodes - 1) / nodes / network.node_bytes_per_s,
    )
    return Estimate(
        parts=parts,
        lower_s=max(compute_s, memory_s, link_s),
        upper_s=compute_s + memory_s + 2 * link_s,
        flops=flops,
        math_s=flops / device.peak(step.dtype),
        spread=UNCALIBRATED_SPREAD,
    )


def _check(model: ModelConfig, parallel: Parallel) -> None:
    for name, size in (("heads", model.num_heads), ("ffw", model.ffw_size)):
        if size % parallel.tensor:
            raise ValueError(
                f"tensor={parallel.tensor} does not divide {name}={size}; use one of "
                f"{[n for n in (1, 2, 4, 8, 16) if not size % n]}"
            )
    stages = parallel.pipeline * parallel.interleave
    if stages > model.num_layers:
        raise ValueError(
            f"pipeline={parallel.pipeline} x interleave={parallel.interleave} needs as many layers;"
            f" the model has {model.num_layers}"
        )
