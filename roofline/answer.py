"""What the cost model answers to a `roofline.question.Question`: time, bound, memory, or why not."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from roofline import cost, serving, traffic
from roofline.datasheets import DATASHEETS
from roofline.kernel_times import gpu
from roofline.kernels import Layout, ceil_div, shard
from roofline.memory import memory_per_device, program_memory
from roofline.network import Network
from roofline.phases import Phase, PhaseCost
from roofline.placement import Placement, Turns, linked
from roofline.predict import Prediction, mbu, mfu, predict
from roofline.question import PHASES, Question, resized
from roofline.traffic import Collective
from roofline.training import Parallel, TrainStep, train_step

GIB = 2**30
MOST_DOUBLINGS = 12
"""Of the devices, where no other remedy is found."""


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
    placement: Placement
    turns: Turns
    hops_s: float
    """Between the stages of a pipeline, in `prediction` already."""
    tuned_s: tuple[float, float, float] | None
    """Expected time with the tuned kernels of trainers and servers, and the ends of its 90 %
    interval, from measured operator tables [s]; None where there are none."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def answer(question: Question) -> Answer:
    """Predict one phase.

    Raises:
        ValueError: the mesh is not one of the phase or does not divide the model, nodes or network do
            not carry it, or the memory does not hold it; the message names the nearest sizes that work.
    """
    if question.fsdp > 1 and not question.trains:
        raise ValueError(
            f"{question.phase} gathers no weights: use --parallel.data {question.fsdp}, not fsdp"
        )
    shard(question.stage, question.layout)  # refuses sizes that do not divide the model
    question.placement.check(question.hardware)
    memory = needed_memory(question)
    if sum(memory.values()) > question.hardware.hbm_bytes:
        raise ValueError(_does_not_fit(question, sum(memory.values())))
    work, turns, hops_s = cost_of(question), question.turns, _hops_s(question)
    seen_by = linked(question.hardware, question.placement, work, collectives_of(question))
    seen = _in_turns(predict(work, seen_by), turns, hops_s)
    return Answer(
        cost=work,
        prediction=seen,
        intensity=work.flops / work.hbm_bytes,
        critical_intensity=question.hardware.critical_intensity(question.dtype),
        mfu=mfu(work, seen.expected_s, question.hardware),
        mbu=mbu(work, seen.expected_s, question.hardware),
        tokens_per_s=_tokens(question) / seen.expected_s,
        memory_bytes=memory,
        placement=question.placement,
        turns=turns,
        hops_s=hops_s,
        tuned_s=tuned_s(question),
    )


def collectives_of(question: Question) -> tuple[Collective, ...]:
    """The collectives over mesh axes in `cost_of`; what publication copies is not among them."""
    q, layout, stage = question, question.layout, question.stage
    rows, times = ceil_div(q.batch, layout.row_shards), q.turns.microbatches
    tokens = ceil_div(rows, times) * q.tokens
    match q.phase:
        case Phase.PREFILL:
            once = traffic.forward(stage, layout, tokens)
        case Phase.DECODE:
            group = ceil_div(rows, times)
            step = traffic.forward(stage, layout, group) + traffic.sampling(stage, layout, group)
            slots = q.batch if times == 1 else group * layout.row_shards
            once = step * q.steps + traffic.samples(layout, slots, q.steps)
        case Phase.SCORE | Phase.REFERENCE:
            once = traffic.forward(stage, layout, tokens)
            once += traffic.scored_head(stage, layout, tokens, trains=False)
        case Phase.TRAIN:
            once = traffic.forward(stage, layout, tokens)
            once += traffic.scored_head(stage, layout, tokens, trains=True)
            once += traffic.layers(stage, layout, tokens) + traffic.gradients(stage, layout)
        case _:
            once = ()
    return once * times


def _hops_s(question: Question) -> float:
    """Activations on to the next stage, and in training their gradients back, of all turns."""
    q, turns = question, question.turns
    if q.pipeline == 1 or q.phase in (Phase.OPTIMIZER, Phase.PUBLISH):
        return 0.0
    rows = ceil_div(ceil_div(q.batch, q.layout.row_shards), turns.microbatches)
    tokens, times = (rows, q.steps) if q.phase is Phase.DECODE else (rows * q.tokens, 1)
    activation = tokens * q.model.width * q.layout.compute_bytes / q.tensor
    each = times * q.placement.hop_s(activation, q.hardware)
    return turns.turns * each * (2 if q.phase is Phase.TRAIN else 1)


def _in_turns(seen: Prediction, turns: Turns, hops_s: float) -> Prediction:
    """The prediction of one stage's work as the whole pipeline takes it."""
    times = turns.turns / turns.microbatches
    return dataclasses.replace(
        seen,
        lower_s=times * seen.lower_s,
        upper_s=times * seen.upper_s + hops_s,
        expected_s=times * seen.expected_s + hops_s,
        link_s=seen.link_s + hops_s,
    )


def tuned_s(question: Question) -> tuple[float, float, float] | None:
    """`Answer.tuned_s`: fused kernels and flash attention, the optimizer included in train. The tables
    know no experts."""
    q = question
    if q.hardware.calibrated or q.hardware.name not in DATASHEETS or q.model.num_experts:
        return None
    device, local = gpu(q.hardware.name), ceil_div(q.batch, q.layout.row_shards)
    turns = q.turns
    rows = ceil_div(local, turns.microbatches)
    match q.phase:
        case Phase.DECODE:
            seen = serving.decode_step(
                q.stage, device, batch=rows, kv_len=q.kv_len, tensor=q.tensor, dtype=q.dtype,
                kv_dtype=q.dtype,
            )  # fmt: skip
            times = q.steps * turns.turns
        case Phase.PREFILL:
            seen = serving.prefill_step(
                q.stage, device, rows=rows, tokens=q.tokens, tensor=q.tensor, dtype=q.dtype
            )
            times = turns.turns
        case Phase.TRAIN:
            return _tuned_training(q, rows)
        case _:
            return None
    hops_s = _hops_s(q)
    low, high = seen.interval_s
    return times * seen.expected_s + hops_s, times * low + hops_s, times * high + hops_s


def _tuned_training(q: Question, rows: int) -> tuple[float, float, float]:
    """A whole step of a trainer, `rows` rows per pass."""
    parallel = Parallel(data=q.data, fsdp=q.fsdp, tensor=q.tensor, pipeline=q.pipeline)
    step = TrainStep(
        global_batch=rows * q.turns.microbatches * q.layout.row_shards, micro_batch=rows,
        seq=q.tokens, recompute="full" if q.remat == "block" else "none", dtype=q.dtype,
    )  # fmt: skip
    alone = q.placement.nodes == 1  # what leaves a stage then goes over the node's links
    rate = q.hardware.link_bytes_per_s if alone else q.hardware.network_bytes_per_s
    network = Network(
        devices_per_node=q.placement.per_node, node_bytes_per_s=q.placement.per_node * rate
    )
    seen = train_step(q.model, gpu(q.hardware.name), parallel, step, network=network)
    return seen.expected_s, *seen.interval_s


def cost_of(question: Question) -> PhaseCost:
    """Work of the phase on the busiest device of the busiest pipeline stage."""
    q, layout, stage = question, question.layout, question.stage
    times = q.turns.microbatches
    rows = ceil_div(ceil_div(q.batch, layout.row_shards), times) * layout.row_shards
    if times == 1:
        rows = q.batch
    match question.phase:
        case Phase.PREFILL:
            return _times(cost.prefill(stage, layout, rows, q.tokens, samples=rows), times)
        case Phase.DECODE:
            return _times(cost.decode(stage, layout, rows, q.kv_len, q.steps), times)
        case Phase.SCORE:
            return cost.score(stage, layout, q.tokens, rows, times, q.chunk_tokens)
        case Phase.REFERENCE:
            return cost.reference(stage, layout, q.tokens, rows, times, q.chunk_tokens)
        case Phase.TRAIN:
            return cost.train(stage, layout, q.tokens, rows, times, q.remat, q.chunk_tokens)
        case Phase.OPTIMIZER:
            return cost.optimizer(stage, layout)
        case Phase.PUBLISH:
            rollout = Layout(
                data=q.data * q.fsdp, tensor=q.tensor, expert=q.expert, compute_dtype=q.dtype,
                param_dtype=q.dtype, kv_dtype=q.dtype, copies_weights=not q.views_snapshots,
            )  # fmt: skip
            return cost.publish(stage, layout, rollout)
        case _:
            raise ValueError(f"phase {q.phase} has no cost; use one of {', '.join(PHASES)}")


def _times(work: PhaseCost, count: int) -> PhaseCost:
    return sum([work] * (count - 1), start=work)


def needed_memory(question: Question) -> dict[str, int]:
    """Bytes by name on the busiest device: of a trainer's step all that it holds, of another phase what
    its program needs. A stage keeps the activations of as many micro-batches as there are stages."""
    q, stage, turns = question, question.stage, question.turns
    if q.phase in (Phase.SCORE, Phase.REFERENCE, Phase.PREFILL):
        return program_memory(
            stage, q.layout, q.phase, rows=ceil_div(q.batch, turns.microbatches),
            row_tokens=q.tokens, chunk_tokens=q.chunk_tokens,
        )  # fmt: skip
    if q.trains:
        rows, tokens = (q.batch, q.tokens) if q.phase is Phase.TRAIN else (q.layout.row_shards, 1)
        sizes = memory_per_device(
            stage, q.layout, trains=True, rows=ceil_div(rows, turns.microbatches),
            row_tokens=tokens, remat=q.remat, chunk_tokens=q.chunk_tokens,
        )  # fmt: skip
        kept = min(turns.stages, turns.microbatches)
        return {**sizes, "activations": kept * sizes["activations"]}
    return memory_per_device(stage, q.layout, slots=q.batch, max_len=q.kv_len, snapshots=1)


def _tokens(question: Question) -> float:
    match question.phase:
        case Phase.DECODE:
            return question.batch * question.steps
        case Phase.PREFILL | Phase.SCORE | Phase.REFERENCE | Phase.TRAIN:
            return question.batch * question.tokens
        case _:
            return 0.0


def _does_not_fit(question: Question, needed: float) -> str:
    """The message, with the nearest choice on each axis that fits alone, or else on two axes."""
    choices = _choices(question)
    alone = (_nearest(question, {name: values}) for name, values in choices.items())
    remedies = list(filter(None, alone))
    if not remedies:
        pairs = itertools.combinations(choices, 2)
        tried = (_nearest(question, {name: choices[name] for name in pair}) for pair in pairs)
        remedies = list(filter(None, tried))[:2]
    if not remedies and question.devices:
        remedies = _more_devices(question)
    remedy = (
        f"it fits with {' or '.join(remedies)}" if remedies
        else "changing one or two of its sizes is not enough; use larger hardware"
    )  # fmt: skip
    return (
        f"{question.phase} needs {needed / GIB:.1f} GiB per device, but {question.hardware.name} "
        f"has {question.hardware.hbm_bytes / GIB:.1f} GiB; {remedy}"
    )


def _choices(question: Question) -> dict[str, list[Any]]:
    """Values that need less memory, the nearest first; first what changes no result."""
    model, layers = question.model, question.model.num_layers
    choices: dict[str, list[Any]] = {}
    if question.trains:
        choices["remat"] = ["block"] if question.remat == "none" else []
        wider = range(question.fsdp + 1, 1025)
        choices["fsdp"] = [n for n in wider if model.width % n == 0]
    choices["tensor"] = [
        n for n in range(question.tensor + 1, model.num_kv_heads + 1)
        if model.num_kv_heads % n == 0 and model.ffw_size % n == 0
    ]  # fmt: skip
    if model.num_experts:
        wider = range(question.expert + 1, model.num_experts + 1)
        choices["expert"] = [n for n in wider if model.num_experts % n == 0]
    choices["pipeline"] = [n for n in range(question.pipeline + 1, layers + 1) if layers % n == 0]
    length = "kv_len" if question.phase is Phase.DECODE else "tokens"
    choices |= {name: _smaller(question, name) for name in ("batch", length)}
    return choices


def _more_devices(question: Question) -> list[str]:
    """The least doubling of the devices that fits, with the weights spread over all that hold no layers or
    heads of their own, and everything recomputed; a decode's over replicas."""
    for times in (2**k for k in range(1, MOST_DOUBLINGS)):
        grown: dict[str, Any] = {"devices": question.devices * times}
        if question.trains:
            grown |= {"fsdp": question.fsdp * question.data * times}
        if question.trains and question.remat == "none":
            grown |= {"remat": "block"}
        if found := _nearest(question, {name: [value] for name, value in grown.items()}):
            return [found]
    return []


def _smaller(question: Question, name: str) -> list[int]:
    """The largest value that fits, found by halving the range, then halves of the present value."""
    present = getattr(question, name)
    fits, too_large = 0, present
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if _fits(question, {name: middle}):
            fits = middle
        else:
            too_large = middle
    halves = [present >> k for k in range(1, present.bit_length())]
    return [fits, *halves] if fits else halves


def _nearest(question: Question, choices: dict[str, list[Any]]) -> str | None:
    """The first combination that fits, as options; None if none does."""
    plain = ("batch", "tokens", "remat", "devices")
    options = {"kv_len": "--kv-len", **{name: f"--{name}" for name in plain}}
    for values in itertools.product(*choices.values()):
        changed = dict(zip(choices, values, strict=True))
        if _fits(question, changed):
            words = (f"{options.get(n, f'--parallel.{n}')} {v}" for n, v in changed.items())
            return " ".join(words)
    return None


def _fits(question: Question, sizes: Mapping[str, Any]) -> bool:
    """Whether these sizes can be had, nodes and micro-batches included, and the memory holds them."""
    try:
        changed = resized(question, sizes)
        changed.placement.check(changed.hardware)
        needed = needed_memory(changed)
    except ValueError:
        return False
    return sum(needed.values()) <= question.hardware.hbm_bytes
