"""What the terminal shows while a run goes on: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

PLAIN_WIDTH = 100  # columns of tables where there is no terminal to ask
_RECENT_STEPS = 20  # steps whose mean duration predicts the rest

SHOWN = (
    ("reward", "reward/mean", "{:.3f}"),
    ("pass@1", "eval/pass_at_1", "{:.1%}"),
    ("loss", "sft/loss", "{:.3f}"),
    ("held-out loss", "eval/loss", "{:.3f}"),
    ("loss", "preference/loss", "{:.4f}"),
    ("accuracy", "rewards/accuracy", "{:.1%}"),
    ("samples/s", "perf/samples_per_s", "{:.1f}"),
    ("staleness", "off_policy/staleness_mean", "{:.2f}"),
)
"""Label, metric and format of what stands beside the bar; a metric stays until its next value."""


def make_console() -> Console:
    """Console on stdout; without a terminal it is PLAIN_WIDTH wide and free of control codes."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def format_duration(seconds: float) -> str:
    """0:07, 12:05 or 3:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class RunProgress:
    """Live view of a run; a context manager, since the bar owns the last line of the terminal."""

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        console: Console | None = None,
        every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show progress towards `total_steps`.

        Args:
            total_steps: optimizer steps of the whole run.
            first_step: steps done before this start (a resumed run).
            console: where to print; default stdout.
            every_s: least time between two plain lines [s].
            clock: seconds, monotonic.
        """
        self._total, self._every_s, self._clock = total_steps, every_s, clock
        self._console = console or make_console()
        self._recent = deque([(clock(), first_step)], maxlen=_RECENT_STEPS + 1)
        self._seen: dict[str, float] = {}
        self._printed_s = -float("inf")
        self._bar = self._make_bar(first_step) if self._console.is_terminal else None

    def _make_bar(self, first_step: int) -> Progress:
        bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            console=self._console,
            expand=True,
        )
        bar.add_task("starting", total=self._total, completed=first_step)
        return bar

    def __enter__(self) -> Self:
        """Start the bar, and the clock: a cold start before it says nothing of the steps to come."""
        self._recent[0] = (self._clock(), self._recent[0][1])
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Show that `step` is done, with the newest value of each metric in SHOWN."""
        now_s = self._clock()
        self._recent.append((now_s, step))
        for _, key, _ in SHOWN:
            value = metrics.get(key)
            if value is not None:
                self._seen[key] = value
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, description=self._status())
        elif now_s - self._printed_s >= self._every_s or step >= self._total:
            self._printed_s = now_s
            self.note(f"step {step}/{self._total}  {self._status()}")

    def _status(self) -> str:
        parts = [
            f"{label} {form.format(self._seen[key])}"
            for label, key, form in SHOWN
            if key in self._seen
        ]
        return "  ".join([*parts, f"ETA {format_duration(self.eta_s())}"])

    def eta_s(self) -> float:
        """Steps left times the mean duration of the last steps [s]."""
        (begin_s, begin), (end_s, end) = self._recent[0], self._recent[-1]
        return (self._total - end) * (end_s - begin_s) / max(end - begin, 1)

    def note(self, line: str) -> None:
        """Print one line above the bar, e.g. an evaluation or a checkpoint."""
        self._console.print(line, markup=False, soft_wrap=True)
        if not self._console.is_terminal:
            self._console.file.flush()
