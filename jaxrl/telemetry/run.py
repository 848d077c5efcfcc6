"""Everything one run reports, behind one object: spans, curves, samples, progress, watchdog."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from jaxrl.buffer import GroupBuffer
from jaxrl.cli import config_yaml
from jaxrl.config import Config
from jaxrl.observe import Observer, Shapes
from jaxrl.plan import Plan
from jaxrl.run_folder import RunFolder
from jaxrl.telemetry.metrics import MetricsWriter, assert_share
from jaxrl.telemetry.progress import RunProgress
from jaxrl.telemetry.samples import append_samples, sample_records, samples_markdown
from jaxrl.telemetry.spans import SpanRecorder
from jaxrl.telemetry.watchdog import HangError, Limits, Watchdog, abort
from jaxrl.types import RolloutGroup
from roofline.hardware import Hardware
from roofline.phases import Phase
from roofline.predict import predict

SAMPLES_EVERY_STEPS = 10
"""Steps between the rollouts shown in TensorBoard; samples.jsonl gets some of every step."""
_UNWIND_S = 30.0
"""Time the main thread gets to report a hang itself before the process is ended."""


class RunTelemetry:
    """Writes the run folder's logs from optimizer step `step` on."""

    def __init__(
        self, folder: RunFolder, config: Config, plan: Plan, hardware: Hardware, *, step: int
    ) -> None:
        folder.rewind(step if folder.resumed else None)
        self.recorder = SpanRecorder(
            folder.spans, predict=partial(predict, hardware=hardware), first_step=step + 1
        )
        self.observer = Observer(self.recorder, plan.shapes)
        self.progress = RunProgress(config.train.steps, first_step=step)
        self._writer = MetricsWriter(folder.metrics, folder.tensorboard)
        self._writer.config(config_yaml(config))
        self._samples = folder.samples
        self._hardware = hardware
        self._peak = hardware.peak(config.model.dtype)
        self._logged_at = time.perf_counter()
        self._left_out: set[str] = set()
        self._step = step
        self._limits = _limits(config, plan)

    def observer_of(self, shapes: Shapes) -> Observer:
        """What records phases of other shapes than the plan's, as a stage of the length curriculum has."""
        return Observer(self.recorder, shapes)

    def curves(self, step: int, metrics: Mapping[str, float]) -> None:
        """Points that belong to no optimizer step's line, e.g. the first evaluation."""
        self._writer.curves(step, metrics)

    def log_step(
        self, step: int, metrics: Mapping[str, float], groups: Sequence[RolloutGroup],
        staleness: Sequence[int],
    ) -> None:  # fmt: skip
        """Close optimizer step `step`: its line of metrics, its curves, its samples, its progress."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        lengths = np.array([len(rollout.completion.tokens) for rollout in rollouts])
        line = {
            **metrics,
            **staleness_curves(staleness, groups),
            **self._rates(self.recorder.close_step(step), len(rollouts), int(lengths.sum())),
        }
        written = self._writer.write(step=step, version=step, metrics=line)
        self._writer.histogram("completions/length", lengths, step)
        self._writer.histogram("off_policy/staleness", np.array(staleness), step)
        records = sample_records(step, groups)
        append_samples(self._samples, records)
        if step % SAMPLES_EVERY_STEPS == 1:
            self._writer.text("rollouts/samples", samples_markdown(records), step)
        self.progress.update(step, written)

    @contextlib.contextmanager
    def watched(self, buffer: GroupBuffer) -> Iterator[None]:
        """Inside it a phase that runs far past its prediction ends the run with an error that names it."""

        def on_hang(error: HangError) -> None:
            buffer.fail(error)
            threading.Timer(_UNWIND_S, abort, [error]).start()

        watchdog = Watchdog(self.recorder.open_spans, self.recorder.now_s, self._limits, on_hang)
        watchdog.start()
        self.recorder.close_step(self._step)  # the time of the first step begins here
        self._logged_at = time.perf_counter()
        try:
            with self.progress:
                yield
        finally:
            watchdog.stop()

    def close(self) -> None:
        """Write what is buffered."""
        self.recorder.close()
        self._writer.close()

    def _rates(
        self, times: Mapping[str, float], samples: int, sampled_tokens: int
    ) -> dict[str, float]:
        now = time.perf_counter()
        step_s, self._logged_at = now - self._logged_at, now
        rates = {
            **times,
            "time/step_s": step_s,
            "perf/samples_per_s": samples / step_s,
            "perf/effective_tokens_per_s": sampled_tokens / step_s,
        }
        if "roofline/train/flops_per_s" in times:
            mfu = times["roofline/train/flops_per_s"] / self._peak
            rates |= self._share("perf/mfu_train", mfu)
        if "roofline/decode/bytes_per_s" in times:
            mbu = times["roofline/decode/bytes_per_s"] / self._hardware.hbm_bytes_per_s
            rates |= self._share("perf/mbu_decode", mbu)
        for name in ("perf/trainer_idle_ratio", "perf/rollouter_idle_ratio"):
            assert_share(name, times[name], zero_allowed=True)
        return rates

    def _share(self, name: str, value: float) -> dict[str, float]:
        """The share of a peak; left out, and said once, where it exceeds a peak that was measured here."""
        if value <= 1 or not self._hardware.calibrated:
            return {name: assert_share(name, value)}
        if name not in self._left_out:
            self._left_out.add(name)
            self.progress.note(
                f"{name} would be {value:.0%} and is left out: this machine is faster than its "
                "calibration says; measure it again with --recalibrate"
            )
        return {}


def _limits(config: Config, plan: Plan) -> Limits:
    """Evaluations sample as steps do. Verifiers that run programs or parse text may use their time."""
    evaluated = config.eval.problems * config.eval.samples / plan.samples
    predicted_s = {**plan.phase_s, Phase.EVAL: evaluated * plan.phase_s[Phase.DECODE]}
    if config.task.judge is None:
        return Limits(predicted_s=predicted_s)
    workers = max(1, config.task.reward_workers)
    verified_s = max(1.0, evaluated) * plan.samples * config.task.reward_timeout_s / workers
    return Limits(predicted_s=predicted_s, floor_s=Limits().floor_s + verified_s)


def staleness_curves(staleness: Sequence[int], groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Staleness of consumed samples by their oldest token [optimizer steps], and how many span a swap."""
    completions = [rollout.completion for group in groups for rollout in group.rollouts]
    mixed = [c.oldest_version != c.newest_version for c in completions]
    return {
        "off_policy/staleness_mean": float(np.mean(staleness)),
        "off_policy/staleness_max": float(np.max(staleness)),
        "off_policy/partial_ratio": float(np.mean(mixed)),
    }
