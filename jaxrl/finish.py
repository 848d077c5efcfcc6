"""The end of a run: last held-out evaluation, summary, report."""

from __future__ import annotations

import time

import jax

from jaxrl.build import Subject, held_out
from jaxrl.config import Config
from jaxrl.evaluator import Evaluator
from jaxrl.learner.learner import Learner
from jaxrl.record import RunRecord
from jaxrl.run_folder import RunFolder
from jaxrl.start import describe
from jaxrl.telemetry.jsonl import read_records
from jaxrl.telemetry.run import RunTelemetry
from jaxrl.telemetry.summary import Summary, package_versions, summarise_phases, write_summary
from jaxrl.telemetry.tables import print_summary
from jaxrl.weights import WeightStore
from roofline import report
from roofline.hardware import Hardware
from roofline.phases import Phase


def finish(
    config: Config, subject: Subject, folder: RunFolder, learner: Learner, store: WeightStore,
    evaluator: Evaluator, record: RunRecord, telemetry: RunTelemetry, hardware: Hardware, *,
    completed: bool,
) -> None:  # fmt: skip
    """Evaluate the last weights on the test split; write and print the summary and the report.

    A run that is not `completed` is to go on later, and is not evaluated.
    """
    began = time.perf_counter()
    after: dict[str, float] = {}
    if completed:
        _, problems = held_out(config, subject)
        with telemetry.observer.phase(Phase.EVAL):
            snapshot = store.publish(record.step, learner.policy)
            evaluation = evaluator.run(snapshot, problems, config.eval.final_samples)
        after = evaluation.metrics("test")
        telemetry.curves(record.step, after)
        telemetry.progress.note(f"after:  {describe(evaluation)}")
    telemetry.close()
    record.wall_s += time.perf_counter() - began
    step_s = sum(line["time/step_s"] for line in read_records(folder.metrics))
    summary = Summary(
        pass_at_1_before=record.before.get("test/pass_at_1"),
        pass_at_1_after=after.get("test/pass_at_1"),
        pass_at_8_before=record.before.get("test/pass_at_8"),
        pass_at_8_after=after.get("test/pass_at_8"),
        wall_s=record.wall_s,
        samples_per_s=record.samples / step_s if step_s else 0.0,
        steps=record.step,
        staleness_histogram=record.staleness,
        phases=summarise_phases(read_records(folder.spans), hardware),
        seed=config.run.seed,
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind} ({hardware.name})",
        config=str(folder.config),
        versions=package_versions(),
    )
    write_summary(summary, folder.summary)
    written = None
    if config.run.report:
        report.write(folder.path)
        written = folder.path / "report.html"
    print_summary(summary, run_dir=folder.path, report=written)
