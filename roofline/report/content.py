"""Everything the report of one run says, as numbers. The page, the Markdown and report.json are three
renderings of a `Report`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roofline.analyse import LaneRow, PhaseRow, StepTimes, lane_rows, phase_rows, spread, step_times
from roofline.choose import measured_vocabulary
from roofline.hardware import Hardware
from roofline.read_run import Run
from roofline.report import outlook
from roofline.report.account import Validation, Waterfall, validation, waterfalls
from roofline.report.outlook import Change, Elsewhere, Simulated, SplitCurve
from roofline.settings import model_of, read_settings

FORMAT = 1
"""Raised when the meaning of report.json changes; schema.json describes this one."""
NO_PATH = ("null", "None", "~")
"""How YAML writes that a policy is built from scratch."""
SHAPE = ("width", "num_layers", "num_heads", "num_kv_heads", "head_size", "ffw_size")
FLOP_CONVENTION = (
    "Flops are those of matrix products, a multiply-add counted as two, as many as the program "
    "executes: attention over the whole packed row or cache window with nothing saved by the "
    "causal mask, the head on every scored token, recomputation included. MFU is these flops, MBU "
    "the memory bytes, over peak times measured time."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One run, predicted beside measured. Times in seconds, shares in [0, 1]."""

    format: int
    run: str
    """Name of the run folder."""
    wall_s: float
    """From the first span's start to the last one's end."""
    model: Mapping[str, Any]
    """The policy's architecture; its settings under model.* where nothing more can be read."""
    hardware: Hardware
    flop_convention: str
    spread: float | None
    """Standard deviation of log(measured / expected) that the intervals assume; None on hardware
    that nobody calibrated."""
    phases: tuple[PhaseRow, ...]
    lanes: tuple[LaneRow, ...]
    step: StepTimes | None
    """None without two recorded steps."""
    waterfalls: tuple[Waterfall, ...]
    staleness: Mapping[str, float]
    """Consumed samples by versions between birth and consumption."""
    validation: Validation | None
    simulated: Simulated | None
    changes: tuple[Change, ...]
    """What-if by simulation of the run's own pipeline."""
    split: SplitCurve | None
    elsewhere: tuple[Elsewhere, ...]
    """What-if on other hardware, from the cost model."""
    results: Mapping[str, float]
    """Numbers of summary.json: pass rates, samples per second; the last ones of the curriculum."""
    notes: tuple[str, ...]
    """What is missing, and why."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, as schema.json beside this module describes them."""
        return dataclasses.asdict(self)


def build(run: Run) -> Report:
    """Analyse a run, simulate it, and plan its work elsewhere."""
    notes = list(run.notes)
    model = _model(run, notes)
    staleness = run.summary.get("staleness_histogram")
    seen, changed, curve, others = _outlook(run, notes)
    return Report(
        format=FORMAT,
        run=run.folder.resolve().name,
        wall_s=run.wall_s,
        model=model,
        hardware=run.hardware,
        flop_convention=FLOP_CONVENTION,
        spread=spread(run.hardware),
        phases=tuple(phase_rows(run)),
        lanes=tuple(lane_rows(run)),
        step=step_times(run),
        waterfalls=tuple(waterfalls(run)),
        staleness={str(k): float(n) for k, n in staleness.items()}
        if isinstance(staleness, dict)
        else {},
        validation=validation(run),
        simulated=seen,
        changes=changed,
        split=curve,
        elsewhere=others,
        results={
            name: float(value)
            for name, value in run.summary.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        | _curriculum(run),
        notes=tuple(notes),
    )


def _curriculum(run: Run) -> dict[str, float]:
    """Where its problems stood at the last step, what its probes had cost and found, and the tokens of all
    that was sampled until then."""
    last = run.metrics[-1] if run.metrics else {}
    return {
        name: value
        for name, value in last.items()
        if name.startswith("curriculum/") or name == "perf/generated_tokens"
    }


def _model(run: Run, notes: list[str]) -> dict[str, Any]:
    """As given, and as the model's own configuration says."""
    given: dict[str, Any] = {
        name.removeprefix("model."): value
        for name, value in run.config.items()
        if name.startswith("model.")
    }
    try:
        settings = read_settings(str(run.folder))
        vocab_size = measured_vocabulary(run.hardware, settings)
        shape = model_of(settings, vocab_size or outlook.ASSUMED_VOCABULARY)
    except (OSError, ValueError) as error:
        if given.get("path", "null") in NO_PATH:
            return given
        here = Path(given["path"]).exists()
        reason = str(error) if here else f"{given['path']} does not exist as seen from here"
        notes.append(f"The model's shape is not known: {reason}.")
        return {"path": given["path"]}
    if given.get("path", "null") in NO_PATH:
        counted = {"vocab_size": vocab_size, "parameters": shape.num_parameters}
        return {**given, **counted} if vocab_size else given
    named = {name: getattr(shape, name) for name in ("family", "vocab_size", *SHAPE)}
    named["parameters"] = shape.num_parameters
    return {"path": given["path"], **named, "dtype": given.get("dtype", "float32")}


def _outlook(
    run: Run, notes: list[str]
) -> tuple[Simulated | None, tuple[Change, ...], SplitCurve | None, tuple[Elsewhere, ...]]:
    try:
        pipeline, lengths = outlook.pipeline_and_lengths(run)
    except ValueError as error:
        notes.append(f"No simulation, split curve or what-if: {error}.")
        return None, (), None, ()
    seen, job = outlook.simulated(run, pipeline, lengths), None
    others: list[Elsewhere] = []
    try:
        job = outlook.job_of_run(run, lengths)
    except ValueError:  # its reason is a note already: the settings were read, so it is the model
        notes.append("No plan for other hardware or slots, which needs the model's shape.")
    else:
        others = outlook.elsewhere(job, seen.measured_step_s)
    curve = outlook.split_curve(run, pipeline, lengths)
    if curve is None:
        notes.append(
            "No split curve: generators and learner share all devices, or config.yaml names no mesh."
        )
    return seen, tuple(outlook.changes(run, pipeline, lengths, job)), curve, tuple(others)
