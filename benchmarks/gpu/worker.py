"""The process that runs cases: python -m benchmarks.gpu.worker. Started by `benchmarks.gpu.suite`.

Reads one job and answers as `benchmarks.gpu.protocol` says.
"""

from __future__ import annotations

import gc
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax

from benchmarks.gpu.cases import GPU, MIN_ROUNDS, TINY, Case, Scale
from benchmarks.gpu.grpo import grpo_case, rollout_case
from benchmarks.gpu.measure import Prepared, Result, measure
from benchmarks.gpu.phases import Bench, prepare
from benchmarks.gpu.profile import most_expensive
from benchmarks.gpu.protocol import ERROR_CHARACTERS, Answer, connect, told
from jaxrl.attention import Table
from jaxrl.collector import settled
from jaxrl.devices import remember_programs
from roofline.calibrate import calibrate
from roofline.datasheets import datasheet_of_device
from roofline.hardware import Hardware

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
"""How XLA names it."""
GRPO_ROUNDS = 3


def make(bench: Bench, case: Case) -> Prepared:
    """The case, ready to run."""
    if case.kind == "rollout":
        return rollout_case(bench, case)
    if case.kind == "grpo":
        return grpo_case(bench, case)
    return prepare(bench, case)


def run_case(
    scale: Scale, case: Case, hardware: Hardware | None, *, profiled: bool = False,
    dump: Path | None = None, table: Table | None = None,
) -> Result:  # fmt: skip
    """Measure (or profile) one case; without calibrated hardware beside the device's datasheet.

    Returns {"status": "done", ...}, or {"status": "no room", "why"} when it does not fit the device.
    Raises: ValueError for a device of which neither a calibration nor a datasheet is there.
    """
    bench = Bench(scale=scale, name=case.model, table=table or {})
    if case.kind == "calibrate":
        made = calibrate(
            bench.model, workload=scale.workload(), devices=jax.local_devices()[:1],
            budget_s=scale.calibration_s, thorough=True,
        )  # fmt: skip
        return {"status": "done", "hardware": made.to_json()}
    hardware = hardware or datasheet_of_device(jax.local_devices()[0].device_kind)
    if hardware is None and not profiled:
        raise ValueError(
            f"{case.name} is predicted from a calibration, and {case.model} has none on this device, of "
            "which no datasheet is known; run --only calibrate first"
        )
    try:
        prepared = make(bench, case)
        with closing(prepared), settled():
            if profiled:
                return {"status": "done", "kernels": _profile(prepared, dump)}
            assert hardware is not None
            rounds = GRPO_ROUNDS if case.kind == "grpo" else MIN_ROUNDS
            result = measure(prepared, hardware, scale.seconds, min_rounds=rounds)
            return {"status": "done", "calibrated": hardware.calibrated, **result}
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or OUT_OF_MEMORY in str(error):
            return {"status": "no room", "why": str(error)[:ERROR_CHARACTERS]}
        raise


def _profile(prepared: Prepared, dump: Path | None) -> list[dict[str, Any]]:
    """Kernels of one call after one that compiles."""
    prepared.before()
    prepared.once()
    prepared.before()
    return most_expensive(prepared.once, dump, prepared.programs)


def device_facts() -> dict[str, str]:
    """Device, platform and versions as this process sees them."""
    device = jax.local_devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "runtime": device.client.platform_version.replace("\n", ", "),
    }


def serve(job: dict[str, Any], answer: Answer) -> None:
    """Run the job's cases one after another, up to one that does not succeed."""
    scale = GPU if job["scale"] == GPU.name else TINY
    hardware = Hardware.from_json(job["hardware"]) if job["hardware"] else None
    dump = Path(job["dump"]) if job["dump"] else None
    until = time.perf_counter() + job["left_s"]
    run = partial(
        run_case,
        scale,
        hardware=hardware,
        profiled=job["profile"],
        dump=dump,
        table=job["attention"],
    )
    answer({"ready": device_facts()})
    for fields, expected_s in zip(job["cases"], job["expected_s"], strict=True):
        case = Case(**fields)
        if time.perf_counter() + expected_s > until:
            continue  # left for another call
        if not told(case.name, partial(run, case), answer):
            return
        gc.collect()


def main() -> None:
    """Serve one job."""
    job, answer = connect()
    if not job["profile"]:  # a program from the cache leaves no text of itself
        remember_programs()
    serve(job, answer)


if __name__ == "__main__":
    main()
