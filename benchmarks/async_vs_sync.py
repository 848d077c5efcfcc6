"""Overlapped against lockstep training of the quickstart: python -m benchmarks.async_vs_sync

Runs the same configuration with rollout.max_staleness 0 and 1, alternating, with and without a slow
verifier (its latency is added once per group by a timer, so it holds no core). Compared with what the
plan predicted from the calibration; the seconds of each phase per step say why. Cold start,
evaluation and checkpoints are off, and groups without advantage are trained on, so that every step
costs the same from the first on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import record
from jaxrl.build import make_subject
from jaxrl.cli import load_config
from jaxrl.plan import make_plan
from roofline.hardware import Hardware

COMPILED_STEPS = 5
"""First steps, left out: they compile, and the pipeline fills."""
LEARNER = ("train", "optimizer", "publish", "wait_batch")
ROLLOUT = ("prefill", "decode", "wait_learner")
STEADY = {
    "sft.steps": "0", "eval.every-steps": "0", "eval.problems": "8", "eval.final-samples": "1",
    "task.num-eval": "8", "task.reward-workers": "0", "checkpoint.every-steps": "0",
    "grpo.drop-zero-advantage": "False", "run.report": "False",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to run."""

    staleness: int
    latency_s: float

    @property
    def name(self) -> str:
        """As the table shows it."""
        way = "lockstep" if self.staleness == 0 else f"overlapped, staleness <= {self.staleness}"
        return f"{way}, verifier +{self.latency_s:g} s" if self.latency_s else way


def run(case: Case, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train once; samples/s, seconds per step of each phase, and the plan's prediction."""
    words = {
        **STEADY, "run.dir": str(folder), "train.steps": str(options.steps),
        "rollout.max-staleness": str(case.staleness), "task.reward-latency-s": str(case.latency_s),
    }  # fmt: skip
    command = [sys.executable, "-m", "jaxrl.train", "--config", options.config]
    command += [f"--{key}={value}" for key, value in words.items()] + options.more
    done = subprocess.run(
        command, cwd=record.ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{case.name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    config = load_config(folder / "config.yaml")
    hardware = Hardware.load(folder / "hardware.json")
    plan = make_plan(config, make_subject(config).model, hardware)
    steps = [line for line in _lines(folder / "metrics.jsonl") if "time/step_s" in line]
    steps = [s for s in steps if COMPILED_STEPS < s["step"] < options.steps]
    seconds = sum(s["time/step_s"] for s in steps)
    phases: defaultdict[str, float] = defaultdict(float)
    for span in _lines(folder / "spans.jsonl"):
        if COMPILED_STEPS < span["step"] < options.steps:
            phases[span["phase"]] += span["duration_s"] / len(steps)
    samples = config.grpo.prompts_per_step * config.grpo.group_size
    return {
        "samples_per_s": samples * len(steps) / seconds,
        "step_s": seconds / len(steps),
        "phase_s_per_step": dict(phases),
        "predicted_step_s": plan.overlapped_s if case.staleness else plan.lockstep_s,
        "predicted_winner": "async" if plan.overlapped_s < plan.lockstep_s else "sync",
        "predicted_speedup": plan.lockstep_s / plan.overlapped_s,
        "contention": hardware.contention,
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(argv: Sequence[str] | None = None) -> None:
    """Alternate the cases and write the comparison."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.async_vs_sync")
    parser.add_argument("--config", default="quickstart")
    parser.add_argument(
        "--steps", type=int, default=40, help=f"the first {COMPILED_STEPS} do not count"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency-s", type=float, nargs="*", default=[0.0, 0.3])
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("more", nargs="*", help="further words for jaxrl.train, after --")
    options = parser.parse_args(argv)
    if options.steps < COMPILED_STEPS + 3:
        parser.error(f"--steps must be at least {COMPILED_STEPS + 3}")
    made = record.provenance()
    cases = [Case(staleness=s, latency_s=l) for l in options.latency_s for s in (0, 1)]
    seen: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    for n in range(options.rounds):
        for case in cases if n % 2 == 0 else cases[::-1]:
            with tempfile.TemporaryDirectory() as folder:
                seen[case].append(run(case, options, Path(folder) / "run"))
            print(
                f"round {n + 1}: {case.name}: {seen[case][-1]['samples_per_s']:.0f} samples/s",
                flush=True,
            )
    content = {case.name: _summary(results) for case, results in seen.items()}
    content = {
        "provenance": made,
        "config": options.config,
        "steps": options.steps,
        "cases": content,
    }
    record.write("async_vs_sync", content, _report(seen, options), options.out)


def _summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = sorted({name for r in results for name in r["phase_s_per_step"]})
    return {
        "samples_per_s": record.spread([r["samples_per_s"] for r in results]),
        "step_s": record.spread([r["step_s"] for r in results]),
        "phase_s_per_step": {
            name: statistics.median(r["phase_s_per_step"].get(name, 0.0) for r in results)
            for name in names
        },
        "predicted_step_s": results[0]["predicted_step_s"],
        "predicted_winner": results[0]["predicted_winner"],
        "predicted_speedup": results[0]["predicted_speedup"],
        "contention": results[0]["contention"],
    }


def _report(seen: dict[Case, list[dict[str, Any]]], options: argparse.Namespace) -> str:
    summaries = {case: _summary(results) for case, results in seen.items()}
    shown = (*LEARNER, *ROLLOUT)
    head = ["run", "samples/s", "step s", "predicted step s", *(f"{name} s" for name in shown)]
    rows = [
        [case.name, record.shown(s["samples_per_s"], 0), record.shown(s["step_s"], 3),
         f"{s['predicted_step_s']:.3f}",
         *(f"{s['phase_s_per_step'].get(name, 0.0):.3f}" for name in shown)]
        for case, s in summaries.items()
    ]  # fmt: skip
    verdicts = []
    for latency in options.latency_s:
        lockstep, overlapped = (summaries[Case(staleness=n, latency_s=latency)] for n in (0, 1))
        gain = overlapped["samples_per_s"]["median"] / lockstep["samples_per_s"]["median"]
        verdicts.append(
            f"- verifier +{latency:g} s: overlap measured {gain:.2f}x, predicted "
            f"{lockstep['predicted_step_s'] / overlapped['predicted_step_s']:.2f}x "
            f"({overlapped['predicted_winner']} wins; contention {overlapped['contention']:.2f})"
        )
    return (
        f"# Overlapped and lockstep training, {options.config}\n\n{options.rounds} rounds of "
        f"{options.steps} steps, alternating; steps after the first {COMPILED_STEPS}, median (min to "
        f"max) over rounds; phases in seconds per step, both lanes run at once when overlapped. The prediction "
        f"assumes that every completion reaches its limit.\n\n{record.table(head, rows)}\n\n"
        + "\n".join(verdicts)
    )


if __name__ == "__main__":
    main()
