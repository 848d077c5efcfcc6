"""Measures the device, runs the trainer-like programs, fits, and checks the fit."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from models.config import ModelConfig
from roofline.calibrate.micro import measure_device, measure_rates, versions, with_better
from roofline.calibrate.programs import Probe, lane_mate, probes
from roofline.calibrate.progress import stages
from roofline.calibrate.timing import Device, Run, Timing, in_turn, seconds, timed
from roofline.datasheets import datasheet_of_device
from roofline.fit import Sample, fit_all, fit_lanes, held_out_ratios
from roofline.hardware import Hardware
from roofline.machine import Workload, busy_core_s, cache_file, own_s, usable_cores
from roofline.phases import Phase
from roofline.read_run import Span

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
MOST_OTHERS = 0.15
"""Share of the cores that other programs may take while a CPU is measured: a desktop at rest takes less."""
CONTENTION_S = 0.4
"""How long two lanes run side by side to see how they disturb each other [s]."""
LANES_S = 18.0
"""Time for the trainer's own lanes, lockstep and overlapped, once they are compiled [s]."""

Lanes = Callable[[Hardware, float], Sequence[Span]]
"""Runs the trainer's own lanes for so many seconds on hardware known so far; returns their spans."""


def cached_or_calibrate(
    model: ModelConfig | None = None,
    *,
    workload: Workload | None = None,
    devices: Sequence[Device] | None = None,
    budget_s: float = 30.0,
    again: bool = False,
    lanes: Lanes | None = None,
) -> Hardware:
    """The stored calibration of this machine, software, model and workload; measured if none is.

    `lanes`: see `calibrate`. `again` measures whatever is stored. A disturbed calibration is used, but
    not stored: the next start measures again.
    """
    workload = workload or Workload()
    devices = list(devices or jax.devices())
    path = cache_file(model, workload, versions(devices[0]), len(devices))
    if path.is_file() and not again:
        return Hardware.load(path)
    hardware = calibrate(model, workload=workload, devices=devices, budget_s=budget_s, lanes=lanes)
    if not hardware.disturbance:
        hardware.save(path)
    return hardware


def calibrate(
    model: ModelConfig | None = None,
    *,
    workload: Workload | None = None,
    devices: Sequence[Device] | None = None,
    budget_s: float = 30.0,
    thorough: bool = False,
    lanes: Lanes | None = None,
) -> Hardware:
    """Measure `devices[0]` and its links; with a model also its phases at the workload's shapes.

    `budget_s` bounds the time: programs that do not fit in it are left out and named in `source`,
    and their phases keep the micro-benchmarks' shares. `thorough` fits more shapes, runs others
    that are not fitted, and stores predicted / measured of those in `held_out`. `lanes` runs the
    trainer's own lanes; what its spans say goes over what the programs like the trainer's said.
    """
    workload, devices = workload or Workload(), list(devices or jax.devices())
    with stages(4 if lanes else 3) as say:
        say("device")
        begin, others = time.perf_counter(), OtherPrograms()
        hardware = measure_device(devices, model or QUICKSTART, workload)
        if model is None:
            return dataclasses.replace(hardware, disturbance=others.disturbance({}, devices[0]))
        say("programs, compilation")
        small = shallow(model)
        wanted = probes(small, workload, devices[0], thorough=thorough)
        made, left_out = _compile(wanted, begin + COMPILE_SHARE * budget_s)
        say("programs")
        timings = in_turn([run for _, run in made], begin + budget_s)
        if datasheet_of_device(devices[0].device_kind) is None:
            again = measure_rates(devices[0], model, workload)
            hardware = with_better(hardware, again, workload.dtype)
        hardware = dataclasses.replace(
            _with_programs(hardware, made, timings),
            measured_for=_plain({"model": model, "workload": workload}),
            contention=_contention(small, workload, devices, made),
            disturbance=others.disturbance(
                {p.name: t for (p, _), t in zip(made, timings, strict=True)}, devices[0]
            ),
        )
        if left_out:
            skipped = f"left out for lack of time: {', '.join(left_out)}"
            hardware = dataclasses.replace(hardware, source=(*hardware.source, skipped))
        if lanes is None:
            return hardware
        say("the run's own lanes")
        return _with_lanes(hardware, lanes, devices[0])


def _with_programs(
    hardware: Hardware, made: Sequence[tuple[Probe, Run]], timings: Sequence[Timing]
) -> Hardware:
    """The hardware with the phases' shares that the programs' times say, checked on those held out."""
    fitted, held_out = [], []
    for (probe, _), timing in zip(made, timings, strict=True):
        sample = Sample(name=probe.name, cost=probe.cost, measured_s=timing.seconds)
        (held_out if probe.held_out else fitted).append(sample)
    hardware = dataclasses.replace(hardware, phase_efficiency=fit_all(fitted, hardware))
    return dataclasses.replace(hardware, held_out=held_out_ratios(held_out, hardware))


def _plain(records: Mapping[str, Any]) -> dict[str, Any]:
    """Dataclasses as JSON gives them back."""
    fields = {name: dataclasses.asdict(record) for name, record in records.items()}
    return json.loads(json.dumps(fields))


def _with_lanes(hardware: Hardware, lanes: Lanes, device: Device) -> Hardware:
    """The hardware with what the trainer's own lanes say of its phases."""
    others = OtherPrograms()
    spans = lanes(hardware, LANES_S)
    fitted = fit_lanes(spans, hardware)
    said = [text for text in (hardware.disturbance, others.disturbance({}, device)) if text]
    return dataclasses.replace(
        fitted,
        source=(*fitted.source, f"phases: {len(spans)} spans of the trainer's own lanes"),
        disturbance=", then ".join(said),
    )


class OtherPrograms:
    """Watches, from when it is made, what share of the cores other programs take."""

    def __init__(self) -> None:
        self._begin = (time.perf_counter(), busy_core_s(), own_s())

    def share(self) -> float:
        """Of the cores that this process may use, since the beginning; 0 where the system is silent."""
        begin_s, begin_busy_s, begin_own_s = self._begin
        busy_s = busy_core_s()
        if busy_s is None or begin_busy_s is None:
            return 0.0
        elsewhere_s = busy_s - begin_busy_s - (own_s() - begin_own_s)
        return max(0.0, elsewhere_s / (time.perf_counter() - begin_s) / usable_cores())

    def disturbance(self, timings: Mapping[str, Timing], device: Device) -> str:
        """What to say against `timings`, measured since the beginning, by program; '' if nothing."""
        said = []
        share = self.share()
        if device.platform == "cpu" and share > MOST_OTHERS:
            said.append(f"other programs took {share:.0%} of the cores")
        worst = max(timings, key=lambda name: timings[name].spread, default=None)
        if worst is not None and not timings[worst].calm:
            said.append(f"repeats of {worst} differ {timings[worst].spread:.1f}-fold")
        return ", ".join(said)


def shallow(model: ModelConfig) -> ModelConfig:
    """The model at the depth that is measured: time is linear in layers, which are scanned."""
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
