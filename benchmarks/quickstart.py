"""What one run of the quickstart measured, as committed figures and as README's first table:

python -m benchmarks.quickstart runs/quickstart
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from roofline.analyse import phase_rows
from roofline.read_run import read_run

START, END = "<!-- results:start -->\n", "<!-- results:end -->"
SHOWN = ("decode", "train", "prefill", "optimizer", "publish")


def main(argv: Sequence[str] | None = None) -> None:
    """Write benchmarks/results/quickstart.json and .md, and the table in README."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quickstart")
    parser.add_argument("run", type=Path, help="run folder of a finished quickstart")
    run = parser.parse_args(argv).run
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    summary = {key: value for key, value in summary.items() if key != "config"}
    made = record.provenance(timed=False)  # the times were measured by the run, not now
    content = {"provenance": made, "summary": summary, "phases": _phases(run)}
    record.write("quickstart", content, block(content))
    record.put_into_readme(START, END, block(content))


def _phases(run: Path) -> list[dict[str, Any]]:
    """Medians per call of the phases that the table shows."""
    return [
        {
            "phase": str(row.phase),
            "calls": row.calls,
            "bound_s": row.lower_s,
            "expected_s": row.shared_s,
            "measured_s": row.median_s,
            "ratio": row.ratio,
            "binds": row.bound,
            "mfu": row.mfu,
            "mbu": row.mbu,
        }
        for row in phase_rows(read_run(run))
        if row.phase in SHOWN
    ]


def block(content: Mapping[str, Any]) -> str:
    """The table and the sentence under it, in Markdown."""
    summary, made = content["summary"], content["provenance"]
    rows = []
    for phase in content["phases"]:
        rows.append(
            [
                phase["phase"],
                *(f"{1e3 * phase[key]:.2f}" for key in ("bound_s", "expected_s", "measured_s")),
                f"{phase['ratio']:.2f}",
                phase["binds"],
            ]
        )
    head = ["phase", "bound [ms]", "predicted [ms]", "measured [ms]", "ratio", "binds"]
    return (
        f"{record.table(head, rows)}\n\n"
        f"The quickstart on {made['cores']} cores of {made['processor'].rpartition(' x ')[0]} "
        f"({made['date']}, commit {made['commit'][:10]}): held-out pass@1 "
        f"{summary['pass_at_1_before']:.1%} after the cold start, {summary['pass_at_1_after']:.1%} after "
        f"{summary['steps']} steps, {summary['wall_s']:.0f} s in all, {summary['samples_per_s']:.0f} "
        "samples/s. Medians per call; both lanes share the cores, which the prediction counts.\n"
    )


if __name__ == "__main__":
    main()
