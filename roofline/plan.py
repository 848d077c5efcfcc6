"""`python -m roofline.plan`: how to split the devices between generators and learner, before anything runs.

    python -m roofline.plan --config quickstart --hardware h200 --devices 8 --model qwen3-1.7b
        [--rollout.max_new_tokens 1024 --train.row_tokens 2112] [--mean-tokens 400 --sigma 0.6 | --lengths RUN]
        [--json]

Every feasible split is predicted (`roofline.splits`); the best for the run's staleness bound is
marked, with its regret against the continuous optimum, and synchronous and asynchronous are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from models.config import ModelConfig
from roofline.choose import (
    VOCABULARY,
    find_hardware,
    find_model,
    measured_vocabulary,
    report_errors,
)
from roofline.hardware import Hardware
from roofline.job import Job
from roofline.lengths import Lengths, lognormal, measured
from roofline.phases import Phase
from roofline.progress import tracked
from roofline.settings import Settings, check_rows, model_of, read_settings
from roofline.splits import (
    Split,
    colocated,
    disjoint,
    learner_options,
    rollout_options,
    with_staleness,
)
from roofline.svg import curves, si

ASSUMED_MEAN, ASSUMED_SIGMA = 0.5, 0.6
"""Without measured lengths: mean completion over its limit, and the spread of its logarithm."""
MOST_DEVICES = 4096
"""Where the search for the smallest feasible number of devices ends."""
SHOWN = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """All feasible splits of one job on one machine, and what to choose."""

    splits: tuple[Split, ...]
    """Fastest first, under the run's own staleness bound."""
    optimum_s: float
    """Step time if devices could be split continuously and each lane scaled linearly [s]."""
    optimum_generators: float
    """Generators in that optimum."""
    synchronous: Split
    """Fastest with staleness 0."""
    asynchronous: Split
    """Fastest with the run's staleness bound, or with 1 where that is 0."""

    @property
    def best(self) -> Split:
        """Fastest under the run's own bound; of equals the least stale, then the smallest."""
        return self.splits[0]

    @property
    def regret(self) -> float:
        """Step time of the best over the continuous optimum, less 1."""
        return self.best.step_s / self.optimum_s - 1

    @property
    def speedup(self) -> float:
        """Synchronous over asynchronous step time; below 1 the synchronous run is faster."""
        return self.synchronous.step_s / self.asynchronous.step_s


def advise(job: Job, hardware: Hardware, devices: int) -> Advice:
    """Predict every feasible split of so many devices.

    Raises:
        ValueError: nothing fits; the message names the smallest number of devices that would.
    """
    bound = job.settings.rollout.max_staleness
    overlapped = _splits(job, hardware, devices, max(1, bound))
    lockstep = _splits(job, hardware, devices, 0)
    if not lockstep or not overlapped:
        raise ValueError(_nothing_fits(job, hardware, devices))
    generates, learns = _least_device_seconds(job, hardware, devices)
    return Advice(
        splits=tuple(overlapped if bound else lockstep),
        optimum_s=(generates + learns) / devices,
        optimum_generators=devices * generates / (generates + learns),
        synchronous=lockstep[0],
        asynchronous=overlapped[0],
    )


def best_split(
    model: ModelConfig,
    settings: Settings,
    hardware: Hardware,
    devices: int,
    *,
    lengths: Lengths | None = None,
) -> Split:
    """What `mesh.auto` chooses: the mesh, slots and micro-batch of the fastest feasible split.

    Raises:
        ValueError: no split of the devices fits.
    """
    job = Job(model=model, settings=settings, lengths=lengths or assumed_lengths(settings))
    return advise(job, hardware, devices).best


def assumed_lengths(settings: Settings) -> Lengths:
    """Lognormal around half the limit: what is supposed before anything was sampled."""
    limit = settings.rollout.max_new_tokens
    return lognormal(max(1.0, ASSUMED_MEAN * limit), ASSUMED_SIGMA, limit)


def _splits(job: Job, hardware: Hardware, devices: int, max_staleness: int) -> list[Split]:
    bounded = dataclasses.replace(job, settings=with_staleness(job.settings, max_staleness))
    found = colocated(bounded, hardware, devices, max_staleness)
    found += disjoint(bounded, hardware, devices, max_staleness)
    return sorted(found, key=lambda s: (s.step_s, s.staleness, s.learner_bytes + s.rollout_bytes))


def _least_device_seconds(job: Job, hardware: Hardware, devices: int) -> tuple[float, float]:
    """Device seconds per step of generation and of learning, each on its best mesh of any size."""
    sizes = (
        range(1, devices + 1) if devices <= 64 else [1 << k for k in range(devices.bit_length())]
    )
    rollouts, learners = [], []
    for n in tracked(sizes, f"meshes of up to {devices} devices"):
        rollouts += [o.steady_s * n for o in rollout_options(job, hardware, n)]
        learners += [o.seconds * n for o in learner_options(job, hardware, n)]
    return min(rollouts), min(learners)


def _nothing_fits(job: Job, hardware: Hardware, devices: int) -> str:
    model = dataclasses.replace(job.settings.model, remat="block")
    remade = dataclasses.replace(job, settings=dataclasses.replace(job.settings, model=model))
    if fits := _fewest(job, hardware, devices + 1):
        remedy = f"it fits on {fits}"
    elif remade != job and (fits := _fewest(remade, hardware, devices)):
        remedy = f"with --model.remat=block it fits on {fits}"
    else:
        remedy = (
            "it fits on no number of them: lower --train.row_tokens or --train.logprob_chunk_tokens, "
            "or take hardware with more memory"
        )
    return f"no split of {devices} x {hardware.name} holds learner and generators; {remedy}"


def _fewest(job: Job, hardware: Hardware, least: int) -> int | None:
    """The fewest devices from `least` on that hold the job, of those that are tried."""
    limit = hardware.node_devices if not hardware.network_bytes_per_s else MOST_DEVICES
    tried = least
    while tried <= limit:
        if colocated(job, hardware, tried, 0) or disjoint(job, hardware, tried, 0):
            return tried
        tried = tried + 1 if tried < 8 else (tried // 8 + 1) * 8 if tried < 64 else 2 * tried
    return None


# -- command line ----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and print; errors a user can mend end with exit code 2."""
    described = parser("python -m roofline.plan", __doc__ or "")
    add = described.add_argument
    add("--all", action="store_true", help=f"every split, not the best {SHOWN}")
    add("--svg", type=Path, help="write step time over learner devices to this file")
    options, words = described.parse_known_args(argv)
    report_errors(lambda: _run(options, words))


def parser(prog: str, doc: str, *, config: str | None = None) -> argparse.ArgumentParser:
    """Options that name a job and a machine; other words are settings (--rollout.slots=64).

    `config`: the configuration where none is given; None: one must be given.
    """
    described = argparse.ArgumentParser(
        prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options are settings of the run, such as --rollout.slots=64.",
        allow_abbrev=False,
    )  # fmt: skip
    add = described.add_argument
    named = "YAML file, a name from configs/, or a run folder"
    add("--config", required=config is None, default=config, help=named)
    add("--hardware", default="this", help="datasheet name, JSON file, run folder, or 'this'")
    add("--devices", type=int, default=8, help="all devices (default: 8)")
    add("--model", help="instead of the configuration's: name, config.json or run folder")
    add("--vocab-size", type=int, help="of a policy built from scratch (default: the calibration's "
        f"where it is for this configuration, else {VOCABULARY})")  # fmt: skip
    add("--lengths", type=Path, help="run folder whose samples.jsonl gives completion lengths")
    add("--mean-tokens", type=float, help="mean completion (default: half of its limit)")
    add("--sigma", type=float, default=ASSUMED_SIGMA, help="spread of log length (default: 0.6)")
    add("--json", action="store_true", help="machine-readable output")
    return described


def job_and_hardware(options: argparse.Namespace, words: Sequence[str]) -> tuple[Job, Hardware]:
    """The job and the machine that a command line describes.

    Raises:
        ValueError: something in it does not exist or does not go together.
    """
    settings = read_settings(options.config, words)
    check_rows(settings)
    hardware = find_hardware(options.hardware, settings)
    limit = settings.rollout.max_new_tokens
    if options.lengths is not None:
        lengths = measured(options.lengths)
    elif options.mean_tokens is not None:
        lengths = lognormal(options.mean_tokens, options.sigma, limit)
    else:
        lengths = lognormal(max(1.0, ASSUMED_MEAN * limit), options.sigma, limit)
    if options.vocab_size is not None and options.vocab_size < 1:
        raise ValueError(f"--vocab-size={options.vocab_size} must be >= 1")
    vocab_size = options.vocab_size or measured_vocabulary(hardware, settings) or VOCABULARY
    if options.model is not None:
        model = find_model(options.model, vocab_size)
    else:
        model = model_of(settings, vocab_size)
    return Job(model=model, settings=settings, lengths=lengths), hardware


def _run(options: argparse.Namespace, words: Sequence[str]) -> None:
    if options.devices < 1:
        raise ValueError(f"--devices={options.devices} must be at least 1")
    job, hardware = job_and_hardware(options, words)
    advice = advise(job, hardware, options.devices)
    if options.svg:
        options.svg.write_text(split_svg(advice), encoding="utf-8")
    if options.json:
        print(json.dumps(to_json(advice)))
        return
    console = Console()
    _print_splits(advice, hardware, console, len(advice.splits) if options.all else SHOWN)
    for line in verdict(advice, job, hardware, options.devices):
        console.print(line, markup=False, highlight=False)


def to_json(advice: Advice) -> dict[str, Any]:
    """Plain values, the best split first."""
    return {
        "optimum_s": advice.optimum_s,
        "optimum_generators": advice.optimum_generators,
        "regret": advice.regret,
        "speedup_of_asynchronous": advice.speedup,
        "synchronous": dataclasses.asdict(advice.synchronous),
        "asynchronous": dataclasses.asdict(advice.asynchronous),
        "splits": [dataclasses.asdict(split) for split in advice.splits],
    }


def verdict(advice: Advice, job: Job, hardware: Hardware, devices: int) -> list[str]:
    """What to choose and why, as sentences."""
    best = advice.best
    lines = [
        f"lengths: {job.lengths.source}; mean {job.lengths.mean:.0f} tokens",
        f"best: {describe(best)}: {si(best.step_s, 's')} per step, {si(best.samples_per_s)} samples/s",
        _regret(advice, devices),
    ]
    for fewer in _fewer(devices):
        try:
            seen = advice if fewer == devices else advise(job, hardware, fewer)
        except ValueError:
            lines.append(f"{_counted(fewer, 'device'):>12}: nothing fits")
            continue
        winner = "asynchronous" if seen.speedup > 1 else "synchronous"
        factor = max(seen.speedup, 1 / seen.speedup)
        lines.append(
            f"{_counted(fewer, 'device'):>12}: {winner} is {factor:.2f} times as fast: synchronous "
            f"{si(seen.synchronous.step_s, 's')} ({describe(seen.synchronous)}), asynchronous "
            f"{si(seen.asynchronous.step_s, 's')} ({describe(seen.asynchronous)})"
        )
    return lines


def choice(advice: Advice, job: Job, devices: int) -> list[str]:
    """The best split and why, for a run that takes it unasked."""
    best = advice.best
    generates = best.phase_s[Phase.PREFILL] + best.phase_s[Phase.DECODE]
    learns = sum(best.phase_s.values()) - generates
    lines = [
        f"mesh auto: {describe(best)}, {best.slots} slots, {best.rows_per_microbatch} rows per "
        f"micro-batch: the fastest of {len(advice.splits)} splits that fit {devices} devices",
        f"  predicted {si(best.step_s, 's')} per step, {si(best.samples_per_s)} samples/s, staleness "
        f"{best.staleness:.2f}, idle {best.idle:.0%}; {job.lengths.source}",
        f"  alone, generation takes {si(generates, 's')} of a step and learning {si(learns, 's')}",
    ]
    for name, others in (
        ("other placement", [s for s in advice.splits if _placement(s) != _placement(best)]),
        ("same placement, other sizes", [s for s in advice.splits[1:] if _placement(s) == _placement(best)]),
    ):  # fmt: skip
        if others:
            slower = others[0].step_s / best.step_s - 1
            lines.append(f"  next best, {name}: {describe(others[0])}, {slower:.1%} slower")
    return [*lines, f"  {_regret(advice, devices)}"]


def _placement(split: Split) -> tuple[bool, int]:
    return split.colocated, split.learner.devices


def _regret(advice: Advice, devices: int) -> str:
    return (
        f"continuous optimum: {si(advice.optimum_s, 's')} per step with "
        f"{advice.optimum_generators:.2f} of {devices} generating; regret {advice.regret:.1%}"
    )


def _fewer(devices: int) -> list[int]:
    """Powers of two up to `devices`, at most five, and `devices` itself."""
    powers = [1 << k for k in range(devices.bit_length()) if 1 << k < devices]
    return [*powers[-4:], devices]


def describe(split: Split) -> str:
    """One split in words."""
    generators, learner = _mesh(split, learner=False), _mesh(split, learner=True)
    if split.colocated:
        return f"colocated, generators {generators}, learner {learner}"
    counted = (
        _counted(split.rollout.devices, "generator"),
        _counted(split.learner.devices, "learner"),
    )
    return f"{counted[0]} {generators}, {counted[1]} {learner}"


def _counted(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _mesh(split: Split, *, learner: bool) -> str:
    layout = split.learner if learner else split.rollout
    middle = f"f{layout.fsdp}" if learner else ""
    return f"d{layout.data}{middle}t{layout.tensor}"


def split_svg(advice: Advice) -> str:
    """Fastest step over the number of learner devices, and the continuous optimum [ms]."""
    fastest: dict[int, float] = {}
    for split in advice.splits:
        if not split.colocated:
            at = split.learner.devices
            fastest[at] = min(fastest.get(at, split.step_s), split.step_s)
    points = sorted(fastest.items()) or [(advice.best.learner.devices, advice.best.step_s)]
    series = {
        "fastest step [ms]": [(n, 1e3 * s) for n, s in points],
        "continuous optimum [ms]": [(n, 1e3 * advice.optimum_s) for n, _ in points],
    }
    return curves(series, "learner devices")


def _print_splits(advice: Advice, hardware: Hardware, console: Console, most: int) -> None:
    table = Table(
        title=f"{len(advice.splits)} feasible splits on {hardware.name}", box=None, pad_edge=False,
        collapse_padding=True,
    )  # fmt: skip
    columns = ("", "split", "gen", "learn", "slots", "rows", "step", "samples/s", "stale", "idle",
               "GiB gen", "learn")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column == "split" else "right")
    for index, split in enumerate(advice.splits[:most]):
        table.add_row(
            "*" if index == 0 else "",
            "shared" if split.colocated
            else f"{split.rollout.devices}:{split.learner.devices}",
            _mesh(split, learner=False), _mesh(split, learner=True), str(split.slots),
            str(split.rows_per_microbatch), si(split.step_s, "s"), si(split.samples_per_s),
            f"{split.staleness:.2f}", f"{split.idle:.0%}",
            f"{split.rollout_bytes / 2**30:.2f}", f"{split.learner_bytes / 2**30:.2f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "split: generators : learners, or shared; d data, f fsdp, t tensor; rows per micro-batch"
    )


if __name__ == "__main__":
    main()
