"""Every way to split devices between generators and learner, with what a step then takes. The
formulas are those of `roofline.closed_form`; `roofline.simulate` plays a split event by event.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from models.config import ModelConfig
from roofline import cost, traffic
from roofline.closed_form import closed_step_s, expected_staleness
from roofline.hardware import Hardware
from roofline.job import Job
from roofline.kernels import Layout, ceil_div, stored_in
from roofline.memory import memory_per_device
from roofline.phases import Phase
from roofline.placement import check_network, linked, placed
from roofline.predict import predict
from roofline.progress import tracked
from roofline.settings import Settings

MAX_TENSOR = 8
"""Tensor parallel devices share a node."""
MAX_SPLITS = 64
"""Learner sizes that are tried; on more devices they go up in equal strides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerOption:
    """A learner mesh with the micro-batch that is fastest on it."""

    layout: Layout
    rows: int
    """Packed rows per micro-batch."""
    phase_s: dict[Phase, float]
    """Seconds per optimizer step, publication left out."""
    memory_bytes: dict[str, int]

    @property
    def seconds(self) -> float:
        """Scoring, training and optimizer, per step."""
        return sum(self.phase_s.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutOption:
    """A rollout mesh with a number of slots."""

    layout: Layout
    slots: int
    decode_step_s: float
    """One decode step over all slots."""
    prefill_s: float
    """Prompts of one optimizer step."""
    steady_s: float
    """Generation per optimizer step with all slots full."""
    lockstep_s: float
    """Until the slowest of P groups that start together is done."""
    latency_s: float
    """Mean time of one group in slots."""
    memory_bytes: dict[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """One way to run the job, and what comes of it."""

    colocated: bool
    max_staleness: int
    """0: synchronous."""
    learner: Layout
    rollout: Layout
    slots: int
    rows_per_microbatch: int
    step_s: float
    """Seconds per optimizer step."""
    samples_per_s: float
    staleness: float
    """Expected versions between a sample's birth and its consumption."""
    idle: float
    """Share of device time without work."""
    learner_bytes: int
    """Per learner device; colocated: learner and rollout together."""
    rollout_bytes: int
    phase_s: dict[Phase, float]
    """Seconds per step of each phase, alone."""
    decode_step_s: float

    @property
    def devices(self) -> int:
        """Devices in use."""
        both = self.learner.devices + self.rollout.devices
        return self.learner.devices if self.colocated else both

    @property
    def mode(self) -> str:
        """synchronous or asynchronous."""
        return "asynchronous" if self.max_staleness else "synchronous"


def layouts(job: Job, hardware: Hardware, devices: int, *, learner: bool) -> Iterator[Layout]:
    """Meshes of all `devices` that divide the model: tensor and, for the learner, fsdp and data."""
    model, settings = job.model, job.settings
    dtype = settings.model.dtype
    attention = settings.rows_attention(hardware, model.head_size, learner=learner)
    cache = stored_in(dtype if learner else settings.rollout.stored_dtype(dtype))
    views = not learner and hardware.views_snapshots(devices, adapted=model.lora is not None)
    for tensor in _divisors(devices):
        if tensor > MAX_TENSOR or model.num_kv_heads % tensor or model.ffw_size % tensor:
            continue
        rest = devices // tensor
        for fsdp in _divisors(rest) if learner else (1,):
            if model.width % fsdp == 0:
                yield Layout(
                    data=rest // fsdp, fsdp=fsdp, tensor=tensor, compute_dtype=dtype,
                    param_dtype="float32" if learner and not model.lora else dtype,
                    attention=attention, copies_weights=not views, **cache,
                )  # fmt: skip


def learner_options(job: Job, hardware: Hardware, devices: int) -> list[LearnerOption]:
    """Each learner mesh of so many devices that fits, with its fastest micro-batch."""
    found = []
    for layout in layouts(job, hardware, devices, learner=True):
        options = [
            option
            for rows in _doublings(layout.row_shards, job.rows_per_step)
            if (option := learner_option(job, hardware, layout, rows)) is not None
        ]
        if options:
            found.append(min(options, key=lambda o: (o.seconds, sum(o.memory_bytes.values()))))
    return found


def rollout_options(job: Job, hardware: Hardware, devices: int) -> list[RolloutOption]:
    """Each rollout mesh of so many devices with each number of slots that fits."""
    settings = job.settings
    most = settings.samples_per_step * (max(1, settings.rollout.max_staleness) + 1)
    return [
        option
        for layout in layouts(job, hardware, devices, learner=False)
        for slots in _doublings(layout.data, most)
        if (option := rollout_option(job, hardware, layout, slots)) is not None
    ]


def learner_memory(job: Job, layout: Layout, rows: int) -> dict[str, int]:
    """Bytes by name of one learner device."""
    train = job.settings.train
    sizes = memory_per_device(
        job.model, layout, trains=True, rows=rows, row_tokens=train.row_tokens,
        remat=job.settings.model.remat, chunk_tokens=train.logprob_chunk_tokens,
    )  # fmt: skip
    return {**sizes, "reference": sizes["parameters"]} if job.settings.scores_reference else sizes


def rollout_memory(job: Job, layout: Layout, slots: int) -> dict[str, int]:
    """Bytes by name of one rollout device, while a new version arrives."""
    settings = job.settings
    prefixes = settings.rollout.prefixes(settings.grpo.group_size)
    own = settings.max_tokens if prefixes is None else settings.rollout.max_new_tokens
    return memory_per_device(
        job.model, layout, slots=slots, snapshots=2, max_len=own, prefixes=prefixes
    )


def learner_option(job: Job, hardware: Hardware, layout: Layout, rows: int) -> LearnerOption | None:
    """`learner_times`; None if it does not fit."""
    fits = sum(learner_memory(job, layout, rows).values()) <= hardware.hbm_bytes
    return learner_times(job, hardware, layout, rows) if fits else None


def learner_times(job: Job, hardware: Hardware, layout: Layout, rows: int) -> LearnerOption:
    """Times of the learner on this mesh, on as few nodes as hold it; ValueError if no network joins them."""
    check_network(hardware, layout.devices)
    model, settings, train = job.model, job.settings, job.settings.train
    micro, chunk = ceil_div(job.rows_per_step, rows), train.logprob_chunk_tokens
    remat, prompts = settings.model.remat, train.shared_prompts
    local = ceil_div(rows, layout.row_shards)
    tokens = local * train.row_tokens
    scored = tokens - local * (prompts.prompt_tokens if prompts else 0)
    calls = (
        (cost.train(model, layout, train.row_tokens, rows, micro, remat, chunk, prompts),
         traffic.train(model, layout, tokens, scored), settings.grpo.epochs),
        (cost.optimizer(model, layout), (), settings.updates_per_step),
        (cost.reference(model, layout, train.row_tokens, rows, micro, chunk, prompts),
         traffic.score(model, layout, tokens, scored), settings.scoring_passes),
    )  # fmt: skip
    shared, placement = _sharing(hardware, layout), placed(layout, hardware)
    seconds = {
        work.phase: number * shared
        * predict(work, linked(hardware, placement, work, traffic.repeated(found, micro))).expected_s
        for work, found, number in calls
        if number
    }  # fmt: skip
    memory = learner_memory(job, layout, rows)
    return LearnerOption(layout=layout, rows=rows, phase_s=seconds, memory_bytes=memory)


def rollout_option(
    job: Job, hardware: Hardware, layout: Layout, slots: int
) -> RolloutOption | None:
    """`rollout_times`; None if it does not fit."""
    fits = sum(rollout_memory(job, layout, slots).values()) <= hardware.hbm_bytes
    return rollout_times(job, hardware, layout, slots) if fits else None


def rollout_times(job: Job, hardware: Hardware, layout: Layout, slots: int) -> RolloutOption:
    """Times of generation on this mesh."""
    settings, rollout = job.settings, job.settings.rollout
    samples, group = settings.samples_per_step, settings.grpo.group_size
    prefixes, longest = rollout.prefixes(group), round(job.lengths.expected_max(slots))
    if prefixes is None:
        longest += rollout.max_prompt_tokens
    chunk = cost.decode(job.model, layout, slots, longest, rollout.chunk_steps, prefixes)
    shared = _sharing(hardware, layout)
    step_s = shared * predict(chunk, hardware).expected_s / rollout.chunk_steps
    prompts = settings.grpo.prompts_per_step
    refills = _refills(job, slots)
    prefill = cost.prefill(
        job.model, layout, ceil_div(prompts, refills), rollout.max_prompt_tokens,
        ceil_div(samples, refills),
    )  # fmt: skip
    prefill_s = refills * shared * predict(prefill, hardware).expected_s
    reused = max(0, samples - slots) / slots * job.held_steps
    tail = job.lengths.expected_max(min(samples, slots))
    return RolloutOption(
        layout=layout,
        slots=slots,
        decode_step_s=step_s,
        prefill_s=prefill_s,
        steady_s=samples * job.held_steps / slots * step_s + prefill_s,
        lockstep_s=(reused + tail) * step_s + prefill_s,
        latency_s=job.lengths.expected_max(group) * step_s + prefill_s / prompts,
        memory_bytes=rollout_memory(job, layout, slots),
    )


def _refills(job: Job, slots: int) -> int:
    """Prefills per optimizer step: one, or where slots are reused one after each decode chunk."""
    samples, chunk_steps = job.settings.samples_per_step, job.settings.rollout.chunk_steps
    if slots >= samples:
        return 1
    return max(1, round(samples / slots * job.held_steps / chunk_steps))


def disjoint(job: Job, hardware: Hardware, devices: int, max_staleness: int) -> list[Split]:
    """All feasible splits into devices of their own."""
    stride = max(1, devices // MAX_SPLITS)
    return [
        split_of(job, hardware, learner, rollout, max_staleness, colocated=False)
        for learning in tracked(range(stride, devices, stride), f"splits of {devices} devices")
        if (rollouts := rollout_options(job, hardware, devices - learning))
        for learner in learner_options(job, hardware, learning)
        for rollout in rollouts
    ]


def colocated(job: Job, hardware: Hardware, devices: int, max_staleness: int) -> list[Split]:
    """All feasible ways to share all devices."""
    return [
        split_of(job, hardware, learner, rollout, max_staleness, colocated=True)
        for learner in learner_options(job, hardware, devices)
        for rollout in rollout_options(job, hardware, devices)
        if sum(learner.memory_bytes.values()) + sum(rollout.memory_bytes.values())
        <= hardware.hbm_bytes
    ]


def split_of(
    job: Job, hardware: Hardware, learner: LearnerOption, rollout: RolloutOption,
    max_staleness: int, *, colocated: bool,
) -> Split:  # fmt: skip
    """What becomes of the job on these two meshes."""
    devices = learner.layout.devices, rollout.layout.devices
    phase_s = {
        Phase.PREFILL: rollout.prefill_s,
        Phase.DECODE: rollout.steady_s - rollout.prefill_s,
        **learner.phase_s,
        Phase.PUBLISH: publish_s(
            job.model, learner.layout, rollout.layout, hardware, colocated=colocated
        ),
    }
    verify_s = job.verify_s
    learns = learner.seconds + phase_s[Phase.PUBLISH]
    generates = rollout.steady_s if max_staleness else rollout.lockstep_s
    contention = max(2.0, hardware.contention) if colocated else hardware.contention
    step_s = closed_step_s(
        rollout.steady_s, rollout.lockstep_s, learns, max_staleness, verify_s=verify_s,
        contention=contention,
    )  # fmt: skip
    latency_s = rollout.latency_s + verify_s / job.settings.grpo.prompts_per_step
    stale = expected_staleness(
        rollout.steady_s, latency_s, learns, step_s, max_staleness, contention=contention
    )
    learner_bytes, rollout_bytes = (sum(o.memory_bytes.values()) for o in (learner, rollout))
    if colocated:
        idle = max(0.0, 1 - (generates + learns) / step_s)
    else:
        busy = learns * devices[0] + generates * devices[1]
        idle = max(0.0, 1 - busy / (step_s * sum(devices)))
    return Split(
        colocated=colocated,
        max_staleness=max_staleness,
        learner=learner.layout,
        rollout=rollout.layout,
        slots=rollout.slots,
        rows_per_microbatch=learner.rows,
        step_s=step_s,
        samples_per_s=job.settings.samples_per_step / step_s,
        staleness=stale,
        idle=idle,
        learner_bytes=learner_bytes + (rollout_bytes if colocated else 0),
        rollout_bytes=rollout_bytes,
        phase_s=phase_s,
        decode_step_s=rollout.decode_step_s,
    )


def publish_s(
    model: ModelConfig, learner: Layout, rollout: Layout, hardware: Hardware, *, colocated: bool
) -> float:
    """Seconds of a publication. Gathers run where the learner is; beyond one node the copies leave it."""
    work = cost.publish(model, learner, rollout, same_devices=colocated)
    devices = learner.devices + (0 if colocated else rollout.devices)
    check_network(hardware, devices)
    found = traffic.publication(model, learner, rollout)
    gathers_s = sum(placed(learner, hardware).collective_s(one, hardware) for one in found)
    copied = max(0.0, work.link_bytes - sum(one.link_bytes for one in found))
    link = hardware.link_bytes_per_s
    out = link if devices <= hardware.node_devices else min(link, hardware.network_bytes_per_s)
    seconds = gathers_s + copied / out
    rate = work.link_bytes / seconds if seconds else link
    return predict(work, dataclasses.replace(hardware, link_bytes_per_s=rate)).expected_s


def with_staleness(settings: Settings, max_staleness: int) -> Settings:
    """The same settings under another staleness bound."""
    rollout = dataclasses.replace(settings.rollout, max_staleness=max_staleness)
    return dataclasses.replace(settings, rollout=rollout)


def _sharing(hardware: Hardware, layout: Layout) -> int:
    """Devices of the mesh that compute on the same cores: simulated devices, one after another."""
    return layout.devices if hardware.devices_share_cores else 1


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _doublings(first: int, needed: int) -> Iterator[int]:
    """first, 2 first, 4 first, ... up to the one that holds `needed`."""
    size = first
    yield size
    while size < needed:
        size *= 2
        yield size
