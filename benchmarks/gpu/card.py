"""What the card says of itself: name, driver, limits once, and clock, power and heat while cases run.

From nvidia-smi, in a process of its own beside the suite; where there is none, nothing is said. Loads no jax.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

TOOL = "nvidia-smi"
STANDING = (
    "name", "driver_version", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.memory",
    "ecc.mode.current",
)  # fmt: skip
RUNNING = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
"""MHz, MHz, W, degrees Celsius."""
PERIOD_MS = 500


def standing() -> dict[str, str]:
    """Name, driver and limits of the first GPU; empty where the tool is missing or refuses."""
    if shutil.which(TOOL) is None:
        return {}
    words = [TOOL, f"--query-gpu={','.join(STANDING)}", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        return {}
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return dict(zip(STANDING, values, strict=False))


@dataclass
class Watch:
    """Readings of the first GPU since it was started."""

    readings: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    """Seconds on time.monotonic, and what of RUNNING the card told."""

    def between(self, begin_s: float, end_s: float) -> dict[str, dict[str, float]]:
        """Least, median and most of each of RUNNING between two moments; what was never told is left out."""
        rows = [values for at, values in list(self.readings) if begin_s <= at <= end_s]
        return {
            name: {"min": min(column), "median": statistics.median(column), "max": max(column)}
            for name in RUNNING
            if (column := [row[name] for row in rows if name in row])
        }


def parsed(line: str) -> dict[str, float]:
    """Numbers of one line of the tool by name; without those that the card does not support ([N/A])."""
    words = line.split(",")
    found: dict[str, float] = {}
    for name, word in zip(RUNNING, words, strict=False) if len(words) == len(RUNNING) else ():
        with contextlib.suppress(ValueError):
            found[name] = float(word)
    return found


@contextlib.contextmanager
def watching(words: Sequence[str] | None = None) -> Iterator[Watch]:
    """Reads the card every PERIOD_MS while it is open. `words`: the command; None: the tool, if it is here."""
    watch = Watch()
    if words is None and shutil.which(TOOL) is None:
        yield watch
        return
    usual = [TOOL, f"--query-gpu={','.join(RUNNING)}", "--format=csv,noheader,nounits", "-i", "0"]
    process = subprocess.Popen(
        words or [*usual, "-lms", str(PERIOD_MS)], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    stdout = process.stdout
    assert stdout is not None

    def read() -> None:
        for line in stdout:
            if values := parsed(line):
                watch.readings.append((time.monotonic(), values))

    threading.Thread(target=read, daemon=True).start()
    try:
        yield watch
    finally:
        process.kill()
        process.wait()
