"""Calibrates for one model, checks held-out shapes, prints and stores the result."""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import tempfile
import time
from pathlib import Path

import jax

from roofline.calibrate.measure import QUICKSTART, calibrate
from roofline.calibrate.micro import versions
from roofline.choose import find_model, report_errors
from roofline.hardware import Hardware
from roofline.machine import Workload, cache_file, keep_freed_memory, prefer_wide_vectors
from roofline.settings import model_of, read_settings, workload_of


def main() -> None:
    """Parse the command line, calibrate, print."""
    options = _parser().parse_args()
    report_errors(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    for name in ("slots", "kv_len", "rows", "row_tokens", "budget_s"):
        if not 0 < getattr(options, name) < math.inf:
            raise ValueError(
                f"--{name.replace('_', '-')}={getattr(options, name)} must be finite and greater than 0"
            )
    if options.out is not None:
        _try_to_write(options.out)
    settings = None if options.config is None else read_settings(options.config)
    if settings is None:
        model = QUICKSTART
        workload = Workload(
            slots=options.slots, kv_len=options.kv_len, rows=options.rows,
            row_tokens=options.row_tokens, dtype=options.dtype,
        )  # fmt: skip
    else:
        model, workload = model_of(settings, QUICKSTART.vocab_size), workload_of(settings)
    if options.model is not None:
        model = find_model(options.model, QUICKSTART.vocab_size)
    model = dataclasses.replace(model, lora=None)
    prefer_wide_vectors()
    keep_freed_memory()
    begin = time.perf_counter()
    hardware = calibrate(
        model, workload=workload, budget_s=options.budget_s, thorough=not options.quick
    )
    print(describe(hardware))
    print(f"measured in {time.perf_counter() - begin:.1f} s")
    places = [] if options.out is None else [options.out]
    if not hardware.disturbance:
        devices = jax.devices()
        places.append(cache_file(model, workload, versions(devices[0]), len(devices)))
    for place in places:
        try:
            hardware.save(place)
        except OSError as error:
            raise ValueError(f"cannot write {place}: {error}") from error
        print(f"written to {place}")


def _try_to_write(place: Path) -> None:
    """Before a minute of measurements whose result would have nowhere to go."""
    try:
        if place.is_dir():
            raise IsADirectoryError(f"it is a folder; name a file in it: {place / 'hardware.json'}")
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place.parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot write --out={place}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m roofline.calibrate",
        description=__doc__,
        epilog="A run calibrates its own shapes when it starts, with its own lanes as well; what this "
        "command measures is stored for the other commands of roofline, as hardware 'this'.",
    )
    add = parser.add_argument
    add("--config", help="model and shapes of a configuration: YAML file, name, or run folder")
    add("--model", help="name, config.json of Hugging Face, or run folder (default: quickstart's)")
    add("--slots", type=int, default=128, help="sequences decoded at once (without --config)")
    add("--kv-len", type=int, default=32, help="cached tokens a step reads (without --config)")
    add("--rows", type=int, default=64, help="packed rows of a micro-batch (without --config)")
    add("--row-tokens", type=int, default=64, help="length of a packed row (without --config)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="(without --config)")
    add("--budget-s", type=float, default=60.0, help="time to spend [s]")
    add("--quick", action="store_true", help="only what a run needs; no check")
    add("--out", type=Path, help="write the hardware as JSON here too")
    return parser


def describe(hardware: Hardware) -> str:
    """The calibration as text, held-out errors included."""
    peaks = ", ".join(
        f"{dtype} {peak / 1e9:.0f}" for dtype, peak in hardware.peak_flops_per_s.items()
    )
    lines = [
        f"{hardware.name} ({hardware.date})",
        *([f"  DISTURBED: {hardware.disturbance}; measure again"] if hardware.disturbance else []),
        f"  peak [GFLOP/s]        {peaks}",
        f"  memory                {hardware.hbm_bytes_per_s / 1e9:.1f} GB/s",
        f"  link                  {hardware.link_bytes_per_s / 1e9:.1f} GB/s, "
        f"{hardware.link_latency_s * 1e6:.1f} us",
        f"  dispatch, kernel      {hardware.dispatch_s * 1e6:.1f} us, "
        f"{hardware.kernel_s * 1e6:.2f} us",
        f"  contention            {hardware.contention:.2f}",
        "  shares                compute  memory  kernel [us]  call [ms]  beside the other lane",
    ]
    for phase, share in {"(general)": hardware.efficiency, **hardware.phase_efficiency}.items():
        kernel_s = hardware.kernel_s if share.kernel_s is None else share.kernel_s
        lines.append(
            f"    {phase:<18}  {share.compute:7.3f} {share.memory:7.3f} {kernel_s * 1e6:12.2f} "
            f"{share.call_s * 1e3:10.3f} {hardware.phase_contention.get(phase, hardware.contention):10.2f}"
        )
    if hardware.held_out:
        lines.append("  held-out shapes       predicted / measured")
        lines += [f"    {name:<18}  {ratio:7.2f}" for name, ratio in hardware.held_out.items()]
        errors = {name: abs(ratio - 1) for name, ratio in hardware.held_out.items()}
        phases = dict.fromkeys(name.split()[0] for name in errors)
        worst = {
            p: statistics.median(e for n, e in errors.items() if n.startswith(p)) for p in phases
        }
        said = ", ".join(f"{phase} {error:.0%}" for phase, error in worst.items())
        lines.append(
            f"  median error          {said}; all {statistics.median(errors.values()):.0%}"
        )
    lines += [f"  {source}" for source in hardware.source]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
