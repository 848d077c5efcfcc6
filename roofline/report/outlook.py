"""What a finished run would have done otherwise: staleness and step time by simulation, other splits
of its devices, other settings, other hardware.

The simulation plays the run's own measured phases (`roofline.simulate.pipeline_of_run`) with the
completion lengths it sampled; other hardware is planned from the cost model (`roofline.plan`), whose
times are those of a datasheet. Loads numpy, not jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from roofline import cost
from roofline.choose import measured_vocabulary
from roofline.datasheets import datasheet
from roofline.events import Mode, Pipeline, simulate
from roofline.hardware import Hardware
from roofline.job import Job
from roofline.kernels import Layout
from roofline.lengths import Lengths, measured
from roofline.phases import Phase
from roofline.plan import advise, describe
from roofline.predict import predict
from roofline.progress import tracked
from roofline.read_run import Run
from roofline.settings import model_of, read_settings
from roofline.simulate import measured_step_s, pipeline_of_run

STEPS, CURVE_STEPS = 60, 30
"""Optimizer steps of one simulation, and of one point of the split curve."""
CURVE_SHARES = tuple(share / 40 for share in range(2, 39))
"""Shares of the devices that the split curve gives to the learner."""
STALENESS_BOUNDS = (0, 1, 2, 4)
FACTOR = 2.0
"""How many times faster a lane becomes in the what-if table."""
ASSUMED_VOCABULARY = 128
"""Tokens of a policy built from scratch, where the run's hardware.json does not say them."""
CARDS, CARD_DEVICES = ("a100-80gb-sxm", "h100-80gb-sxm", "h200", "b200", "l40s"), (2, 8)
GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """The run's own pipeline, simulated, beside what the run measured."""

    step_s: float
    """Mean time between two simulated publications [s]."""
    measured_step_s: float
    """Median time between two measured publications [s]."""
    measured_mean_s: float
    """Mean of it, pauses for evaluation and checkpoints included [s]."""
    samples_per_s: float
    rollout_idle: float
    """Share of the time in which no chunk is decoded."""
    learner_idle: float
    staleness: Mapping[str, float]
    """Shares of consumed samples by versions between birth and consumption."""
    lengths: str
    """Which completion lengths it draws from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """The same pipeline with one thing changed, simulated."""

    change: str
    step_s: float
    samples_per_s: float
    rollout_idle: float
    learner_idle: float
    staleness: float
    """Mean versions between birth and consumption."""
    speedup: float
    """Samples per second over those of the simulated run as it was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitPoint:
    """One division of the devices; times per optimizer step [s]."""

    learner_share: float
    """Of all devices, in (0, 1)."""
    generators_s: float
    """Simulated step if the learner took no time: what generation alone sustains."""
    learner_s: float
    """Learner's own time for a step."""
    step_s: float
    """Simulated, lanes together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitCurve:
    """Step time over the learner's share of the devices, each lane's measured time scaled linearly."""

    devices: int
    points: tuple[SplitPoint, ...]
    best: SplitPoint
    present_share: float
    present_s: float
    """Median measured step [s]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Elsewhere:
    """The same job on other devices, from the cost model, on the fastest feasible split."""

    hardware: str
    devices: int
    split: str
    """In words; why it does not fit where `step_s` is None."""
    step_s: float | None
    samples_per_s: float | None
    staleness: float | None
    idle: float | None
    """Share of device time without work."""
    device_gib: float | None
    """Of the fullest device [GiB]."""
    speedup: float | None
    """Over this run's measured step."""


def devices_of(run: Run) -> tuple[int, int] | None:
    """Learner and rollout devices of the run; None where both lanes share all of them, or where
    its configuration does not say."""
    sizes = [
        [run.config.get(f"mesh.{name}", "") for name in names]
        for names in (
            ("learner_data", "learner_fsdp", "learner_tensor"), ("rollout_data", "rollout_tensor"),
        )
    ]  # fmt: skip
    if run.config.get("mesh.colocated", "false").lower() == "true":
        return None
    if not all(size.isdigit() and int(size) > 0 for lane in sizes for size in lane):
        return None
    learner, rollout = ([int(size) for size in lane] for lane in sizes)
    return learner[0] * learner[1] * learner[2], rollout[0] * rollout[1]


def pipeline_and_lengths(run: Run) -> tuple[Pipeline, Lengths]:
    """What a simulation of this run needs.

    Raises:
        ValueError: the run stepped too little, or recorded no completions or no configuration.
    """
    return pipeline_of_run(run), measured(run.folder)


def simulated(run: Run, pipeline: Pipeline, lengths: Lengths) -> Simulated:
    """Play the run's own pipeline."""
    seen = simulate(pipeline, lengths, steps=STEPS)
    total = sum(seen.staleness.values())
    published = sorted(span.end_s for span in run.spans if span.phase is Phase.PUBLISH)
    return Simulated(
        step_s=seen.step_s,
        measured_step_s=measured_step_s(run),
        measured_mean_s=(published[-1] - published[0]) / (len(published) - 1),
        samples_per_s=seen.samples_per_s,
        rollout_idle=seen.rollout_idle,
        learner_idle=seen.learner_idle,
        staleness={str(k): n / total for k, n in seen.staleness.items()},
        lengths=f"{lengths.tokens.size} sampled completions, {lengths.mean:.3g} tokens on average",
    )


def changes(run: Run, pipeline: Pipeline, lengths: Lengths, job: Job | None) -> list[Change]:
    """The run as it was and with one thing changed at a time."""
    tried = {"as it ran": pipeline}
    for bound in STALENESS_BOUNDS:
        mode = Mode.IN_FLIGHT if bound else Mode.SYNCHRONOUS
        if (mode, bound) != (pipeline.mode, pipeline.max_staleness):
            name = f"staleness at most {bound}" + ("" if bound else " (synchronous)")
            tried[name] = dataclasses.replace(pipeline, mode=mode, max_staleness=bound)
    if pipeline.mode is Mode.IN_FLIGHT:
        tried["weights swapped only when all slots are empty"] = dataclasses.replace(
            pipeline, mode=Mode.ASYNCHRONOUS
        )
    tried[f"learner {FACTOR:g} times as fast"] = faster(pipeline, learner=FACTOR)
    tried[f"generators {FACTOR:g} times as fast"] = faster(pipeline, generators=FACTOR)
    if pipeline.contention > 1:
        tried["lanes on devices of their own"] = dataclasses.replace(pipeline, contention=1.0)
    if job is not None:
        for slots in (pipeline.slots // 2, pipeline.slots * 2):
            if slots > 0:
                tried[f"{slots} slots"] = _with_slots(run, pipeline, job, slots)
    seen = {
        name: simulate(one, lengths, steps=STEPS)
        for name, one in tracked(list(tried.items()), "other settings")
    }
    base = seen["as it ran"].samples_per_s
    return [
        Change(
            change=name,
            step_s=one.step_s,
            samples_per_s=one.samples_per_s,
            rollout_idle=max(0.0, one.rollout_idle),
            learner_idle=max(0.0, one.learner_idle),
            staleness=one.mean_staleness,
            speedup=one.samples_per_s / base,
        )
        for name, one in seen.items()
    ]


def faster(pipeline: Pipeline, *, learner: float = 1.0, generators: float = 1.0) -> Pipeline:
    """The pipeline with its lanes so many times as fast."""
    return dataclasses.replace(
        pipeline,
        decode_step_s=pipeline.decode_step_s / generators,
        admit_s=pipeline.admit_s / generators,
        prompt_s=pipeline.prompt_s / generators,
        learner_s=pipeline.learner_s / learner,
        publish_s=pipeline.publish_s / learner,
    )


def _with_slots(run: Run, pipeline: Pipeline, job: Job, slots: int) -> Pipeline:
    """The decode step scaled by what the cost model says of so many slots."""
    spans = [s.work for s in run.spans if s.phase is Phase.DECODE and s.work.get("kv_len")]
    kv_len = round(sum(work["kv_len"] for work in spans) / len(spans)) if spans else 1
    dtype, devices = job.settings.model.dtype, devices_of(run)
    layout = Layout(
        data=devices[1] if devices else 1, compute_dtype=dtype, param_dtype=dtype, kv_dtype=dtype
    )

    def chunk_s(number: int) -> float:
        work = cost.decode(job.model, layout, number, kv_len, pipeline.chunk_steps)
        return predict(work, run.hardware).expected_s

    scaled_s = pipeline.decode_step_s * chunk_s(slots) / chunk_s(pipeline.slots)
    return dataclasses.replace(pipeline, slots=slots, decode_step_s=scaled_s)


def split_curve(run: Run, pipeline: Pipeline, lengths: Lengths) -> SplitCurve | None:
    """Simulate the run with its devices divided otherwise; None where the lanes share them all."""
    devices = devices_of(run)
    if devices is None:
        return None
    learner, rollout = devices
    present = learner / (learner + rollout)
    alone = dataclasses.replace(pipeline, contention=1.0, learner_s=1e-9, publish_s=0.0)
    generators_s = simulate(alone, lengths, steps=CURVE_STEPS).step_s
    learner_s = pipeline.learner_s + pipeline.publish_s

    def point(share: float) -> SplitPoint:
        scale, other = share / present, (1 - share) / (1 - present)
        moved = faster(pipeline, learner=scale, generators=other)
        return SplitPoint(
            learner_share=share,
            generators_s=generators_s / other,
            learner_s=learner_s / scale,
            step_s=simulate(moved, lengths, steps=CURVE_STEPS).step_s,
        )

    points = tuple(point(share) for share in tracked(CURVE_SHARES, "other splits"))
    return SplitCurve(
        devices=learner + rollout,
        points=points,
        best=min(points, key=lambda p: p.step_s),
        present_share=present,
        present_s=measured_step_s(run),
    )


def job_of_run(run: Run, lengths: Lengths) -> Job:
    """The run's work, whatever the devices.

    Raises:
        ValueError: its configuration or its model cannot be read from here.
    """
    settings = read_settings(str(run.folder))
    vocab_size = measured_vocabulary(run.hardware, settings) or ASSUMED_VOCABULARY
    model = model_of(settings, vocab_size)
    return Job(model=model, settings=settings, lengths=lengths)


def elsewhere(job: Job, measured_s: float) -> list[Elsewhere]:
    """The job on datasheet hardware, on its fastest feasible split."""
    return [_on(job, datasheet(card), n, measured_s) for card in CARDS for n in CARD_DEVICES]


def _on(job: Job, hardware: Hardware, devices: int, measured_s: float) -> Elsewhere:
    try:
        best = advise(job, hardware, devices).best
    except ValueError as error:
        return Elsewhere(
            hardware=hardware.name, devices=devices, split=str(error), step_s=None,
            samples_per_s=None, staleness=None, idle=None, device_gib=None, speedup=None,
        )  # fmt: skip
    return Elsewhere(
        hardware=hardware.name,
        devices=devices,
        split=describe(best),
        step_s=best.step_s,
        samples_per_s=best.samples_per_s,
        staleness=best.staleness,
        idle=best.idle,
        device_gib=max(best.learner_bytes, best.rollout_bytes) / GIB,
        speedup=measured_s / best.step_s,
    )
