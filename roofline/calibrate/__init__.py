"""Measures this machine: peaks, fixed times, and the shares of the peaks that each phase reaches.

    python -m roofline.calibrate [--model config.json] [--out hardware.json]

Two layers. Micro-benchmarks give what any program meets: dispatch, the fixed time of a kernel,
memory bandwidth, matrix products at the model's shapes, copies between devices. Then programs like
the trainer's run at a few shapes, and `roofline.fit` turns their times into shares of the peaks per
phase. A datasheet gives the peaks of a known GPU; elsewhere the best measured rate is the peak.

Rules: all is compiled before anything is timed; the programs run in turn, round after round, so
that a disturbance hits each of them; the median of the rounds counts; chains run inside one
program; what a program replaces is donated (fresh buffers cost page faults on a CPU). The only part
of `roofline` that imports jax.
"""

from roofline.calibrate.measure import cached_or_calibrate, calibrate
from roofline.machine import Workload

__all__ = ["Workload", "cached_or_calibrate", "calibrate"]
