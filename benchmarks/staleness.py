"""What off-policy samples cost, and what the bound and the correction win back.

    python -m benchmarks.staleness --seeds 2

One cold start per seed; every way goes on from it for the same steps. "ignored" compares the learner
with itself at the start of the step, as if the samples were fresh; "truncated" also weights each token
by learner / sampler, at most 2 (truncated importance sampling, as in IMPALA, arXiv:1802.01561);
"sampler" clips the ratio to the sampler itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

IGNORED = ("--grpo.ratio_from=learner", "--grpo.correction=none")
TRUNCATED = ("--grpo.ratio_from=learner", "--grpo.correction=truncated")
SAMPLER = ("--grpo.ratio_from=sampler",)
WAYS = {
    "synchronous": (0, SAMPLER),
    "bound 6, staleness ignored": (6, IGNORED),
    "bound 6, truncated weights": (6, TRUNCATED),
    "bound 6, ratio to the sampler": (6, SAMPLER),
    "bound 2, staleness ignored": (2, IGNORED),
    "bound 2, truncated weights": (2, TRUNCATED),
    "bound 2, ratio to the sampler": (2, SAMPLER),
}
"""Staleness bound [optimizer steps] and the words that choose the ratio."""


def train(folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """The summary of a run, from its folder if it is there, and the lowest evaluation on the way."""
    summary = folder / "summary.json"
    if not summary.is_file():
        print(f"{folder.name}: running", flush=True)
        subprocess.run(
            [sys.executable, "-m", "jaxrl.train", "--config=configs/quickstart.yaml",
             f"--run.dir={folder}", "--run.report=False", *words],
            cwd=record.ROOT, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
    found = json.loads(summary.read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    passes = [
        value for line in lines if (value := json.loads(line).get("eval/pass_at_1")) is not None
    ]
    return {
        "pass_at_1_before": found["pass_at_1_before"],
        "pass_at_1_after": found["pass_at_1_after"],
        "evaluations": passes,
        "staleness_histogram": found["staleness_histogram"],
        "wall_s": found["wall_s"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.staleness")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of every run")
    parser.add_argument("--runs", type=Path, default=Path("runs/staleness"))
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args(argv)
    made = record.provenance()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for seed in range(options.seeds):
        start = options.runs / f"seed_{seed}_start"
        train(start, [f"--run.seed={seed}", "--train.steps=0"])
        for name, (bound, words) in WAYS.items():
            folder = options.runs / f"seed_{seed}_{name.replace(', ', '_').replace(' ', '_')}"
            more = ["--sft.steps=0", f"--run.fork_from={start}", f"--train.steps={options.steps}"]
            more += [f"--run.seed={seed}", f"--rollout.max_staleness={bound}", *words]
            found[name].append(train(folder, more))
    content = {"provenance": made, "steps": options.steps, "ways": found}
    record.write("staleness", content, report(content, options.seeds), options.out)


def report(content: dict[str, Any], seeds: int) -> str:
    """Held-out pass@1 of every way."""
    rows = []
    for name, runs in content["ways"].items():
        after = [run["pass_at_1_after"] for run in runs]
        halfway = [run["evaluations"][len(run["evaluations"]) // 2] for run in runs]
        rows.append(
            [name, f"{_mean_staleness(runs):.2f}", f"{statistics.mean(halfway):.1%}",
             f"{statistics.mean(after):.1%}", " ".join(f"{a:.1%}" for a in after)]
        )  # fmt: skip
    head = ["way", "mean staleness", "pass@1 halfway", "pass@1 after", "each seed"]
    return (
        f"# Stale samples, ignored and corrected\n\nQuickstart, {content['steps']} steps at learning "
        f"rate 1e-3 from one cold start per seed, {seeds} seeds; held-out problems.\n\n"
        f"{record.table(head, rows)}"
    )


def _mean_staleness(runs: Sequence[dict[str, Any]]) -> float:
    """Optimizer steps, over all samples of all runs."""
    counts = [(int(s), n) for run in runs for s, n in run["staleness_histogram"].items()]
    return sum(s * n for s, n in counts) / max(1, sum(n for _, n in counts))


if __name__ == "__main__":
    main()
