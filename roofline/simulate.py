"""`python -m roofline.simulate`: bubbles and staleness of a run before it runs, by discrete events.

    python -m roofline.simulate --config stories --model qwen3-1.7b --hardware h200 --devices 8
        [--mode in-flight] [--steps 30] [--lengths RUN] [--json]
    python -m roofline.simulate --run runs/quickstart        beside what that run measured

Times of the phases come from the cost model on the best split of the devices (`roofline.plan`), or, with
--run, from the run's own spans; completion lengths are lognormal or those of a run. The events are those
of `roofline.events`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from roofline.analyse import companies
from roofline.choose import report_errors
from roofline.events import Mode, Pipeline, Simulation, simulate
from roofline.hardware import Hardware
from roofline.job import Job
from roofline.kernels import Layout, ceil_div
from roofline.lengths import measured
from roofline.phases import Phase
from roofline.plan import advise, describe, job_and_hardware, parser
from roofline.predict import LANES, Company
from roofline.progress import tracked
from roofline.read_run import Run, read_run
from roofline.settings import read_settings
from roofline.splits import Split, learner_option, rollout_option, split_of
from roofline.svg import si

BAR_COLUMNS = 30


def pipeline_of(job: Job, split: Split, hardware: Hardware, mode: Mode) -> Pipeline:
    """The simulated run of a split; colocated lanes take turns."""
    rollout, grpo, task = job.settings.rollout, job.settings.grpo, job.settings.task
    publish_s = split.phase_s[Phase.PUBLISH]
    learner = [seconds for phase, seconds in split.phase_s.items() if phase in LANES["learner"]]
    return Pipeline(
        mode=mode,
        prompts_per_step=grpo.prompts_per_step,
        group_size=grpo.group_size,
        max_staleness=max(1, rollout.max_staleness),
        slots=split.slots,
        chunk_steps=rollout.chunk_steps,
        decode_step_s=split.decode_step_s,
        prompt_s=split.phase_s[Phase.PREFILL] / grpo.prompts_per_step,
        learner_s=sum(learner) - publish_s,
        publish_s=publish_s,
        verify_s=task.reward_latency_s,
        verifiers=task.reward_workers,
        contention=max(2.0, hardware.contention) if split.colocated else hardware.contention,
        flat_share=expected_flat_share(grpo.group_size),
        refill_rounds=grpo.refill_rounds,
    )


def expected_flat_share(group_size: int) -> float:
    """Share of groups all right or all wrong where nothing was sampled yet: p^G + (1 - p)^G over solve rates p
    spread evenly, 2 / (G + 1)."""
    return 2 / (group_size + 1)


def scaled_split(job: Job, hardware: Hardware, devices: int) -> tuple[Job, Split]:
    """The best split of one node on every node; batch, slots and verifiers grow with the nodes.

    What 10,000 GPUs do is what one node does, side by side, but for the collectives, which leave
    the node. Raises: ValueError: a node holds nothing, or the nodes are not whole.
    """
    if devices < 1:
        raise ValueError(f"--devices={devices} must be at least 1")
    node = min(devices, hardware.node_devices)
    nodes = devices // node
    if devices % node:
        raise ValueError(
            f"--devices={devices} is not a multiple of a node's {node}; use {nodes * node} or "
            f"{(nodes + 1) * node}"
        )
    best = advise(job, hardware, node).asynchronous
    if nodes == 1:
        return job, best
    settings, task = job.settings, job.settings.task
    settings = dataclasses.replace(
        settings,
        grpo=dataclasses.replace(
            settings.grpo, prompts_per_step=settings.grpo.prompts_per_step * nodes
        ),
        task=dataclasses.replace(task, reward_workers=task.reward_workers * nodes),
    )
    grown = dataclasses.replace(job, settings=settings)
    learner = learner_option(
        grown, hardware, _times(best.learner, nodes), best.rows_per_microbatch * nodes
    )  # fmt: skip
    rollout = rollout_option(grown, hardware, _times(best.rollout, nodes), best.slots * nodes)
    if learner is None or rollout is None:
        raise ValueError(f"what fits on one node of {hardware.name} does not fit on {nodes}")
    bound = best.max_staleness
    return grown, split_of(grown, hardware, learner, rollout, bound, colocated=best.colocated)


def _times(layout: Layout, nodes: int) -> Layout:
    return dataclasses.replace(layout, data=layout.data * nodes)


# -- against a run ---------------------------------------------------------------------------------


def pipeline_of_run(run: Run) -> Pipeline:
    """The pipeline with a finished run's own settings and measured phases.

    A phase's seconds are its mean span, less what the other lane took from it: spans measured
    while the other lane is at work are longer by the phase's contention. A step of several updates has
    several spans of training. Each lane's time between its spans
    (Python, packing, logging) counts as work: of the learner per step, of the rollout per refill. Groups
    without signal are as many as they were.

    Raises:
        ValueError: the run stepped too little, or recorded no decode steps or no configuration.
    """
    needed = {Phase.PUBLISH: 3, Phase.PREFILL: 1, Phase.DECODE: 1}
    for phase, least in needed.items():
        seen = sum(span.phase is phase for span in run.spans)
        if seen < least:
            raise ValueError(f"the run has {seen} {phase} spans outside compilation, of {least}")
    settings = read_settings(str(run.folder))
    company = companies(run.spans)
    each_s = {phase: _alone_s(run, company, phase) for phase in Phase}
    decoded = [s for s in run.spans if s.phase is Phase.DECODE and s.work.get("steps")]
    if not decoded:
        raise ValueError("no decode span of the run records its number of steps")
    steps = statistics.mean(s.work["steps"] for s in decoded)
    refills = sum(s.phase is Phase.PREFILL for s in run.spans)
    versions = sum(s.phase is Phase.PUBLISH for s in run.spans)
    learns = [
        s.phase for s in run.spans if s.phase in LANES["learner"] and s.phase is not Phase.PUBLISH
    ]
    task, grpo = settings.task, settings.grpo
    return Pipeline(
        mode=Mode.IN_FLIGHT if settings.rollout.max_staleness else Mode.SYNCHRONOUS,
        prompts_per_step=grpo.prompts_per_step,
        group_size=grpo.group_size,
        max_staleness=settings.rollout.max_staleness,
        slots=settings.rollout.slots,
        chunk_steps=settings.rollout.chunk_steps,
        decode_step_s=each_s[Phase.DECODE] / steps,
        admit_s=each_s[Phase.PREFILL] + _between_s(run, "rollout") * versions / refills,
        learner_s=sum(each_s[phase] for phase in learns) / versions + _between_s(run, "learner"),
        publish_s=each_s[Phase.PUBLISH],
        verify_s=task.reward_latency_s,
        verifiers=task.reward_workers,
        contention=run.hardware.contention,
        flat_share=_flat_share(run, grpo.prompts_per_step),
        refill_rounds=grpo.refill_rounds,
    )


def _flat_share(run: Run, prompts: int) -> float:
    """Median over the steps of the groups without signal among all that a step took: those replaced, and of
    its P groups those that stayed; 0 where the run says nothing."""
    shares = [
        (replaced + line["filter/frac_reward_zero_std"] * prompts) / (prompts + replaced)
        for line in run.metrics
        if (replaced := line.get("filter/refilled_groups")) is not None
    ]
    return statistics.median(shares) if shares else 0.0


def _alone_s(run: Run, company: Sequence[Company], phase: Phase) -> float:
    """Mean span of the phase if the other lane had been idle; 0 where the run has none."""
    slower = run.hardware.contention_of(phase)
    alone = [
        span.duration_s * (1 - beside.lane * (1 - 1 / slower))
        for span, beside in zip(run.spans, company, strict=True)
        if span.phase is phase
    ]
    return statistics.mean(alone) if alone else 0.0


def _between_s(run: Run, lane: str) -> float:
    """Median time per published version that the lane spends in none of its spans, if nothing
    else had computed [s]."""
    marks = np.sort([s.end_s for s in run.spans if s.phase is Phase.PUBLISH])
    spans = sorted((s.end_s, s.duration_s) for s in run.spans if s.lane == lane)
    ends, durations = np.array(spans).T
    covered = np.concatenate([[0.0], np.cumsum(durations)])[np.searchsorted(ends, marks, "right")]
    others = sum(
        s.duration_s
        for s in run.spans
        if s.computes and s.lane not in (lane, "reward") and marks[0] <= s.start_s <= marks[-1]
    )
    shared = min(1.0, others / float(marks[-1] - marks[0]))
    alone = 1 - shared * (1 - 1 / run.hardware.contention)
    return alone * max(0.0, float(np.median(np.diff(marks) - np.diff(covered))))


def measured_step_s(run: Run) -> float:
    """Median seconds between two publications of the run.

    Raises:
        ValueError: the run published fewer than three versions.
    """
    ends = sorted(s.end_s for s in run.spans if s.phase is Phase.PUBLISH)
    if len(ends) < 3:
        raise ValueError(f"{run.folder} published {len(ends)} versions; a step time needs 3")
    return statistics.median(b - a for a, b in itertools.pairwise(ends))


# -- command line ----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and print; errors a user can mend end with exit code 2."""
    described = parser("python -m roofline.simulate", __doc__ or "", config="quickstart")
    add = described.add_argument
    add("--run", type=Path, help="simulate this finished run with its measured phases, and compare")
    add("--mode", choices=[mode.value for mode in Mode], help="one mode instead of all four")
    add("--steps", type=int, default=30, help="optimizer steps (default: 30)")
    add("--seed", type=int, default=0, help="of the lengths drawn")
    options, words = described.parse_known_args(argv)
    report_errors(lambda: _of_run(options) if options.run else _of_job(options, words))


def _of_job(options: argparse.Namespace, words: Sequence[str]) -> None:
    if options.seed < 0:
        raise ValueError(f"--seed={options.seed} must be >= 0")
    job, hardware = job_and_hardware(options, words)
    job, split = scaled_split(job, hardware, options.devices)
    modes = [Mode(options.mode)] if options.mode else list(Mode)
    start = time.perf_counter()
    seen = {
        mode: simulate(
            pipeline_of(job, split, hardware, mode), job.lengths,
            steps=options.steps, seed=options.seed,
        )
        for mode in tracked(modes, "simulating")
    }  # fmt: skip
    took_s = time.perf_counter() - start
    if options.json:
        print(json.dumps({mode: dataclasses.asdict(one) for mode, one in seen.items()}))
        return
    console = Console()
    console.print(
        f"{options.devices} x {hardware.name}, {describe(split)}, {split.slots} slots, "
        f"{job.settings.samples_per_step} samples per step; {job.lengths.source}",
        markup=False, highlight=False,
    )  # fmt: skip
    _print_modes(seen, console)
    console.print(
        f"closed form: {si(split.step_s, 's')} per step, staleness {split.staleness:.2f}; "
        f"simulated in {took_s:.1f} s"
    )


def _of_run(options: argparse.Namespace) -> None:
    run = read_run(options.run)
    pipeline = pipeline_of_run(run)
    seen = simulate(pipeline, measured(run.folder), steps=options.steps, seed=options.seed)
    step_s = measured_step_s(run)
    counted = run.summary.get("staleness_histogram", {})
    total = sum(counted.values())
    staleness = sum(int(k) * n for k, n in counted.items()) / total if total else None
    if options.json:
        print(json.dumps({"simulated": dataclasses.asdict(seen), "measured_step_s": step_s,
                          "measured_mean_staleness": staleness}))  # fmt: skip
        return
    console = Console()
    _print_modes({pipeline.mode: seen}, console)
    console.print(
        f"measured: {si(step_s, 's')} per step, {pipeline.samples_per_step / step_s:.4g} samples/s"
        + ("" if staleness is None else f", mean staleness {staleness:.2f}")
        + f"; simulated / measured step {seen.step_s / step_s:.2f}",
        markup=False, highlight=False,
    )  # fmt: skip


def _print_modes(seen: dict[Mode, Simulation], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    columns = ("mode", "step", "samples/s", "gen idle", "slot idle", "learn idle", "stale")
    for column in columns:
        table.add_column(column, justify="left" if column == "mode" else "right")
    for mode, one in seen.items():
        table.add_row(
            mode, si(one.step_s, "s"), f"{one.samples_per_s:.4g}", _percent(one.rollout_idle),
            _percent(one.slot_idle), _percent(one.learner_idle), f"{one.mean_staleness:.2f}",
        )  # fmt: skip
    console.print(table)
    for mode, one in seen.items():
        total = sum(one.staleness.values())
        for staleness, samples in one.staleness.items():
            bar = "#" * max(1, ceil_div(BAR_COLUMNS * samples, total))
            console.print(f"{mode:>13}  staleness {staleness}: {samples / total:6.1%} {bar}",
                          highlight=False)  # fmt: skip


def _percent(share: float) -> str:
    return f"{max(0.0, share):.0%}"


if __name__ == "__main__":
    main()
