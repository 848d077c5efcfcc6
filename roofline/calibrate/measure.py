"""Measures the device, runs the trainer-like programs, fits, and checks the fit."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

from models.config import ModelConfig
from roofline.calibrate.micro import measure_device, versions
from roofline.calibrate.programs import Probe, lane_mate, probes
from roofline.calibrate.timing import Device, Run, medians, seconds, timed
from roofline.fit import Sample, fit_all, held_out_ratios
from roofline.hardware import Hardware
from roofline.machine import Workload, cache_file
from roofline.phases import Phase

QUICKSTART = ModelConfig(
    vocab_size=20, width=128, num_layers=2, num_heads=4, num_kv_heads=2, head_size=32,
    ffw_size=384, qk_norm=True,
)  # fmt: skip
"""Whose product shapes are measured when no model is given."""
PROBE_LAYERS = 2
"""Layers are scanned, so time is linear in them: deeper models are measured at this depth."""
COMPILE_SHARE = 0.6
"""Share of the budget after which no further program is compiled."""
COMPILE_THREADS = 2
CONTENTION_S = 0.4
"""How long two lanes run side by side to see how they disturb each other [s]."""


def cached_or_calibrate(
    model: ModelConfig | None = None,
    *,
    workload: Workload | None = None,
    devices: Sequence[Device] | None = None,
    budget_s: float = 30.0,
) -> Hardware:
    """The stored calibration of this machine, software, model and workload; measured if none is."""
    workload = workload or Workload()
    devices = list(devices or jax.devices())
    path = cache_file(model, workload, versions(devices[0]), len(devices))
    if path.is_file():
        return Hardware.load(path)
    hardware = calibrate(model, workload=workload, devices=devices, budget_s=budget_s)
    hardware.save(path)
    return hardware


def calibrate(
    model: ModelConfig | None = None,
    *,
    workload: Workload | None = None,
    devices: Sequence[Device] | None = None,
    budget_s: float = 30.0,
    thorough: bool = False,
) -> Hardware:
    """Measure `devices[0]` and its links; with a model also its phases at the workload's shapes.

    `budget_s` bounds the time: programs that do not fit in it are left out and named in `source`,
    and their phases keep the micro-benchmarks' shares. `thorough` fits more shapes, runs others
    that are not fitted, and stores predicted / measured of those in `held_out`.
    """
    begin, workload = time.perf_counter(), workload or Workload()
    devices = list(devices or jax.devices())
    hardware = measure_device(devices, model or QUICKSTART, workload)
    if model is None:
        return hardware
    small = _shallow(model)
    wanted = probes(small, workload, devices[0], thorough=thorough)
    made, left_out = _compile(wanted, begin + COMPILE_SHARE * budget_s)
    times = medians([run for _, run in made], begin + budget_s)
    fitted, held_out = [], []
    for (probe, _), measured_s in zip(made, times, strict=True):
        sample = Sample(name=probe.name, cost=probe.cost, measured_s=measured_s)
        (held_out if probe.held_out else fitted).append(sample)
    hardware = dataclasses.replace(
        hardware,
        phase_efficiency=fit_all(fitted, hardware),
        contention=_contention(small, workload, devices, made),
    )
    skipped = (f"left out for lack of time: {', '.join(left_out)}",) if left_out else ()
    return dataclasses.replace(
        hardware,
        held_out=held_out_ratios(held_out, hardware),
        source=hardware.source + skipped,
    )


def _shallow(model: ModelConfig) -> ModelConfig:
    depth = min(model.num_layers, PROBE_LAYERS)
    kept = tuple(i for i in model.no_rope_layers if i < depth)
    return dataclasses.replace(model, num_layers=depth, no_rope_layers=kept)


def _compile(
    wanted: Sequence[Probe], deadline_s: float
) -> tuple[list[tuple[Probe, Run]], list[str]]:
    """Programs ready to run, compiled side by side, and the names of those left out.

    The first two, training and decoding, are compiled whatever the deadline.
    """

    def make(position: int) -> Run | None:
        if position >= COMPILE_THREADS and time.perf_counter() > deadline_s:
            return None
        return wanted[position].make()

    with ThreadPoolExecutor(COMPILE_THREADS) as pool:
        runs = list(pool.map(make, range(len(wanted))))
    both = list(zip(wanted, runs, strict=True))
    return [(p, run) for p, run in both if run is not None], [
        p.name for p, run in both if run is None
    ]


def _contention(
    model: ModelConfig,
    workload: Workload,
    devices: Sequence[Device],
    made: Sequence[tuple[Probe, Run]],
) -> float:
    """How many times longer decode and score take side by side, as a geometric mean.

    1 where lanes have devices of their own, that is on more than one accelerator; at most 2, the share
    that two lanes on one set of cores leave each other (more is another program's doing).
    """
    if devices[0].platform != "cpu" and len(devices) > 1:
        return 1.0
    decode = next(run for probe, run in made if probe.cost.phase != Phase.TRAIN)
    other = lane_mate(model, workload, devices[-1])
    alone = [seconds(decode), seconds(other)]
    together = _side_by_side([decode, other])
    slower = [max(1.0, both / one) for both, one in zip(together, alone, strict=True)]
    return min(2.0, math.prod(slower) ** (1 / len(slower)))


def _side_by_side(runs: Sequence[Run]) -> list[float]:
    """Mean seconds per call of each program while all of them run, one thread each."""
    means = [0.0] * len(runs)
    together = threading.Barrier(len(runs))

    def loop(index: int) -> None:
        together.wait()
        times = []
        while sum(times) < CONTENTION_S or len(times) < 2:
            times.append(timed(runs[index]))
        means[index] = sum(times) / len(times)

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return means
