"""Names the phase that hangs. The limit of a phase comes from its predicted time.

A hang stops every thread sooner or later, most of them in a wait; so a phase that works is named
before one that only waits for it.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxrl.telemetry.spans import OpenSpan
from roofline.phases import Phase

_WAITS = (Phase.WAIT_BATCH, Phase.WAIT_LEARNER)


class HangError(RuntimeError):
    """A phase runs far longer than predicted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Longest time a span may stay open: max(floor_s, factor * predicted_s)."""

    factor: float = 50.0
    """Times the predicted duration; a ratio above this is no mere misprediction."""
    floor_s: float = 300.0
    """Least limit [s]; the first call of a phase compiles inside its span."""
    predicted_s: Mapping[Phase, float] | None = None
    """Predicted seconds of one call, for spans that carry no cost when they open."""

    def of(self, span: OpenSpan) -> float:
        """Limit of this span [s]. A wait may last as long as all predicted phases together."""
        table = self.predicted_s or {}
        predicted_s = span.predicted_s
        if predicted_s is None:
            predicted_s = sum(table.values()) if span.phase in _WAITS else table.get(span.phase, 0)
        return max(self.floor_s, self.factor * predicted_s)


class Watchdog:
    """Compares open spans with their limits, from a thread of its own or through `check`."""

    def __init__(
        self,
        open_spans: Callable[[], tuple[OpenSpan, ...]],
        now_s: Callable[[], float],
        limits: Limits,
        on_hang: Callable[[HangError], None] | None = None,
    ) -> None:
        """Watch the spans of one recorder.

        Args:
            open_spans: SpanRecorder.open_spans.
            now_s: SpanRecorder.now_s.
            limits: how long a span may stay open.
            on_hang: called once, in the thread that checks; `abort` ends the process.
        """
        self._open_spans = open_spans
        self._now_s = now_s
        self._limits = limits
        self._on_hang = on_hang
        self._error: HangError | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def check(self) -> HangError | None:
        """The error for the span furthest past its limit, or None; remembered and reported once."""
        if self._error is None:
            now_s = self._now_s()
            late = [s for s in self._open_spans() if now_s - s.start_s > self._limits.of(s)]
            if late:
                worst = max(late, key=lambda s: (s.phase not in _WAITS, self._excess(s, now_s)))
                self._error = HangError(self._describe(worst, now_s))
                if self._on_hang is not None:
                    self._on_hang(self._error)
        return self._error

    def _excess(self, span: OpenSpan, now_s: float) -> float:
        return (now_s - span.start_s) / self._limits.of(span)

    def _describe(self, span: OpenSpan, now_s: float) -> str:
        predicted = "" if span.predicted_s is None else f", predicted {span.predicted_s:.3g} s"
        return (
            f"phase {span.phase} ({span.lane}, step {span.step}) has run for "
            f"{now_s - span.start_s:.0f} s; its limit is {self._limits.of(span):.0f} s{predicted}. "
            "The same command goes on from the newest checkpoint."
        )

    def raise_if_hung(self) -> None:
        """Raise the HangError that a check has found."""
        if self._error is not None:
            raise self._error

    def start(self, every_s: float = 5.0) -> None:
        """Check every `every_s` seconds in a daemon thread until `stop`."""
        self._thread = threading.Thread(
            target=self._run, args=(every_s,), name="watchdog", daemon=True
        )
        self._thread.start()

    def _run(self, every_s: float) -> None:
        while not self._stop.wait(every_s) and self.check() is None:
            pass

    def stop(self) -> None:
        """End the thread; does nothing if it was not started."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()


def abort(error: HangError) -> None:
    """Print the error and every thread's stack, then end the process; main may be stuck."""
    print(f"Error: {error}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)
