"""How far a calibration is off on shapes that it was not fitted on, several times over.

    python -m benchmarks.calibration [--rounds 3] [--config NAME]

Each round is a fresh process of `python -m roofline.calibrate`; its held-out shapes are programs like the
trainer's at other rows, tokens and slots than those that the shares were fitted on. Wanted: at most 10 % in
the median per phase, and under 60 s.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from roofline.hardware import Hardware

WANTED, WANTED_S = 0.10, 60.0


def main(argv: Sequence[str] | None = None) -> None:
    """Calibrate in every round, write the errors."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--config", help="shapes of a configuration (default: quickstart's)")
    options = parser.parse_args(argv)
    made = record.provenance()
    rounds = [calibrate(options.config) for _ in range(options.rounds)]
    content = {"provenance": made, "config": options.config or "quickstart", "rounds": rounds}
    record.write("calibration", content, describe(rounds))


def calibrate(config: str | None) -> dict[str, Any]:
    """One calibration in a process of its own: seconds, disturbance, predicted / measured by shape."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "hardware.json"
        words = [sys.executable, "-m", "roofline.calibrate", "--out", str(out)]
        began = time.perf_counter()
        subprocess.run(
            [*words, *(["--config", config] if config else [])], check=True, cwd=record.ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        seconds, hardware = time.perf_counter() - began, Hardware.load(out)
    return {
        "seconds": round(seconds, 1), "disturbance": hardware.disturbance,
        "held_out": dict(hardware.held_out),
    }  # fmt: skip


def phase_errors(rounds: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """|predicted / measured - 1| of every held-out shape and round, by phase."""
    errors: dict[str, list[float]] = {}
    for one in rounds:
        for shape, ratio in one["held_out"].items():
            errors.setdefault(shape.split()[0], []).append(abs(ratio - 1))
    return errors


def describe(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Each shape's ratios, each phase's median error, in Markdown."""
    shapes = dict.fromkeys(shape for one in rounds for shape in one["held_out"])
    ratios = [
        [shape, *(f"{one['held_out'][shape]:.2f}" if shape in one["held_out"] else "-"
                  for one in rounds)]
        for shape in shapes
    ]  # fmt: skip
    errors = [
        [phase, f"{100 * statistics.median(of):.1f}", f"{100 * max(of):.1f}", f"{100 * WANTED:.0f}",
         "yes" if statistics.median(of) <= WANTED else "no"]
        for phase, of in phase_errors(rounds).items()
    ]  # fmt: skip
    slowest = max(one["seconds"] for one in rounds)
    said = "; ".join(sorted({one["disturbance"] for one in rounds} - {""}))
    disturbed = f"\nDisturbed: {said}." if said else ""
    return "\n".join([
        "# Calibration on shapes it was not fitted on", "",
        f"Slowest round {slowest:.0f} s with the start of Python ({WANTED_S:.0f} wanted).{disturbed}", "",
        record.table(["phase", "median error %", "largest %", "wanted", "holds"], errors), "",
        "Predicted / measured of each round:", "",
        record.table(["shape", *(f"round {i + 1}" for i in range(len(rounds)))], ratios),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
