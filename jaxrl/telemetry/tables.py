"""The two tables of a run: the plan before the first step, the outcome after the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from jaxrl.telemetry.progress import format_duration, make_console
from jaxrl.telemetry.summary import PhaseSummary, Summary

_BAR_COLUMNS = 40  # length of the longest bar of the staleness histogram


def print_plan(rows: Sequence[tuple[str, str, str]], console: Console | None = None) -> None:
    """Print derived sizes and predictions: rows of (quantity, value, how it follows)."""
    console = console or make_console()
    table = _table(console, "Plan")
    table.add_column("quantity", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("from", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_summary(
    summary: Summary, *, run_dir: Path, report: Path | None = None, console: Console | None = None
) -> None:
    """Print the outcome: predicted | measured per phase, pass@k before and after, where to look."""
    console = console or make_console()
    console.print(_phase_table(summary.phases, console))
    console.print(
        "alone: predicted as if nothing else ran; predicted: beside the other lane as it computed"
    )
    if summary.impossible:
        shares = ", ".join(summary.impossible)
        console.print(f"Above 1, so a cost or a peak is wrong: {shares}", style="bold red")
    console.print()
    console.print(_outcome_table(summary, console))
    console.print(
        f"\n{summary.steps} steps in {format_duration(summary.wall_s)} with cold start and evaluations, "
        f"{summary.samples_per_s:.1f} samples/s in the steps\n{summary.device}, seed {summary.seed}\n",
        markup=False,
    )
    console.print("Staleness of consumed samples, in optimizer steps", style="bold")
    for line in histogram_lines(summary.staleness_histogram):
        console.print(f"  {line}", markup=False)
    places = [("run folder", str(run_dir)), ("curves", f"tensorboard --logdir {run_dir}")]
    places += [] if report is None else [("report", str(report))]
    console.print()
    for name, place in places:
        console.print(f"{name:<12}{place}", markup=False, soft_wrap=True)


def _table(console: Console, title: str) -> Table:
    """Ruled on a terminal, columns and spaces elsewhere."""
    style = box.SIMPLE_HEAD if console.is_terminal else None
    return Table(title=title, title_justify="left", title_style="bold", box=style, pad_edge=False)


def _phase_table(phases: Mapping[str, PhaseSummary], console: Console) -> Table:
    table = _table(console, "Predicted and measured, summed over the run")
    table.add_column("phase", no_wrap=True)
    for name in ("calls", "alone s", "predicted s", "measured s", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    for name in ("MFU", "MBU"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, phase in phases.items():
        table.add_row(
            name,
            str(phase.calls),
            _number(phase.alone_s, "{:.3f}"),
            _number(phase.predicted_s, "{:.3f}"),
            f"{phase.measured_s:.3f}",
            _number(phase.ratio, "{:.2f}"),
            phase.bound or "-",
            _number(phase.mfu, "{:.1%}"),
            _number(phase.mbu, "{:.1%}"),
        )
    return table


def _outcome_table(summary: Summary, console: Console) -> Table:
    table = _table(console, "Held-out problems")
    table.add_column("", no_wrap=True)
    for name in ("before", "after"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, before, after in (
        ("pass@1", summary.pass_at_1_before, summary.pass_at_1_after),
        ("pass@8", summary.pass_at_8_before, summary.pass_at_8_after),
    ):
        table.add_row(name, _number(before, "{:.1%}"), _number(after, "{:.1%}"))
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def histogram_lines(counts: Mapping[int, int]) -> list[str]:
    """One text bar per value, e.g. '1 | #### 512 (40.0 %)'; the commonest has the longest bar."""
    total, most = sum(counts.values()), max(counts.values(), default=0)
    return [
        f"{value:>3} | {'#' * round(_BAR_COLUMNS * count / most):<{_BAR_COLUMNS}} "
        f"{count} ({100 * count / total:.1f} %)"
        for value, count in sorted(counts.items())
    ]
