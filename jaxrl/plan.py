"""What a configuration amounts to, before anything runs: derived sizes, memory, predicted times.

Refuses what cannot work on the given devices, with the nearest sizes that can.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

from jaxrl.algorithms.contradictions import unread
from jaxrl.config import Config, GrpoConfig
from jaxrl.errors import UserError
from jaxrl.observe import Shapes
from jaxrl.tokenizer import Tokenizer
from models.config import ModelConfig
from models.rows import samples_per_row
from roofline import settings
from roofline.hardware import Hardware
from roofline.job import Job
from roofline.kernels import Layout, stored_in
from roofline.lengths import lognormal
from roofline.machine import Workload
from roofline.memory import memory_per_device
from roofline.phases import Phase
from roofline.splits import Split, learner_times, rollout_times, split_of

_GIB, _MIB = 2**30, 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Sizes and predictions of one optimizer step in which every completion reaches its limit."""

    shapes: Shapes
    samples: int
    """Completions per optimizer step, P * G."""
    microbatches: int
    """Micro-batches per optimizer step at full length."""
    learner_bytes: dict[str, int]
    """Memory of one learner device by name [bytes]."""
    rollout_bytes: dict[str, int]
    """Memory of one rollout device by name [bytes]."""
    phase_s: dict[Phase, float]
    """Predicted seconds per optimizer step, each phase alone."""
    lockstep_s: float
    """Predicted seconds of an optimizer step with staleness 0."""
    overlapped_s: float
    """The same with the lanes beside each other, within the run's staleness bound or 1."""


def make_plan(config: Config, model: ModelConfig, hardware: Hardware) -> Plan:
    """Derive and check everything. Raises: UserError for sizes that do not fit the devices."""
    shapes = make_shapes(config, model)
    check_divisible(config, shapes)
    samples = config.grpo.prompts_per_step * config.grpo.group_size
    held = samples_per_row(
        config.train.row_tokens, config.train.shared_prompts, group=config.grpo.group_size,
        prompt=config.rollout.max_prompt_tokens, completion=config.rollout.max_new_tokens,
    )  # fmt: skip
    rows = -(-samples // held)
    microbatches = -(-rows // config.train.rows_per_microbatch)
    learner, rollout = _memory(config, shapes)
    _check_memory(config, hardware, learner, rollout)
    lockstep, overlapped = _splits(config, shapes, hardware)
    return Plan(
        shapes=shapes,
        samples=samples,
        microbatches=microbatches,
        learner_bytes=learner,
        rollout_bytes=rollout,
        phase_s=lockstep.phase_s | _waiting(config),
        lockstep_s=lockstep.step_s,
        overlapped_s=overlapped.step_s,
    )


def make_shapes(config: Config, model: ModelConfig, device: Any = None) -> Shapes:
    """Static shapes and layouts of both meshes, of devices like `device` (None: those of this process)."""
    import jax  # not with the module, which readers of a run load too  # noqa: PLC0415

    from jaxrl.attention import choose_programs  # noqa: PLC0415
    from models.fused import can_view  # noqa: PLC0415

    mesh, dtype, device = config.mesh, config.model.dtype, device or jax.local_devices()[0]
    programs = choose_programs(config, device, model)
    return Shapes(
        model=model,
        learner=Layout(
            data=mesh.learner_data, fsdp=mesh.learner_fsdp, tensor=mesh.learner_tensor,
            compute_dtype=dtype, param_dtype=dtype if model.lora else "float32", kv_dtype=dtype,
            attention=programs.train,
        ),
        rollout=Layout(
            data=mesh.rollout_data, tensor=mesh.rollout_tensor,
            compute_dtype=dtype, param_dtype=dtype, attention=programs.prompts,
            copies_weights=not can_view(model, device, mesh.rollout_data * mesh.rollout_tensor),
            **stored_in(config.rollout.stored_dtype(dtype)),
        ),
        num_slots=config.rollout.slots,
        prefixes=config.rollout.prefixes(config.grpo.samples_per_prompt),
        chunk_tokens=config.train.logprob_chunk_tokens,
        row_tokens=config.train.row_tokens,
        shared=config.train.shared_prompts,
        rows_per_microbatch=config.train.rows_per_microbatch,
        remat=config.model.remat,
        colocated=mesh.colocated,
    )  # fmt: skip


def workload_of(config: Config) -> Workload:
    """The shapes at which calibration measures this run's phases."""
    shapes = settings.workload_of(settings.settings_from(asdict(config)))
    return replace(shapes, mesh=_devices(config))


def plan_rows(
    config: Config, plan: Plan, hardware: Hardware, tokenizer: Tokenizer
) -> list[tuple[str, str, str]]:
    """Rows (quantity, value, how it follows) of the printed plan."""
    model, grpo, train, rollout = plan.shapes.model, config.grpo, config.train, config.rollout
    rows = [
        (
            "parameters",
            f"{model.num_parameters:,}",
            f"{model.num_layers} layers of width {model.width}, {model.vocab_size} {tokenizer.name}",
        ),
        (
            "samples per step",
            f"{plan.samples:,}",
            f"{grpo.prompts_per_step} prompts x {grpo.group_size} samples",
        ),
        (
            "micro-batch",
            f"{train.rows_per_microbatch * train.row_tokens:,} tokens",
            f"{train.rows_per_microbatch} packed rows x {train.row_tokens}; at most "
            f"{plan.microbatches} per step",
        ),
        (
            "decode slots",
            f"{rollout.slots:,}",
            f"chunks of {rollout.chunk_steps} steps, up to {rollout.max_new_tokens} new tokens",
        ),
        (
            "staleness",
            f"<= {rollout.max_staleness}",
            f"{rollout.max_staleness + 1} x {grpo.prompts_per_step} groups may be under way",
        ),
        ("devices", f"{config.mesh.devices}", _devices(config)),
        ("learner memory", _size(plan.learner_bytes), _parts(plan.learner_bytes)),
        ("rollout memory", _size(plan.rollout_bytes), _parts(plan.rollout_bytes)),
        ("hardware", _known(hardware), hardware.name),
        *_warned(hardware),
        *_refilled(config.grpo),
        *[("not read", written, f"only with {switch}") for written, switch in unread(grpo)],
    ]
    rows += [
        (f"predicted {phase}", f"{1e3 * seconds:.1f} ms", _beside(phase, seconds, hardware))
        for phase, seconds in plan.phase_s.items()
    ]
    gain = plan.lockstep_s / plan.overlapped_s
    if gain > 1:
        verdict = f"overlap of the lanes predicts {gain:.2f}x over lockstep"
    else:
        verdict = "no gain from overlap: the lanes share what binds them"
    step_s = plan.overlapped_s if rollout.max_staleness else plan.lockstep_s
    rows.append(
        (
            "predicted step",
            f"{1e3 * step_s:.0f} ms",
            f"completions at their limit, no group dropped; {verdict}",
        )
    )
    return rows


def _refilled(grpo: GrpoConfig) -> list[tuple[str, str, str]]:
    """The budget of dynamic sampling, if there is any."""
    if grpo.refill_rounds == 0:
        return []
    most = grpo.refill_rounds * grpo.prompts_per_step
    says = (
        f"up to {most:,} further groups of {grpo.samples_per_prompt} samples in a step; then it goes on with "
        "the groups that have signal"
    )
    return [("dynamic sampling", f"{grpo.refill_rounds} rounds", says)]


def _beside(phase: Phase, seconds: float, hardware: Hardware) -> str:
    """What the predicted seconds of a phase are, and what the other lane makes of them."""
    alone = "per step, alone"
    slower = hardware.contention_of(phase)
    if slower == 1 or phase is Phase.REWARD:
        return alone
    return f"{alone}; {1e3 * slower * seconds:.1f} ms while the other lane computes all along"


def _known(hardware: Hardware) -> str:
    if not hardware.calibrated:
        return "datasheet"
    return f"calibrated {_ago(hardware.date, datetime.now().astimezone())}"


def _ago(date: str, now: datetime) -> str:
    """How long before `now` the ISO date, with a time zone, was; a day without a time as it stands."""
    if len(date) <= len("2026-01-31"):
        return date
    minutes = (now - datetime.fromisoformat(date)).total_seconds() / 60
    if minutes < 2:
        return "just now"
    hours = minutes / 60
    return (
        f"{minutes:.0f} minutes ago"
        if hours < 2
        else f"{hours:.0f} hours ago"
        if hours < 48
        else f"{hours / 24:.0f} days ago"
    )


def _warned(hardware: Hardware) -> list[tuple[str, str, str]]:
    """A row that says what spoilt the calibration, if anything did."""
    if not hardware.disturbance:
        return []
    remedy = "predicted times may be too long; not kept, the next start measures again"
    return [("calibration", "DISTURBED", f"{hardware.disturbance}: {remedy}")]


def _devices(config: Config) -> str:
    mesh = config.mesh
    shared = "colocated" if mesh.colocated else "disjoint"
    return (
        f"{shared}; learner data {mesh.learner_data} x fsdp {mesh.learner_fsdp} x tensor "
        f"{mesh.learner_tensor}, rollout data {mesh.rollout_data} x tensor {mesh.rollout_tensor}"
    )


def _size(parts: dict[str, int]) -> str:
    total = sum(parts.values())
    return f"{total / _GIB:.2f} GiB" if total >= _GIB else f"{total / _MIB:.1f} MiB"


def _parts(parts: dict[str, int]) -> str:
    return (
        ", ".join(f"{name.replace('_', ' ')} {n / _MIB:.1f}" for name, n in parts.items()) + " MiB"
    )


def check_divisible(config: Config, shapes: Shapes) -> None:
    """Raises: UserError for rows, slots, heads or sizes that the meshes do not divide."""
    rows, row_shards = config.train.rows_per_microbatch, shapes.learner.row_shards
    if rows % row_shards:
        below = rows // row_shards * row_shards
        raise UserError(
            f"train.rows_per_microbatch={rows} cannot be split over mesh.learner_data * "
            f"mesh.learner_fsdp = {row_shards} devices; use {_nearest(below, row_shards)}"
        )
    slots, slot_shards = config.rollout.slots, shapes.rollout.row_shards
    if slots % slot_shards:
        below = slots // slot_shards * slot_shards
        raise UserError(
            f"rollout.slots={slots} cannot be split over mesh.rollout_data={slot_shards} devices; "
            f"use {_nearest(below, slot_shards)}"
        )
    for name, layout in (("learner", shapes.learner), ("rollout", shapes.rollout)):
        if shapes.model.num_kv_heads % layout.tensor:
            heads = shapes.model.num_kv_heads
            valid = [n for n in range(1, heads + 1) if heads % n == 0]
            raise UserError(
                f"mesh.{name}_tensor={layout.tensor} does not divide the {heads} kv heads; use one of {valid}"
            )


def _waiting(config: Config) -> dict[Phase, float]:
    """Seconds per step that the verifiers take."""
    latency_s = _reward_latency_s(config)
    return {Phase.REWARD: latency_s} if latency_s else {}


def _reward_latency_s(config: Config) -> float:
    """Latency of a step's verdicts: one after another in each worker, or once for all without workers."""
    task, grpo = config.task, config.grpo
    samples = grpo.prompts_per_step * grpo.group_size
    in_a_row = -(-samples // task.reward_workers) if task.reward_workers else 1
    return task.reward_latency_s * in_a_row


def _nearest(below: int, step: int) -> str:
    return f"{below} or {below + step}" if below else str(step)


def _memory(config: Config, shapes: Shapes) -> tuple[dict[str, int], dict[str, int]]:
    train, rollout = config.train, config.rollout
    learner = memory_per_device(
        shapes.model, shapes.learner, trains=True, rows=train.rows_per_microbatch,
        row_tokens=train.row_tokens, remat=config.model.remat,
        chunk_tokens=train.logprob_chunk_tokens,
    )  # fmt: skip
    parts = dict(learner)
    if config.grpo.uses_reference:
        learner["reference"] = parts["adapter" if "adapter" in parts else "parameters"]
    if config.grpo.advantage_baseline == "value" and config.grpo.critic_trunk == "separate":
        learner["critic"] = sum(parts[n] for n in ("parameters", "gradients", "optimizer"))
    prefixes = rollout.prefixes(config.grpo.samples_per_prompt)
    rolls = memory_per_device(
        shapes.model, shapes.rollout, slots=rollout.slots, snapshots=2, prefixes=prefixes,
        max_len=rollout.max_new_tokens + (rollout.max_prompt_tokens if prefixes is None else 0),
    )  # fmt: skip
    return learner, rolls


def _check_memory(
    config: Config, hardware: Hardware, learner: dict[str, int], rollout: dict[str, int]
) -> None:
    both = sum(learner.values()) + sum(rollout.values())
    needs = {"learner and rollout": both} if config.mesh.colocated else {
        "learner": sum(learner.values()), "rollout": sum(rollout.values()),
    }  # fmt: skip
    for name, needed in needs.items():
        if needed > hardware.hbm_bytes:
            raise UserError(
                f"the {name} needs {needed / _GIB:.1f} GiB per device, but {hardware.name} has "
                f"{hardware.hbm_bytes / _GIB:.1f} GiB; lower train.rows_per_microbatch or "
                "train.logprob_chunk_tokens (learner), rollout.slots or rollout.max_new_tokens "
                "(rollout), set model.remat=block, or shard over more devices (mesh.*)"
            )


def _splits(config: Config, shapes: Shapes, hardware: Hardware) -> tuple[Split, Split]:
    """The configured split of the devices as `roofline.plan` predicts it, in lockstep and overlapped, with
    every completion at its limit."""
    limit = config.rollout.max_new_tokens
    job = Job(
        model=shapes.model, settings=settings.settings_from(asdict(config)),
        lengths=lognormal(limit, 0, limit),
    )  # fmt: skip
    learner = learner_times(job, hardware, shapes.learner, config.train.rows_per_microbatch)
    rollout = rollout_times(job, hardware, shapes.rollout, config.rollout.slots)
    bound = max(1, config.rollout.max_staleness)
    lockstep, overlapped = (
        split_of(job, hardware, learner, rollout, n, colocated=shapes.colocated) for n in (0, bound)
    )
    return lockstep, overlapped
