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
from roofline.read_run import read_run

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
    content = {"provenance": made, "summary": summary, "median_ratios": _median_ratios(run)}
    record.write("quickstart", content, block(content))
    record.put_into_readme(START, END, block(content))


def _median_ratios(run: Path) -> dict[str, float]:
    """Measured over predicted of the median call, by phase; the sums are in the run's summary."""
    known = read_run(run)
    ratios: dict[str, list[float]] = {phase: [] for phase in SHOWN}
    for span, company in zip(known.spans, companies(known.spans), strict=True):
        if span.phase in ratios and span.predicted_s:
            ratios[span.phase].append(span.duration_s / in_company(span, company, known.hardware))
    return {phase: statistics.median(values) for phase, values in ratios.items()}


def block(content: Mapping[str, Any]) -> str:
    """The table and the sentence under it, in Markdown."""
    summary, made = content["summary"], content["provenance"]
    rows = []
    for phase in SHOWN:
        sums = summary["phases"][phase]
        rows.append([
            phase, str(sums["calls"]),
            *(f"{sums[key]:.2f}" for key in ("lower_s", "predicted_s", "measured_s")),
            f"{sums['ratio']:.2f}", f"{content['median_ratios'][phase]:.2f}", sums["bound"],
        ])  # fmt: skip
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
