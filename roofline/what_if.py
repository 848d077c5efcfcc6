"""`python -m roofline.predict`: what one phase should take on some hardware, before anything runs.

python -m roofline.predict --model qwen3-1.7b --hardware h100-80gb-sxm --devices 8 --phase decode
    --batch 256 --kv-len 2048 --parallel.tensor 2 [--sweep batch=1..1024] [--json] [--svg FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from roofline.answer import GIB, Answer, answer
from roofline.choose import (
    VOCABULARY,
    find_hardware,
    find_model,
    measured_vocabulary,
    report_errors,
)
from roofline.hardware import Hardware
from roofline.names import meant
from roofline.phases import Phase
from roofline.predict import Prediction
from roofline.question import PHASES, SWEEPABLE, Question, parse_sweep, resized
from roofline.settings import read_settings
from roofline.svg import curves, si

COLUMNS_BESIDE_BAR = 74
AXES = ("tensor", "fsdp", "expert", "pipeline", "data")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and print; errors a user can mend end with exit code 2."""
    options = _parser().parse_args(argv)
    report_errors(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    question = _question(options)
    console = Console()
    if options.sweep is None:
        if options.svg:
            raise ValueError(f"--svg {options.svg} draws a sweep; add --sweep batch=1..1024")
        seen = answer(question)
        if options.json:
            print(json.dumps({"question": dataclasses.asdict(question), **seen.to_json()}))
        else:
            _print_answer(question, seen, console)
        return
    name, values = parse_sweep(options.sweep)
    answers: dict[int, Answer | str] = {}
    for value in values:
        try:
            answers[value] = answer(resized(question, {name: value}))
        except ValueError as error:
            answers[value] = str(error)
    found = {value: seen for value, seen in answers.items() if isinstance(seen, Answer)}
    if not found:
        raise ValueError(f"no {name} of {options.sweep!r} works; the first: {answers[values[0]]}")
    if options.svg:
        options.svg.write_text(sweep_svg(name, found), encoding="utf-8")
    if options.json:
        rows = [
            {name: value, **(seen.to_json() if isinstance(seen, Answer) else {"error": seen})}
            for value, seen in answers.items()
        ]
        print(json.dumps(rows))
    else:
        _print_sweep(question, name, answers, console)


def sweep_svg(name: str, answers: dict[int, Answer]) -> str:
    """Expected time and both bounds over the swept size [ms]."""
    pick: dict[str, Callable[[Prediction], float]] = {
        "expected [ms]": lambda p: p.expected_s,
        "lower bound [ms]": lambda p: p.lower_s,
        "upper bound [ms]": lambda p: p.upper_s,
    }
    return curves(
        {
            label: [(value, 1e3 * of(seen.prediction)) for value, seen in answers.items()]
            for label, of in pick.items()
        },
        name,
    )


def _question(options: argparse.Namespace) -> Question:
    counted = (
        *AXES, "batch", "kv_len", "tokens", "steps", "chunk_tokens", "devices", "nodes",
        "microbatches", "vocab_size",
    )  # fmt: skip
    for name in counted:
        value = getattr(options, name)
        if value is not None and value < 1:
            option = f"parallel.{name}" if name in AXES else name.replace("_", "-")
            raise ValueError(f"--{option}={value} must be >= 1")
    vocab_size, dtype = _of_run(Path(options.model))
    model = find_model(options.model, options.vocab_size or vocab_size)
    hardware, dtype = find_hardware(options.hardware), options.dtype or dtype
    if dtype not in hardware.peak_flops_per_s:
        known = sorted(hardware.peak_flops_per_s)
        raise ValueError(
            f"--dtype={dtype}: {hardware.name} has no peak for it{meant(dtype, known)} It has "
            f"{', '.join(known)}"
        )
    asked = Question(
        model=model, hardware=hardware, phase=Phase(options.phase), batch=options.batch, kv_len=options.kv_len,
        tokens=options.tokens, steps=options.steps, data=options.data or 1, fsdp=options.fsdp,
        tensor=options.tensor, expert=options.expert, pipeline=options.pipeline, nodes=options.nodes or 0,
        microbatches=options.microbatches or 0, dtype=dtype, remat=options.remat,
        chunk_tokens=options.chunk_tokens,
    )  # fmt: skip
    if options.devices is None:
        return asked
    if options.data is None:
        return resized(asked, {"devices": options.devices})
    if options.devices != asked.placement.devices:
        named = "data * fsdp * tensor" + (" * pipeline" if options.pipeline > 1 else "")
        raise ValueError(
            f"--devices={options.devices}, but {named} = {asked.placement.devices}; give one of the two"
        )
    return dataclasses.replace(asked, devices=options.devices)


def _of_run(folder: Path) -> tuple[int, str]:
    """Vocabulary and type of the products of a run in that folder, or what is usual."""
    if not (folder / "config.yaml").is_file():
        return VOCABULARY, "bfloat16"
    settings, vocab_size = read_settings(str(folder)), None
    if (folder / "hardware.json").is_file():
        vocab_size = measured_vocabulary(Hardware.load(folder / "hardware.json"), settings)
    return vocab_size or VOCABULARY, settings.model.dtype


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m roofline.predict",
        description="Predicted time of one phase of a run, and what binds it.",
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="name, config.json of Hugging Face, or run folder")
    add("--hardware", required=True, help="datasheet name, hardware JSON, run folder, or 'this'")
    add("--phase", default="decode", choices=[phase.value for phase in PHASES])
    add("--devices", type=int, help="all devices; data = devices / (tensor * fsdp * pipeline)")
    add("--parallel.tensor", dest="tensor", type=int, default=1, help="tensor parallel devices")
    add("--parallel.fsdp", dest="fsdp", type=int, default=1, help="devices sharing the weights")
    add(
        "--parallel.expert",
        dest="expert",
        type=int,
        default=1,
        help="of the data * fsdp devices, how many the experts are dealt to",
    )
    add("--parallel.pipeline", dest="pipeline", type=int, default=1, help="pipeline stages")
    add("--microbatches", type=int, help="of a replica's rows in a pipeline (default: 4 per stage)")
    add(
        "--nodes",
        type=int,
        help="nodes that share the devices (default: the fewest that hold them)",
    )
    add("--parallel.data", dest="data", type=int, help="replicas")
    add("--batch", type=int, default=1, help="sequences, prompts or packed rows, all devices")
    add("--kv-len", type=int, default=1024, help="cached tokens that a decode step reads")
    add("--tokens", type=int, default=1024, help="tokens of a prompt or of a packed row")
    add("--steps", type=int, default=1, help="decode steps in one program")
    add(
        "--dtype",
        help="type of products, rollout weights and cache (default: a run's own, else bfloat16)",
    )
    add("--remat", default="none", choices=["none", "block"], help="what backward recomputes")
    add("--chunk-tokens", type=int, default=4096, help="tokens whose logits exist at once")
    add(
        "--vocab-size",
        type=int,
        help=f"of a policy from scratch (default: what its run measured, else {VOCABULARY})",
    )
    add("--sweep", metavar="NAME=A..B", help=f"one of {', '.join(SWEEPABLE)}; or NAME=1,8,64")
    add("--svg", type=Path, help="write the sweep's curves to this file")
    add("--json", action="store_true", help="machine-readable output")
    return parser


def _print_answer(question: Question, seen: Answer, console: Console) -> None:
    p, hardware = seen.prediction, question.hardware
    mesh = f"data {question.data} x fsdp {question.fsdp} x tensor {question.tensor}"
    mesh += f" x pipeline {question.pipeline}" if question.pipeline > 1 else ""
    mesh += f", experts over {question.expert}" if question.expert > 1 else ""
    known = f"calibrated {hardware.date}" if hardware.calibrated else "datasheet"
    where = f"{seen.placement.devices} x {hardware.name}"
    if seen.placement.nodes > 1:
        where += f" on {seen.placement.nodes} nodes of {seen.placement.per_node}"
    console.print(f"{question.phase} on {where} ({known}), {mesh}")
    table = Table(box=None, pad_edge=False, show_header=False)
    held = ", ".join(f"{k.replace('_', ' ')} {v / GIB:.3g}" for k, v in seen.memory_bytes.items())
    rows = [
        ("expected", f"{si(p.expected_s, 's')}, bound by {p.bound}"),
        ("tuned kernels", _interval(seen)),
        ("bound", f"{si(p.lower_s, 's')} if all overlaps, {si(p.upper_s, 's')} if nothing does"),
        ("parts", f"compute {si(p.compute_s, 's')}, memory {si(p.memory_s, 's')}, link "
                  f"{si(p.link_s, 's')}, fixed {si(p.overhead_s, 's')}"),
        ("work per device", f"{si(seen.cost.flops, 'flop')}, {si(seen.cost.hbm_bytes, 'B')}, sends "
                            f"{si(seen.cost.link_bytes, 'B')} in {seen.cost.collectives} collectives"),
        ("intensity", f"{seen.intensity:.3g} flop/B; memory binds below "
                      f"{seen.critical_intensity:.3g}"),
        ("MFU, MBU", f"{seen.mfu:.1%}, {seen.mbu:.1%}"),
        ("tokens", f"{si(seen.tokens_per_s)}/s" if seen.tokens_per_s else "-"),
        ("memory per device", f"{sum(seen.memory_bytes.values()) / GIB:.3g} of "
                              f"{hardware.hbm_bytes / GIB:.1f} GiB: {held}"),
    ]  # fmt: skip
    if question.pipeline > 1:
        turns = seen.turns
        rows.insert(3, ("pipeline", f"{turns.microbatches} micro-batches in {turns.turns} turns, "
                        f"idle {turns.idle:.1%}; between stages {si(seen.hops_s, 's')}"))  # fmt: skip
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_sweep(
    question: Question, name: str, answers: dict[int, Answer | str], console: Console
) -> None:
    width = max(8, console.width - COLUMNS_BESIDE_BAR)
    longest = max(a.prediction.expected_s for a in answers.values() if isinstance(a, Answer))
    table = Table(title=f"{question.phase} on {question.hardware.name}", box=None, pad_edge=False)
    for column in (name, "expected", "bound", "binds", "MFU", "MBU", "tokens/s", "GiB"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("expected time", overflow="fold")
    for value, seen in answers.items():
        if isinstance(seen, str):
            table.add_row(str(value), *["-"] * 7, seen.partition(";")[0])
            continue
        p = seen.prediction
        table.add_row(
            str(value), si(p.expected_s, "s"), si(p.lower_s, "s"), p.bound, f"{seen.mfu:.1%}",
            f"{seen.mbu:.1%}", si(seen.tokens_per_s),
            f"{sum(seen.memory_bytes.values()) / GIB:.2f}",
            "#" * max(1, round(width * p.expected_s / longest)),
        )  # fmt: skip
    console.print(table)


def _interval(seen: Answer) -> str:
    if seen.tuned_s is None:
        return "-"
    expected, low, high = (si(value, "s") for value in seen.tuned_s)
    return f"{expected}, 90 % between {low} and {high} (trainers' and servers' operators)"
