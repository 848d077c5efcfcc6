"""Supervised training on chats, with the learner, checkpoints and logs of `jaxrl.train`.

    read every chat, render, tokenise, mask            jaxrl.chats; bad rows end the run here
    each step:   the next chats of a shuffled epoch    one token-mean loss over all of them
                 pack, forward, backward, AdamW        micro-batches of train.rows_per_microbatch rows
    now and then: loss of the chats held out, replies sampled for some of them, checkpoint

Which chats a step takes follows from the seed and the step alone, so a stopped run goes on exactly. The
temperature of the loss is 1 whatever rollout.temperature says. All devices of the learner's mesh train;
replies are sampled on the first of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxrl import build
from jaxrl.batch import Batch
from jaxrl.checkpoint import FIRST_STEP, Checkpoints
from jaxrl.cli import ParsedArgs, config_yaml
from jaxrl.config import Config, GrpoConfig
from jaxrl.devices import make_meshes, start_devices
from jaxrl.errors import UserError
from jaxrl.fine_tune_data import Material, chosen, packed, read_material
from jaxrl.interrupt import stop_asked
from jaxrl.learner.learner import Learner
from jaxrl.learner.optimizer import learning_rate
from jaxrl.observe import Observer
from jaxrl.plan import make_plan, workload_of
from jaxrl.policy import check_weights, describe_policy, first_policy, with_adapter
from jaxrl.replies import ReplySampler
from jaxrl.run_folder import RunFolder, open_run
from jaxrl.start import existing_checkpoints, fork
from jaxrl.telemetry.metrics import MetricsWriter
from jaxrl.telemetry.progress import RunProgress, format_duration
from jaxrl.telemetry.samples import append_samples
from jaxrl.telemetry.spans import SpanRecorder
from jaxrl.telemetry.tables import print_plan
from models.hf import export_policy
from roofline.calibrate import cached_or_calibrate
from roofline.hardware import Hardware
from roofline.phases import Phase
from roofline.predict import predict


def fine_tune(parsed: ParsedArgs, argv: Sequence[str]) -> None:
    """One run from its chats to its last checkpoint; resumes where the run folder's checkpoints end."""
    config = _for_chats(parsed.config)
    material = read_material(config)
    check_weights(config.model, material.model)
    steps = material.steps(config)
    start_devices(config.mesh.devices)
    meshes = make_meshes(config.mesh)
    hardware = cached_or_calibrate(
        replace(material.model, lora=None), workload=workload_of(config), again=parsed.recalibrate
    )
    print_plan(_plan_rows(config, material, hardware))
    if config.run.fork_from is not None:
        existing_checkpoints(config.run.fork_from)
    if parsed.dry_run:
        return
    with ExitStack() as stack:
        folder = stack.enter_context(closing(open_run(parsed.config, argv)))
        hardware.save(folder.hardware)
        describe_policy(config.model, material.model, material.tokenizer, folder.path)
        checkpoints = stack.enter_context(
            closing(Checkpoints(folder.checkpoints, keep=config.checkpoint.keep))
        )
        done = checkpoints.latest()
        logs = stack.enter_context(closing(_Logs(folder, config, material, hardware, done, steps)))
        learner = _learner(config, material, meshes[0], logs.observer, steps)
        if done is not None:
            check_kind(checkpoints.restore_record(done), folder.path)
            learner.restore(checkpoints, done)
        sampler = ReplySampler(config, material, meshes) if config.sft.samples else None
        run = FineTune(config, material, learner, checkpoints, logs, sampler, folder.path)
        with logs.progress, stop_asked() as asked:
            completed = run.train(done, steps, asked.is_set)
        if not completed:
            raise KeyboardInterrupt


def check_kind(record: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError unless the checkpoint is one of supervised training on chats."""
    if record.get("kind") != "sft":
        raise UserError(
            f"{folder} holds a run of reinforcement learning; start this one in a folder of its own with "
            f"--run.dir=ANOTHER_FOLDER (and --run.fork-from={folder} to begin with its weights)"
        )


def _for_chats(config: Config) -> Config:
    """The configuration as its parts see it here: temperature 1, no RL algorithm, few slots, one mesh."""
    if not config.model.chat and config.model.system is not None:
        raise UserError("model.system is set, but model.chat is false; set model.chat=true")
    if config.mesh.auto:
        raise UserError(
            "mesh.auto splits devices between learner and rollout, of which supervised training has one; "
            "name the learner's: --mesh.auto=false --mesh.learner-fsdp=N"
        )
    shards = config.mesh.rollout_data
    slots = max(1, math.ceil(config.sft.samples / shards)) * shards
    return replace(
        config,
        rollout=replace(config.rollout, temperature=1.0, top_p=1.0, top_k=0, slots=slots),
        grpo=GrpoConfig(),
        mesh=replace(config.mesh, colocated=True),
        train=replace(config.train, shared_prompt_tokens=0),
    )


def _learner(
    config: Config, material: Material, mesh: Mesh, observer: Observer, steps: int
) -> Learner:
    sft = config.sft
    base = first_policy(config.model, material.model, mesh, config.run.seed)
    if config.run.fork_from is not None:
        base = fork(base, config.run.fork_from)
    rate = learning_rate(
        peak=sft.learning_rate, warmup_steps=sft.warmup_steps, steps=steps, schedule=sft.schedule
    )
    policy = with_adapter(base, mesh, config.run.seed)
    return build.make_learner_at(config, material.model, mesh, policy, rate, observer)


def _plan_rows(
    config: Config, material: Material, hardware: Hardware
) -> list[tuple[str, str, str]]:
    plan = make_plan(config, material.model, hardware)
    train, steps = material.train, material.steps(config)
    tokens = sum(len(chat.tokens) for chat in train)
    learnt = sum(int(chat.learnt.sum()) for chat in train)
    batches, padding = packed(config, [train[i] for i in chosen(config, 1, len(train))])
    predicted = sum(
        predict(cost, hardware).expected_s
        for cost in (plan.shapes.train(len(batches)), plan.shapes.optimizer())
    )
    lora, memory = material.model.lora, sum(plan.learner_bytes.values())
    trained = (
        "all weights" if lora is None else f"adapter of rank {lora.rank} on {config.lora.targets}"
    )
    left_out = f"; {material.skipped} rows too long, left out" if material.skipped else ""
    return [
        ("parameters", f"{material.model.num_parameters:,}", f"{config.model.path}; {trained}"),
        ("chats", f"{len(train):,}", f"{len(material.held_out)} held out{left_out}"),
        ("tokens", f"{tokens:,}", f"{learnt:,} of them learnt"),
        ("steps", f"{steps:,}", f"{config.sft.sequences_per_step} chats each"),
        ("first step", f"{len(batches)} micro-batches", f"{padding:.0%} padding"),
        ("learner memory", f"{memory / 2**30:.2f} GiB", "per device"),
        ("predicted step", f"{1e3 * predicted:.1f} ms", hardware.name),
    ]


class _Logs:
    """metrics.jsonl, spans.jsonl, samples.jsonl, TensorBoard and the terminal."""

    def __init__(
        self, folder: RunFolder, config: Config, material: Material, hardware: Hardware,
        done: int | None, steps: int,
    ) -> None:  # fmt: skip
        folder.rewind(done if folder.resumed else None)
        first = done or 0
        self.recorder = SpanRecorder(
            folder.spans, predict=partial(predict, hardware=hardware), first_step=first + 1
        )
        shapes = make_plan(config, material.model, hardware).shapes
        self.observer = Observer(self.recorder, shapes)
        self.progress = RunProgress(steps, first_step=first)
        self.writer = MetricsWriter(folder.metrics, folder.tensorboard)
        self.writer.config(config_yaml(config))
        self._samples = folder.samples

    def samples(self, records: Sequence[dict[str, Any]], step: int) -> None:
        """To samples.jsonl and TensorBoard."""
        append_samples(self._samples, records)
        shown = "\n\n".join(
            f"**held out**\n\n{_indented(r['prompt'] + r['completion'])}" for r in records
        )
        self.writer.text("samples/held_out", shown, step)

    def close(self) -> None:
        """Write what is buffered."""
        self.recorder.close()
        self.writer.close()


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


@dataclass(frozen=True, slots=True)
class FineTune:
    """The loop."""

    config: Config
    material: Material
    learner: Learner
    checkpoints: Checkpoints
    logs: _Logs
    sampler: ReplySampler | None
    folder: Path

    def train(self, done: int | None, steps: int, asked: Callable[[], bool]) -> bool:
        """Optimizer steps until `steps`; False if `asked` ended them before."""
        held_out = packed(self.config, self.material.held_out)[0] if self.material.held_out else []
        record = (
            self.checkpoints.restore_record(done) if done is not None else self._begin(held_out)
        )
        began = time.perf_counter() - record["wall_s"]
        for step in range((done or 0) + 1, steps + 1):
            metrics = self._step(step)
            record["learnt_tokens"] += int(metrics["sft/learnt_tokens"])
            ends, stops = step == steps, asked()
            if ends or _due(step, self.config.eval.every_steps):
                metrics |= self._evaluate(held_out, step)
            record |= {"step": step, "wall_s": time.perf_counter() - began}
            if "eval/loss" in metrics:
                record["last_loss"] = metrics["eval/loss"]
            times = self.logs.recorder.close_step(step)
            line = self.logs.writer.write(step=step, version=step, metrics={**metrics, **times})
            self.logs.progress.update(step, line)
            if ends or stops or _due(step, self.config.checkpoint.every_steps):
                with self.logs.observer.phase(Phase.CHECKPOINT):
                    self.checkpoints.save(step, self.learner.state, record)
            if _due(step, self.config.checkpoint.export_every_steps):
                out = self.folder / "exports" / f"step_{step}"
                export_policy(self.learner.policy, out, run=self.folder, dtype="bfloat16")
            if stops and not ends:
                return False
        self._say(record)
        return True

    def _begin(self, held_out: Sequence[Batch]) -> dict[str, Any]:
        """Record of a new run. Checkpoint 0 is made for the frozen base of an adapter only."""
        first = self._evaluate(held_out, FIRST_STEP)
        self.logs.writer.curves(FIRST_STEP, first)
        record = {
            "kind": "sft", "step": FIRST_STEP, "learnt_tokens": 0, "wall_s": 0.0,
            "first_loss": first.get("eval/loss"), "last_loss": first.get("eval/loss"),
        }  # fmt: skip
        if self.learner.frozen is not None:
            self.checkpoints.save(FIRST_STEP, self.learner.state, record, self.learner.frozen)
        return record

    def _step(self, step: int) -> dict[str, float]:
        began = time.perf_counter()
        chats = [
            self.material.train[i] for i in chosen(self.config, step, len(self.material.train))
        ]
        batches, padding = packed(self.config, chats)
        metrics = self.learner.update_sft(batches)
        tokens = sum(len(chat.tokens) for chat in chats)
        return {
            **metrics,
            "sft/learnt_tokens": float(sum(int(chat.learnt.sum()) for chat in chats)),
            "sft/epoch": self._epoch(step),
            "perf/padding_ratio": padding,
            "perf/tokens_per_s": tokens / (time.perf_counter() - began),
            "batch/microbatches": float(len(batches)),
        }

    def _epoch(self, step: int) -> float:
        """Passes over the chats after this step."""
        sft, total = self.config.sft, len(self.material.train)
        passes = step * sft.sequences_per_step / total
        return passes if sft.steps else min(passes, float(sft.epochs))

    def _evaluate(self, held_out: Sequence[Batch], step: int) -> dict[str, float]:
        """Held-out loss, and replies to read."""
        with self.logs.observer.phase(Phase.EVAL):
            if self.sampler is not None and (records := self.sampler.records(self.learner, step)):
                self.logs.samples(records, step)
            return {"eval/loss": self.learner.sft_loss(held_out)} if held_out else {}

    def _say(self, record: Mapping[str, Any]) -> None:
        note = self.logs.progress.note
        if record["first_loss"] is not None:
            note(
                f"held-out loss {record['first_loss']:.4f} before, {record['last_loss']:.4f} after"
            )
        note(
            f"{record['step']} steps, {record['learnt_tokens']:,} learnt tokens in "
            f"{format_duration(record['wall_s'])}"
        )
        note(f"export:        python -m models.hf export --run {self.folder} --out FOLDER")
        note(f"reinforcement: python -m jaxrl.train ... --run.fork-from {self.folder}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
