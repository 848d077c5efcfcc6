"""`python -m roofline.rehearse`: compile a run's own programs for GPUs that are not there, and read them.

    python -m roofline.rehearse --config qwen3_4b_math_8gpu --hardware h200 --devices 8
        [--phases decode train] [--json | --out FILE] [--model.remat block ...]

Other words are settings as for `jaxrl.train`. Nothing is downloaded: a checkpoint that is not here stands
for the architecture of that name. Exit code 2: the configuration is wrong, or does not fit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxrl import build
from jaxrl.cli import parse_args, user_errors
from jaxrl.config import Config, TaskConfig
from jaxrl.devices import make_meshes
from jaxrl.errors import UserError
from jaxrl.programs import PHASES, Stage
from jaxrl.tasks import make_task
from jaxrl.tokenizer import CharTokenizer
from roofline.choose import find_model
from roofline.datasheets import datasheet
from roofline.hardware import Hardware
from roofline.phases import Phase
from roofline.rehearse.compare import to_json
from roofline.rehearse.executable import Executable, compile_program
from roofline.rehearse.report import print_program, print_totals
from roofline.rehearse.target import HOST, target_devices, target_names

PROG = "python -m roofline.rehearse"
_GIB = 2**30


def main(argv: Sequence[str] | None = None) -> None:
    """Compile, read, compare, print."""
    given = sys.argv[1:] if argv is None else list(argv)
    with user_errors(debug="--debug" in given):
        options, words = _parser().parse_known_args(given)
        config = parse_args(words, prog=PROG, description=__doc__ or "").config
        report = rehearse(config, options)
        if options.json:
            print(json.dumps(report))


def rehearse(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """The report as plain values.

    Raises:
        UserError: what is asked for does not exist, does not go together or does not fit.
    """
    hardware = None if options.hardware == HOST else datasheet(options.hardware)
    console = Console(stderr=options.json, highlight=False, soft_wrap=True, record=True)
    stage = make_stage(config, options.hardware, options.devices)
    executables = []
    for phase in [Phase(name) for name in options.phases or PHASES]:
        with console.status(f"compiling {phase} for {options.devices} x {options.hardware}"):
            executables.append(compile_program(stage.program(phase)))
        print_program(executables[-1], hardware, console)
    totals = device_bytes(stage, executables)
    print_totals(totals, hardware, console)
    if hardware is not None:
        _check_fits(stage, executables, totals, hardware)
    report = {
        "hardware": options.hardware,
        "devices": options.devices,
        "compiled_not_run": True,
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "parameters": stage.model.num_parameters,
        "bytes_per_device": totals,
        "programs": to_json(executables, hardware),
    }
    if options.out is not None:
        title = (
            f"# Compiled, not run: {stage.model.num_parameters / 1e9:.2f}e9 parameters for "
            f"{options.devices} x {options.hardware}, {date.today()}"
        )
        used = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
        told = f"{used}; no device was there, so every time is a prediction."
        text = "\n".join([title, "", told, "", "```", console.export_text().rstrip(), "```", ""])
        options.out.with_suffix(".md").write_text(text, encoding="utf-8")
        encoded = json.dumps(report, indent=1) + "\n"
        options.out.with_suffix(".json").write_text(encoded, encoding="utf-8")
    return report


def make_stage(config: Config, hardware: str, devices: int) -> Stage:
    """Model and meshes of the run on described devices.

    Raises:
        UserError: the meshes need more devices than there are.
    """
    meshes = make_meshes(config.mesh, target_devices(hardware, devices))
    return Stage(
        config=config, subject=_subject(config), learner_mesh=meshes[0], rollout_mesh=meshes[1]
    )


def device_bytes(stage: Stage, executables: Sequence[Executable]) -> dict[str, int]:
    """Most bytes on a device of each lane: what stays, and the largest program of the lane beside it.
    Colocated lanes share devices and may run at the same time: both."""
    resident = stage.resident
    extra = {
        lane: max([one.extra for one in executables if one.program.lane == lane], default=0)
        for lane in resident
    }
    totals = {lane: resident[lane] + extra[lane] for lane in resident}
    return {"shared": sum(totals.values())} if stage.config.mesh.colocated else totals


def _check_fits(
    stage: Stage, executables: Sequence[Executable], totals: dict[str, int], hardware: Hardware
) -> None:
    for lane, needed in totals.items():
        if needed > hardware.hbm_bytes:
            raise UserError(
                f"the {lane} devices need {needed / _GIB:.1f} GiB, but {hardware.name} has "
                f"{hardware.hbm_bytes / _GIB:.1f} GiB; {_remedy(stage, executables, totals, hardware)}"
            )


def _remedy(
    stage: Stage, executables: Sequence[Executable], totals: dict[str, int], hardware: Hardware
) -> str:
    """The nearest choice that should fit: planned memory, in the proportion that the compiler needed."""
    planned = _planned(stage)
    measured = max(totals.values()) / max(planned.values())
    for words, config in _smaller(stage.config):
        needed = measured * max(_planned(replace(stage, config=config)).values())
        if needed <= hardware.hbm_bytes:
            return f"by the plan it fits with {words}"
    return (
        "by the plan no smaller batch fits: shard over more devices (mesh.*), or take larger ones"
    )


def _planned(stage: Stage) -> dict[str, int]:
    """`device_bytes` as planned, without compiling."""
    resident = stage.resident
    programs = [stage.program(phase) for phase in PHASES]
    extra = {
        lane: max(sum(p.memory.values()) - p.resident for p in programs if p.lane == lane)
        for lane in resident
    }
    totals = {lane: resident[lane] + extra[lane] for lane in resident}
    return {"shared": sum(totals.values())} if stage.config.mesh.colocated else totals


def _smaller(config: Config) -> Iterator[tuple[str, Config]]:
    """The configuration with one size changed, nearest first, then with two."""
    alone: list[tuple[str, Config]] = []
    if config.model.remat == "none":
        changed = replace(config, model=replace(config.model, remat="block"))
        alone.append(("--model.remat block", changed))
    for section, name, least in (
        ("train", "rows_per_microbatch", config.mesh.learner_data * config.mesh.learner_fsdp),
        ("train", "logprob_chunk_tokens", 256),
        ("rollout", "slots", config.mesh.rollout_data),
    ):
        part = getattr(config, section)
        value = getattr(part, name) // 2
        while value >= least and value % least == 0:
            changed = replace(config, **{section: replace(part, **{name: value})})
            alone.append((f"--{section}.{name} {value}", changed))
            value //= 2
    yield from alone
    if config.model.remat == "none":
        words, blocks = alone[0]
        yield from ((f"{words} {more}", changed) for more, changed in _smaller(blocks))


def _subject(config: Config) -> build.Subject:
    """The run's model; of a checkpoint that is not here, the architecture of its name."""
    path = config.model.path
    if path is None or (path / "config.json").is_file():
        return build.make_subject(config)
    stand_in = make_task(TaskConfig(), config.run.seed)
    return build.Subject(
        task=stand_in, model=find_model(str(path), 0), tokenizer=CharTokenizer("0123456789")
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("--hardware", default="h200", help=f"{HOST}, or one of {', '.join(target_names())}")
    add("--devices", type=int, default=8, help="of the node (default: 8)")
    add("--phases", nargs="+", choices=[p.value for p in PHASES], help="only these")
    add("--json", action="store_true", help="machine-readable output")
    add("--out", type=Path, help="write the tables to this file's .md and the JSON to its .json")
    return parser


if __name__ == "__main__":
    main()
