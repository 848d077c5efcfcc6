"""Measures this machine: peaks, fixed times, and the shares of the peaks that each phase reaches.

    python -m roofline.calibrate [--config NAME | --model NAME] [--out hardware.json]

Three layers. Micro-benchmarks give what any program meets: dispatch, the fixed time of a kernel,
memory bandwidth, matrix products at the model's shapes, copies and gathers between devices. Then programs like
the trainer's run at a few shapes, and `roofline.fit` turns their times into shares of the peaks per
phase. At last, where a run asks, its own lanes work for some seconds, in lockstep and beside each other
(`jaxrl.trial`): their spans say what a call costs with cold caches, Python and telemetry around it, and how
much the other lane and the verifiers slow each phase. A datasheet gives the peaks of a known GPU;
elsewhere the best measured rate is the peak.

Rules: all is compiled before anything is timed; the programs run in turn, round after round, so
that a disturbance hits each of them, and in another order each time, so that each meets several
states of the caches; the lower quartile of the rounds counts, and rounds go on while they disagree;
peaks are measured before and after the programs, and the better ones count; a calibration made while
other programs were at work says so and is not kept; chains run inside one program; what a program
replaces is donated (fresh buffers cost page faults on a CPU).
The only part of `roofline` that imports jax.
"""

from roofline.calibrate.measure import cached_or_calibrate, calibrate, shallow
from roofline.machine import Workload

__all__ = ["Workload", "cached_or_calibrate", "calibrate", "shallow"]
