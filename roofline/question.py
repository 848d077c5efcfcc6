"""One phase of one program on given hardware: the question."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.config import ModelConfig
from roofline import cost
from roofline.hardware import Hardware
from roofline.kernels import Layout, ceil_div
from roofline.names import meant
from roofline.phases import Phase
from roofline.placement import Placement, Turns, turns_of

PHASES = (
    Phase.PREFILL, Phase.DECODE, Phase.SCORE, Phase.REFERENCE, Phase.TRAIN, Phase.OPTIMIZER,
    Phase.PUBLISH,
)  # fmt: skip
EVERY_UP_TO = 32
"""A sweep a..b takes every value where there are at most so many, else doublings."""
SWEEPABLE = (
    "batch", "kv_len", "tokens", "steps", "devices", "data", "fsdp", "tensor", "expert",
    "pipeline", "nodes", "microbatches", "chunk_tokens",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One phase of one program."""

    model: ModelConfig
    hardware: Hardware
    phase: Phase
    batch: int = 1
    """Over all devices: sequences (decode), prompts (prefill), packed rows (score, train)."""
    kv_len: int = 1024
    """Cached tokens that a decode step reads."""
    tokens: int = 1024
    """Of a prompt, or of a packed row."""
    steps: int = 1
    """Decode steps in one program."""
    devices: int = 0
    """All devices, where their number is fixed: `resized` then gives data what the other axes leave. 0: as
    many as the axes come to."""
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    """Of the data * fsdp devices, how many each layer's experts are dealt to."""
    pipeline: int = 1
    """Stages that hold an equal part of the layers each."""
    nodes: int = 0
    """Nodes that share the devices; 0: the fewest that hold them."""
    microbatches: int = 0
    """Of a replica's rows, in a pipeline; 0: four per stage."""
    dtype: str = "bfloat16"
    remat: cost.Remat = "none"
    chunk_tokens: int = 4096
    """Tokens whose logits exist at once in score and train."""

    @property
    def trains(self) -> bool:
        """Whether the devices hold a learner: float32 weights, gradients, optimizer state."""
        return self.phase not in (Phase.PREFILL, Phase.DECODE)

    @property
    def placement(self) -> Placement:
        """Where the devices are."""
        devices = self.data * self.fsdp * self.tensor * self.pipeline
        return Placement(
            data=self.data, fsdp=self.fsdp, tensor=self.tensor, pipeline=self.pipeline,
            nodes=self.nodes or ceil_div(devices, self.hardware.node_devices),
        )  # fmt: skip

    @property
    def stage(self) -> ModelConfig:
        """The busiest stage: its part of the layers, the embedding and the head."""
        model, layers = self.model, self.model.num_layers
        if layers % self.pipeline:
            allowed = [n for n in range(1, layers + 1) if layers % n == 0]
            raise ValueError(
                f"pipeline={self.pipeline} does not divide num_layers={layers}; use one of {allowed}"
            )
        depth = layers // self.pipeline
        kept = tuple(i for i in model.no_rope_layers if i < depth)
        return dataclasses.replace(model, num_layers=depth, no_rope_layers=kept)

    @property
    def turns(self) -> Turns:
        """Micro-batches of a replica and the turns that the pipeline needs for them."""
        rows = ceil_div(self.batch, self.layout.row_shards)
        if self.phase in (Phase.OPTIMIZER, Phase.PUBLISH, Phase.DECODE) and self.microbatches:
            raise ValueError(
                f"microbatches={self.microbatches}: {self.phase} has none; leave them out"
            )
        if self.phase in (Phase.OPTIMIZER, Phase.PUBLISH):
            return Turns(stages=1, microbatches=1)
        if self.phase is Phase.DECODE:  # as many groups of slots as stages, always under way
            return turns_of(rows, 1, min(rows, self.pipeline))
        return turns_of(rows, self.pipeline, self.microbatches)

    @property
    def layout(self) -> Layout:
        """Mesh and types of a stage's program."""
        return Layout(
            data=self.data, fsdp=self.fsdp, tensor=self.tensor, expert=self.expert,
            compute_dtype=self.dtype,
            param_dtype="float32" if self.trains else self.dtype, kv_dtype=self.dtype,
            attention=self.hardware.rows_attention(self.dtype, self.model.head_size),
            copies_weights=self.trains or not self.views_snapshots,
        )  # fmt: skip

    @property
    def views_snapshots(self) -> bool:
        """Whether decode on a stage's devices reads published weights where they lie."""
        devices = self.data * self.fsdp * self.tensor
        return self.hardware.views_snapshots(devices, adapted=self.model.lora is not None)


def resized(question: Question, sizes: Mapping[str, Any]) -> Question:
    """The question with other sizes.

    Raises:
        ValueError: the number of devices is fixed and the axes do not divide it, or data itself is changed.
    """
    changed = dataclasses.replace(question, **sizes)
    if not changed.devices:
        return changed
    inner = {name: getattr(changed, name) for name in ("tensor", "fsdp", "pipeline")}
    if "data" in sizes:
        raise ValueError(
            f"--devices={changed.devices} leaves data to follow from the other axes; leave out "
            "--devices, or sweep devices"
        )
    size, product = math.prod(inner.values()), " * ".join(n for n in inner if inner[n] > 1)
    if changed.devices % size:
        near = (changed.devices // size * size, ceil_div(changed.devices, size) * size)
        raise ValueError(
            f"--devices={changed.devices} is not a multiple of {product} = {size}; use "
            f"{' or '.join(str(n) for n in near if n)}"
        )
    return dataclasses.replace(changed, data=changed.devices // size)


def parse_sweep(text: str) -> tuple[str, list[int]]:
    """("batch", [1, 2, 4, ...]) of "batch=1..1024" or "batch=1,8,64".

    Raises:
        ValueError: not of that form, or not something that can be swept.
    """
    name, _, values = text.partition("=")
    name = name.strip().replace("-", "_").removeprefix("parallel.")
    if name not in SWEEPABLE:
        raise ValueError(
            f"cannot sweep {name!r}{meant(name, SWEEPABLE)} Use one of {', '.join(SWEEPABLE)}"
        )
    try:
        if ".." in values:
            low, high = (int(part) for part in values.split(".."))
            if not 1 <= low <= high:
                raise ValueError
            if high - low < EVERY_UP_TO:
                return name, list(range(low, high + 1))
            doubled = [low << k for k in range((high // low).bit_length())]
            return name, doubled if doubled[-1] == high else [*doubled, high]
        chosen = [int(part) for part in values.split(",")]
        if min(chosen) < 1:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"sweep {text!r} must look like batch=1..1024 or batch=1,8,64, numbers from 1"
        ) from None
    return name, chosen
