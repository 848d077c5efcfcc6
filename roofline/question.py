"""One phase of one program on given hardware: the question, and what the cost model answers."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from models.config import ModelConfig
from roofline import cost, serving
from roofline.datasheets import DATASHEETS
from roofline.hardware import Hardware
from roofline.kernel_times import gpu
from roofline.kernels import Layout, ceil_div
from roofline.memory import memory_per_device
from roofline.phases import Phase, PhaseCost
from roofline.predict import Prediction, mbu, mfu, predict
from roofline.training import Parallel, TrainStep, train_step

PHASES = (
    Phase.PREFILL, Phase.DECODE, Phase.SCORE, Phase.TRAIN, Phase.OPTIMIZER, Phase.PUBLISH,
)  # fmt: skip
GIB = 2**30
EVERY_UP_TO = 32
"""A sweep a..b takes every value where there are at most so many, else doublings."""
SWEEPABLE = ("batch", "kv_len", "tokens", "steps", "data", "fsdp", "tensor", "chunk_tokens")


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
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    dtype: str = "bfloat16"
    remat: cost.Remat = "none"
    chunk_tokens: int = 4096
    """Tokens whose logits exist at once in score and train."""

    @property
    def trains(self) -> bool:
        """Whether the devices hold a learner: float32 weights, gradients, optimizer state."""
        return self.phase in (Phase.TRAIN, Phase.OPTIMIZER, Phase.PUBLISH, Phase.SCORE)

    @property
    def layout(self) -> Layout:
        """Mesh and types of the program."""
        return Layout(
            data=self.data, fsdp=self.fsdp, tensor=self.tensor, compute_dtype=self.dtype,
            param_dtype="float32" if self.trains else self.dtype, kv_dtype=self.dtype,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the phase takes, and why."""

    cost: PhaseCost
    prediction: Prediction
    intensity: float
    """Flops per byte."""
    critical_intensity: float
    """Flops per byte at which memory stops binding."""
    mfu: float
    mbu: float
    tokens_per_s: float
    """Over all devices; 0 for phases that handle no tokens."""
    memory_bytes: dict[str, int]
    """Of the busiest device, by name."""
    tuned_s: tuple[float, float, float] | None
    """Expected time with the tuned kernels of trainers and servers, and the ends of its 80 %
    interval, from measured operator tables [s]; None where there are none."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def answer(question: Question) -> Answer:
    """Predict one phase.

    Raises:
        ValueError: the mesh does not divide the model, or the memory does not hold it; the message
            names the nearest sizes that work.
    """
    memory = needed_memory(question)
    if sum(memory.values()) > question.hardware.hbm_bytes:
        raise ValueError(_does_not_fit(question, sum(memory.values())))
    work = cost_of(question)
    seen = predict(work, question.hardware)
    return Answer(
        cost=work,
        prediction=seen,
        intensity=work.flops / work.hbm_bytes,
        critical_intensity=question.hardware.critical_intensity(question.dtype),
        mfu=mfu(work, seen.expected_s, question.hardware),
        mbu=mbu(work, seen.expected_s, question.hardware),
        tokens_per_s=_tokens(question) / seen.expected_s,
        memory_bytes=memory,
        tuned_s=tuned_s(question),
    )


def tuned_s(question: Question) -> tuple[float, float, float] | None:
    """`Answer.tuned_s`: fused kernels and flash attention, the optimizer included in train."""
    q = question
    if q.hardware.calibrated or q.hardware.name not in DATASHEETS:
        return None
    device, local = gpu(q.hardware.name), ceil_div(q.batch, q.layout.row_shards)
    match q.phase:
        case Phase.DECODE:
            seen = serving.decode_step(
                q.model, device, batch=local, kv_len=q.kv_len, tensor=q.tensor, dtype=q.dtype,
                kv_dtype=q.dtype,
            )  # fmt: skip
            times = q.steps
        case Phase.PREFILL:
            seen = serving.prefill_step(
                q.model, device, rows=local, tokens=q.tokens, tensor=q.tensor, dtype=q.dtype
            )
            times = 1
        case Phase.TRAIN:
            parallel = Parallel(data=q.data, fsdp=q.fsdp, tensor=q.tensor)
            step = TrainStep(
                global_batch=local * q.layout.row_shards, micro_batch=local, seq=q.tokens,
                recompute="full" if q.remat == "block" else "none", dtype=q.dtype,
            )  # fmt: skip
            seen, times = train_step(q.model, device, parallel, step), 1
        case _:
            return None
    low, high = seen.interval_s
    return times * seen.expected_s, times * low, times * high


def cost_of(question: Question) -> PhaseCost:
    """Work of the phase on the busiest device."""
    q, layout = question, question.layout
    match question.phase:
        case Phase.PREFILL:
            return cost.prefill(q.model, layout, q.batch, q.tokens, samples=q.batch)
        case Phase.DECODE:
            return cost.decode(q.model, layout, q.batch, q.kv_len, q.steps)
        case Phase.SCORE:
            return cost.score(q.model, layout, q.tokens, q.batch, 1, q.chunk_tokens)
        case Phase.TRAIN:
            return cost.train(q.model, layout, q.tokens, q.batch, 1, q.remat, q.chunk_tokens)
        case Phase.OPTIMIZER:
            return cost.optimizer(q.model, layout)
        case Phase.PUBLISH:
            rollout = Layout(
                data=q.data * q.fsdp, tensor=q.tensor, compute_dtype=q.dtype,
                param_dtype=q.dtype, kv_dtype=q.dtype,
            )  # fmt: skip
            return cost.publish(q.model, layout, rollout)
        case _:
            raise ValueError(f"phase {q.phase} has no cost; use one of {', '.join(PHASES)}")


def needed_memory(question: Question) -> dict[str, int]:
    """Bytes by name on the busiest device."""
    q = question
    if q.phase is Phase.SCORE:
        weights = memory_per_device(q.model, q.layout, trains=True, rows=q.batch, row_tokens=1)
        return {"parameters": weights["parameters"]}
    if q.trains:
        rows, tokens = (q.batch, q.tokens) if q.phase is Phase.TRAIN else (q.layout.row_shards, 1)
        return memory_per_device(
            q.model, q.layout, trains=True, rows=rows, row_tokens=tokens, remat=q.remat,
            chunk_tokens=q.chunk_tokens,
        )  # fmt: skip
    length = q.kv_len if q.phase is Phase.DECODE else q.tokens
    return memory_per_device(q.model, q.layout, slots=q.batch, max_len=length, snapshots=1)


def _tokens(question: Question) -> float:
    match question.phase:
        case Phase.DECODE:
            return question.batch * question.steps
        case Phase.PREFILL | Phase.SCORE | Phase.TRAIN:
            return question.batch * question.tokens
        case _:
            return 0.0


def _does_not_fit(question: Question, needed: float) -> str:
    """The message, with the nearest choice on each axis that fits alone, or else on two axes."""
    model = question.model
    choices: dict[str, list[Any]] = {
        "batch": [question.batch >> k for k in range(1, question.batch.bit_length())],
        "tensor": [
            n for n in range(question.tensor + 1, model.num_kv_heads + 1)
            if model.num_kv_heads % n == 0 and model.ffw_size % n == 0
        ],
    }  # fmt: skip
    if question.trains:
        wider = range(question.fsdp + 1, 1025)
        choices["fsdp"] = [n for n in wider if model.width % n == 0]
        choices["remat"] = ["block"] if question.remat == "none" else []
    remedies = list(filter(None, (_nearest(question, {name: choices[name]}) for name in choices)))
    if not remedies:
        pairs = itertools.combinations(choices, 2)
        tried = (_nearest(question, {name: choices[name] for name in pair}) for pair in pairs)
        remedies = list(filter(None, tried))[:2]
    remedy = " or ".join(remedies) or "neither two of its sizes changed; use larger hardware"
    return (
        f"{question.phase} needs {needed / GIB:.1f} GiB per device, but {question.hardware.name} "
        f"has {question.hardware.hbm_bytes / GIB:.1f} GiB; it fits with {remedy}"
    )


def _nearest(question: Question, choices: dict[str, list[Any]]) -> str | None:
    """The first combination that fits, as options; None if none does."""
    options = {"batch": "--batch", "remat": "--remat"}
    for values in itertools.product(*choices.values()):
        changed = dict(zip(choices, values, strict=True))
        if _fits(dataclasses.replace(question, **changed)):
            words = (f"{options.get(n, f'--parallel.{n}')} {v}" for n, v in changed.items())
            return " ".join(words)
    return None


def _fits(question: Question) -> bool:
    return sum(needed_memory(question).values()) <= question.hardware.hbm_bytes


def parse_sweep(text: str) -> tuple[str, list[int]]:
    """("batch", [1, 2, 4, ...]) of "batch=1..1024" or "batch=1,8,64".

    Raises:
        ValueError: not of that form, or not something that can be swept.
    """
    name, _, values = text.partition("=")
    name = name.strip().replace("-", "_").removeprefix("parallel.")
    if name not in SWEEPABLE:
        raise ValueError(f"cannot sweep {name!r}; use one of {', '.join(SWEEPABLE)}")
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
    except ValueError:
        raise ValueError(
            f"sweep {text!r} must look like batch=1..1024 or batch=1,8,64, numbers from 1"
        ) from None
    return name, chosen
