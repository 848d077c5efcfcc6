"""What one run of the quickstart measured, as committed figures and as README's first table:

python -m benchmarks.quickstart runs/quickstart
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from roofline.analyse import companies, in_company
from roofline.phases import Phase
from roofline.read_run import Span, read_run

START, END = "<!-- results:start -->\n", "<!-- results:end -->"
WANTED = 0.15
"""How far a phase's sum may be off its prediction."""
SHOWN = (Phase.PREFILL, Phase.DECODE, Phase.TRAIN, Phase.OPTIMIZER, Phase.PUBLISH)


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
    """Sums over the calls of the phases that the table shows, and the median call's ratio."""
    known = read_run(run)
    calls: dict[str, list[tuple[Span, float]]] = {str(phase): [] for phase in SHOWN}
    for span, company in zip(known.spans, companies(known.spans), strict=True):
        if span.phase in calls and span.predicted_s:
            calls[span.phase].append((span, in_company(span, company, known.hardware)))
    return [
        {
            "phase": phase,
            "calls": len(pairs),
            "bound_s": sum(span.lower_s or 0.0 for span, _ in pairs),
            "expected_s": sum(expected_s for _, expected_s in pairs),
            "measured_s": sum(span.duration_s for span, _ in pairs),
            "median_ratio": statistics.median(span.duration_s / by for span, by in pairs),
            "binds": statistics.mode(span.bound for span, _ in pairs),
        }
        for phase, pairs in calls.items()
    ]


def block(content: Mapping[str, Any]) -> str:
    """The table and the sentence under it, in Markdown."""
    summary, made = content["summary"], content["provenance"]
    rows = [
        [
            phase["phase"],
            str(phase["calls"]),
            *(f"{phase[key]:.2f}" for key in ("bound_s", "expected_s", "measured_s")),
            f"{phase['measured_s'] / phase['expected_s']:.2f}",
            f"{phase['median_ratio']:.2f}",
            phase["binds"],
        ]
        for phase in content["phases"]
    ]
    beyond = [row[0] for row in rows if abs(math.log(float(row[5]))) > math.log(1 + WANTED)]
    head = [
        "phase", "calls", "bound [s]", "predicted [s]", "measured [s]", "measured / predicted",
        "median call", "binds",
    ]  # fmt: skip
    return (
        f"{record.table(head, rows)}\n\n"
        f"The quickstart on {made['cores']} cores of {made['processor'].rpartition(' x ')[0]} "
        f"({made['date']}, commit {made['commit'][:10]}): held-out pass@1 "
        f"{summary['pass_at_1_before']:.1%} after the cold start, {summary['pass_at_1_after']:.1%} after "
        f"{summary['steps']} steps, {summary['wall_s']:.0f} s in all, {summary['samples_per_s']:.0f} "
        "samples/s. Sums over the calls, and the ratio of the median call; both lanes share the cores, "
        f"which the prediction counts. Sums that miss the {WANTED:.0%} wanted: {', '.join(beyond) or 'none'}.\n"
    )


if __name__ == "__main__":
    main()
