"""What a calibration shows of itself while it runs: a bar on a terminal, one line elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def stages(number: int, console: Console | None = None) -> Iterator[Callable[[str], None]]:
    """Yields what announces the next of `number` stages by its name."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        console.print("calibrating this machine, which takes half a minute and is kept", style=None)
        yield lambda _: None
        return
    bar = Progress(
        TextColumn("calibrating: {task.description}"), BarColumn(), TimeElapsedColumn(),
        console=console, transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=number, completed=-1)
        yield lambda name: bar.update(task, description=name, advance=1)
