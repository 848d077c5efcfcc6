"""Calibrates for one model, checks held-out shapes, prints and stores the result."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from models.config import ModelConfig, RopeScaling
from roofline.calibrate.measure import QUICKSTART, calibrate
from roofline.hardware import Hardware
from roofline.machine import Workload


def main() -> None:
    """Parse the command line, calibrate, print."""
    parser = argparse.ArgumentParser(prog="python -m roofline.calibrate", description=__doc__)
    parser.add_argument(
        "--model", type=Path, help="JSON file with the fields of models.config.ModelConfig"
    )
    parser.add_argument("--slots", type=int, default=128, help="sequences decoded at once")
    parser.add_argument("--kv-len", type=int, default=32, help="cached tokens a step reads")
    parser.add_argument("--rows", type=int, default=64, help="packed rows of a micro-batch")
    parser.add_argument("--row-tokens", type=int, default=64, help="length of a packed row")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--budget-s", type=float, default=60.0, help="time to spend [s]")
    parser.add_argument("--quick", action="store_true", help="only what a run needs; no check")
    parser.add_argument("--out", type=Path, help="write the hardware as JSON here")
    options = parser.parse_args()
    workload = Workload(
        slots=options.slots,
        kv_len=options.kv_len,
        rows=options.rows,
        row_tokens=options.row_tokens,
        dtype=options.dtype,
    )
    try:
        model = _model(options.model) if options.model else QUICKSTART
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"--model {options.model}: {error}")
    begin = time.perf_counter()
    hardware = calibrate(
        model, workload=workload, budget_s=options.budget_s, thorough=not options.quick
    )
    print(describe(hardware))
    print(f"measured in {time.perf_counter() - begin:.1f} s")
    if options.out:
        hardware.save(options.out)
        print(f"written to {options.out}")


def _model(path: Path) -> ModelConfig:
    fields = json.loads(path.read_text(encoding="utf-8"))
    for name in ("no_rope_layers", "eos_token_ids"):
        if name in fields:
            fields[name] = tuple(fields[name])
    if fields.get("rope_scaling"):
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    return ModelConfig(**fields)


def describe(hardware: Hardware) -> str:
    """The calibration as text, held-out errors included."""
    peaks = ", ".join(
        f"{dtype} {peak / 1e9:.0f}" for dtype, peak in hardware.peak_flops_per_s.items()
    )
    lines = [
        f"{hardware.name} ({hardware.date})",
        f"  peak [GFLOP/s]        {peaks}",
        f"  memory                {hardware.hbm_bytes_per_s / 1e9:.1f} GB/s",
        f"  link                  {hardware.link_bytes_per_s / 1e9:.1f} GB/s, "
        f"{hardware.link_latency_s * 1e6:.1f} us",
        f"  dispatch, kernel      {hardware.dispatch_s * 1e6:.1f} us, "
        f"{hardware.kernel_s * 1e6:.2f} us",
        f"  contention            {hardware.contention:.2f}",
        "  shares                compute  memory  kernel [us]",
    ]
    for phase, share in {"(general)": hardware.efficiency, **hardware.phase_efficiency}.items():
        kernel_s = hardware.kernel_s if share.kernel_s is None else share.kernel_s
        lines.append(
            f"    {phase:<18}  {share.compute:7.3f} {share.memory:7.3f} {kernel_s * 1e6:8.2f}"
        )
    if hardware.held_out:
        lines.append("  held-out shapes       predicted / measured")
        lines += [f"    {name:<18}  {ratio:7.2f}" for name, ratio in hardware.held_out.items()]
    lines += [f"  {source}" for source in hardware.source]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
