"""The same configuration over several seeds: python -m benchmarks.seeds --seeds 5

Runs one after the other; a seed whose run folder already holds a summary is read, not run again, and
an interrupted run goes on from its checkpoint. Writes every seed, and mean, deviation and extremes.
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

KEPT = (
    "seed", "pass_at_1_before", "pass_at_1_after", "pass_at_8_before", "pass_at_8_after", "wall_s",
    "samples_per_s", "steps",
)  # fmt: skip


def run(seed: int, config: Path, runs: Path, more: Sequence[str]) -> dict[str, Any]:
    """The summary of one seed, from its run folder if it is there."""
    folder = runs / f"seed_{seed}"
    summary = folder / "summary.json"
    if not summary.is_file():
        print(f"seed {seed}: running", flush=True)
        words = [f"--config={config}", f"--run.dir={folder}", f"--run.seed={seed}", *more]
        subprocess.run(
            [sys.executable, "-m", "jaxrl.train", *words], cwd=record.ROOT, check=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
    found = json.loads(summary.read_text(encoding="utf-8"))
    return {key: found[key] for key in KEPT}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, write the table after every seed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seeds")
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N - 1")
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("more", nargs="*", help="further words for jaxrl.train, after --")
    options = parser.parse_args(argv)
    made = record.provenance()
    runs = options.runs / options.config.stem
    found: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        found.append(run(seed, options.config, runs, options.more))
        content = {
            "provenance": made, "config": options.config.name, "more": options.more, "seeds": found,
            "over_seeds": _over_seeds(found),
        }  # fmt: skip
        markdown = _report(options.config.stem, content)
        record.write(f"{options.config.stem}_seeds", content, markdown, options.out)


def _over_seeds(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean, sample standard deviation and extremes of every number."""
    columns = {key: [f[key] for f in found if f[key] is not None] for key in KEPT[1:]}
    return {
        key: {
            "mean": statistics.mean(values),
            "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            "min": min(values),
            "max": max(values),
        }
        for key, values in columns.items()
        if values
    }


def _report(name: str, content: dict[str, Any]) -> str:
    head = ["seed", "pass@1 before", "pass@1 after", "pass@8 after", "wall s", "samples/s", "steps"]

    def cells(label: str, row: dict[str, Any]) -> list[str]:
        shares = [row.get(k) for k in ("pass_at_1_before", "pass_at_1_after", "pass_at_8_after")]
        return [
            label, *("-" if s is None else f"{s:.1%}" for s in shares), f"{row['wall_s']:.0f}",
            f"{row['samples_per_s']:.0f}", f"{row['steps']:.0f}",
        ]  # fmt: skip

    over = content["over_seeds"]
    rows = [cells(str(f["seed"]), f) for f in content["seeds"]]
    rows += [
        cells(kind, {key: values[kind] for key, values in over.items()})
        for kind in ("mean", "std", "min", "max")
    ]
    more = f" with `{' '.join(content['more'])}`" if content["more"] else ""
    return (
        f"# {name} over {len(content['seeds'])} seeds{more}\n\nHeld-out test problems, "
        f"never trained on; wall time includes cold start, evaluation and checkpoints.\n\n"
        f"{record.table(head, rows)}"
    )


if __name__ == "__main__":
    main()
