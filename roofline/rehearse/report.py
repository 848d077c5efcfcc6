"""An executable as a few tables. Standard library and rich only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from roofline.hardware import Hardware
from roofline.rehearse.compare import Line, Seconds, checks, lines, seconds
from roofline.svg import si

if TYPE_CHECKING:
    from roofline.rehearse.executable import Executable

GIB = 2**30


def print_program(executable: Executable, hardware: Hardware | None, console: Console) -> None:
    """Lines, checks, times and the kernels that take longest; hardware None: no times."""
    phase = executable.program.phase
    table = Table(
        title=f"{phase}: compiled in {executable.compile_s:.1f} s", box=None, pad_edge=False
    )
    for column in ("per run and device", "predicted", "compiled", "ratio"):
        table.add_column(column, justify="left" if column.startswith("per") else "right")
    for line in lines(executable):
        ratio = "-" if line.ratio is None else f"{line.ratio:.3f}"
        table.add_row(line.name, _value(line, line.predicted), _value(line, line.compiled), ratio)
    console.print(table)
    for check in checks(executable):
        console.print(
            f"  {'ok  ' if check.holds else 'FAIL'} {check.name}: {check.found}", markup=False
        )
    if hardware is not None:
        _print_seconds(seconds(executable, hardware), console)


def _print_seconds(found: Seconds, console: Console) -> None:
    own = found.operators
    console.print(
        f"  time: bound {si(found.lower, 's')} to {si(found.upper, 's')}, analytic "
        f"{si(found.analytic, 's')}, from its operators {si(own.seconds, 's')} (products "
        f"{si(own.products_s, 's')}, attention {si(own.attention_s, 's')}, passes "
        f"{si(own.passes_s, 's')}, exposed collectives {si(own.exposed_s, 's')}, hidden "
        f"{si(own.hidden_s, 's')})",
        markup=False, highlight=False,
    )  # fmt: skip
    for name, scope, taken in own.largest[:5]:
        console.print(
            f"    {si(taken, 's'):>9}  {name}  {scope[-80:]}", markup=False, highlight=False
        )


def print_totals(totals: Mapping[str, int], hardware: Hardware | None, console: Console) -> None:
    """Most bytes on a device of each lane."""
    for lane, needed in totals.items():
        room = f" of {hardware.hbm_bytes / GIB:.1f}" if hardware is not None else ""
        console.print(f"{lane} device: {needed / GIB:.2f}{room} GiB at its peak", markup=False)
    console.print("compiled, not run: no device was there", markup=False)


def _value(line: Line, value: float) -> str:
    if line.unit == "byte":
        return f"{value / GIB:.3f} GiB" if value >= GIB else f"{value / 2**20:.2f} MiB"
    return si(value, line.unit) if line.unit else f"{value:,.0f}"
