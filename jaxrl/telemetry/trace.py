"""spans.jsonl as a Chrome trace, to be opened in ui.perfetto.dev or chrome://tracing.

    python -m jaxrl.telemetry.trace RUN_DIR [-o trace.json]

Rows are rollout, learner and reward; spans that overlap without nesting go to further rows of their
lane.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxrl.cli import user_errors
from jaxrl.errors import UserError
from jaxrl.telemetry.jsonl import read_records
from jaxrl.telemetry.spans import LANES

_US_PER_S = 1e6
_ROWS_PER_LANE = 1000  # thread ids of a lane start at its index times this


def chrome_trace(spans: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Trace with one complete event per span, in microseconds; `args` holds prediction and work."""
    ordered = sorted(spans, key=lambda span: (span["start_s"], -span["duration_s"]))
    open_ends: dict[str, list[list[float]]] = {lane: [] for lane in LANES}
    names: dict[int, str] = {}
    events: list[dict[str, Any]] = []
    for span in ordered:
        lane = span["lane"]
        row = _row(open_ends[lane], span["start_s"], span["start_s"] + span["duration_s"])
        thread = LANES.index(lane) * _ROWS_PER_LANE + row
        names[thread] = lane if row == 0 else f"{lane} {row + 1}"
        events.append(_event(span, thread))
    return {"traceEvents": [*_rows(names), *events], "displayTimeUnit": "ms"}


def _row(rows: list[list[float]], start_s: float, end_s: float) -> int:
    """First row that is free or whose open span contains this one; the span is added to it."""
    for index, ends in enumerate(rows):
        while ends and ends[-1] <= start_s:
            ends.pop()
        if not ends or end_s <= ends[-1]:
            ends.append(end_s)
            return index
    rows.append([end_s])
    return len(rows) - 1


def _rows(names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Metadata events that name and order the rows."""
    meta = [
        (thread, kind, key, value)
        for thread, name in sorted(names.items())
        for kind, key, value in (
            ("thread_name", "name", name),
            ("thread_sort_index", "sort_index", thread),
        )
    ]
    return [
        {"ph": "M", "pid": 0, "tid": thread, "name": kind, "args": {key: value}}
        for thread, kind, key, value in meta
    ]


def _event(span: Mapping[str, Any], thread: int) -> dict[str, Any]:
    shown = ("step", "version", "predicted_s", "lower_s", "bound")
    args = {key: span[key] for key in shown if span[key] is not None}
    if span["predicted_s"]:
        args["measured / predicted"] = span["duration_s"] / span["predicted_s"]
    return {
        "ph": "X",
        "pid": 0,
        "tid": thread,
        "name": span["phase"],
        "ts": span["start_s"] * _US_PER_S,
        "dur": span["duration_s"] * _US_PER_S,
        "args": {**args, **span["work"]},
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Words:
    run_dir: tyro.conf.Positional[Path]
    """Run folder that holds spans.jsonl."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write; default RUN_DIR/trace.json."""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the trace of a run folder."""
    with user_errors():
        words = tyro.cli(
            _Words,
            args=argv,
            prog="python -m jaxrl.telemetry.trace",
            description="Export the spans of a run for ui.perfetto.dev.",
        )
        spans = words.run_dir / "spans.jsonl"
        if not spans.exists():
            raise UserError(f"{spans} does not exist; give the folder of a run (run.dir)")
        trace = chrome_trace(read_records(spans))
        output = words.output or words.run_dir / "trace.json"
        output.write_text(json.dumps(trace), encoding="utf-8")
        count = sum(event["ph"] == "X" for event in trace["traceEvents"])
        print(f"{output}: {count} spans; open it in ui.perfetto.dev", file=sys.stdout)


if __name__ == "__main__":
    main()
