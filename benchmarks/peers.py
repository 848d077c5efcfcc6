"""jaxrl beside other systems on one machine: python -m benchmarks.peers (or make bench-peers).

Every system runs in a process of its own, loads the same random checkpoint and gets the same prompts
and lengths. All processes are started, warmed up and compiled first; then, round after round, each
measures once while the others wait, after a pause. The order turns by one per round. Two scenarios:

    fixed   P prompts x G samples, 32 + 64 tokens each: rollout tokens/s, seconds of a train step
    tail    P x G completions whose longest is 10 times the median: useful tokens/s

P, G and the number of rounds depend on --size (AMOUNTS). At the end every process's own peak memory is read.

Systems whose environment is not there are skipped with a word; `make peers` makes both.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.peers_report import report, summarise
from benchmarks.workload import SHAPES, Workload, random_prompts, tail_lengths

ENVIRONMENTS = {
    "jaxrl": sys.executable,
    "trl": ".venv-peers/bin/python",
    "transformers": ".venv-peers/bin/python",
    "transformers_cb": ".venv-peers/bin/python",
    "ctranslate2": ".venv-peers/bin/python",
    "tunix": ".venv-tunix/bin/python",
}
WITH_PEAK = ("jaxrl", "transformers")


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much one size measures, so that a round of all systems takes about a minute on two cores."""

    prompts: int
    group: int
    tail_slots: int
    microbatch: int
    jaxrl_microbatch: int = 8
    rounds: int = 7
    warmup: int = 2


AMOUNTS = {
    "tiny": Amount(prompts=32, group=8, tail_slots=64, microbatch=64),
    "3m": Amount(prompts=32, group=8, tail_slots=64, microbatch=64),
    "20m": Amount(
        prompts=8, group=8, tail_slots=16, microbatch=16, jaxrl_microbatch=16, rounds=5, warmup=1
    ),
    "80m": Amount(
        prompts=4, group=4, tail_slots=8, microbatch=8, jaxrl_microbatch=8, rounds=3, warmup=1
    ),
}
"""By size; the command line wins."""
PROMPT_SEED, TAIL_SEED = 0, 1
SETTLE_S = 1.0
"""Pause before each measurement: OpenMP's threads spin for 0.2 s after a system's last product
(KMP_BLOCKTIME of the LLVM and Intel runtimes), and would take a core from the next system."""


@dataclass(kw_only=True)
class Worker:
    """The process of one system."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    hello: dict[str, Any] = field(default_factory=dict)

    def read(self) -> dict[str, Any]:
        """The next answer. Raises: RuntimeError with the end of the worker's log if it died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise RuntimeError(f"the worker {self.name} ended before it answered:\n{tail}")
        return json.loads(line)

    def tell(self, command: str) -> None:
        """Send a command whose answer is read later."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.tell(command)
        return self.read()

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close() if self.process.stdin else None
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    options = _options(argv)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        made = record.provenance()
        workload = make_workload(options, Path(folder))
        workers = []
        for name in options.systems:
            python = _python(name)
            if python is None:
                print(f"{name}: skipped, {ENVIRONMENTS[name]} is not there (make peers)")
                continue
            print(f"{name}: starting and compiling", flush=True)
            worker = start(name, python, workload, Path(folder))
            stack.callback(worker.close)
            prepare(worker, workload, options)
            workers.append(worker)
        same_model(workers)
        rounds = measure(workers, workload, options)
        for worker in workers:
            worker.hello["peak_bytes"] = record.peak_bytes(worker.process.pid)
    for worker in workers:
        made["versions"] |= {
            package if package != "jax" else f"jax of {worker.name}": version
            for package, version in worker.hello["versions"].items()
        }
    content = summarise(workload, rounds, {worker.name: worker.hello for worker in workers})
    name = f"peers_{options.size}"
    record.write(name, {"provenance": made, **content}, report(content), options.out)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--size", choices=sorted(SHAPES), default="3m", help="model")
    parser.add_argument("--rounds", type=int, help="measurements of each system")
    parser.add_argument("--warmup", type=int, help="unmeasured runs of each")
    parser.add_argument("--systems", type=lambda s: s.split(","), default=list(ENVIRONMENTS))
    parser.add_argument("--scenarios", type=lambda s: s.split(","), default=["fixed", "tail"])
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--group", type=int, help="samples per prompt")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--tail-median", type=int, default=24, help="tokens")
    parser.add_argument("--tail-ratio", type=float, default=10.0, help="longest / median")
    parser.add_argument("--tail-slots", type=int, help="jaxrl's slots")
    parser.add_argument("--microbatch", type=int, help="sequences, in the train step")
    parser.add_argument("--jaxrl-microbatch", type=int, help="the same, for jaxrl: whole groups")
    parser.add_argument("--threads", type=int, default=2, help="cores every system may use")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args(argv)
    for name, usual in dataclasses.asdict(AMOUNTS[options.size]).items():
        if getattr(options, name) is None:
            setattr(options, name, usual)
    unknown = set(options.systems) - set(ENVIRONMENTS)
    if unknown:
        parser.error(f"--systems: unknown {sorted(unknown)}; known: {', '.join(ENVIRONMENTS)}")
    samples = options.prompts * options.group
    if samples % options.microbatch or options.jaxrl_microbatch % options.group:
        parser.error(
            "--microbatch must divide --prompts * --group, --jaxrl-microbatch be a multiple of --group"
        )
    return options


def make_workload(options: argparse.Namespace, folder: Path) -> Workload:
    """The workload and its checkpoint, in `folder`."""
    shape, checkpoint = SHAPES[options.size], folder / "checkpoint"
    words = [sys.executable, "-m", "benchmarks.systems.checkpoint", options.size, str(checkpoint)]
    subprocess.run(words, cwd=record.ROOT, env=_environment(options.threads), check=True)
    vocab, length = shape.vocab_size, options.prompt_tokens
    workload = Workload(
        shape=shape, checkpoint=str(checkpoint),
        prompts=random_prompts(options.prompts, length, vocab, PROMPT_SEED),
        group_size=options.group, new_tokens=options.new_tokens,
        tail_prompts=random_prompts(options.prompts, length, vocab, TAIL_SEED),
        tail_lengths=tail_lengths(
            options.prompts * options.group, median=options.tail_median,
            ratio=options.tail_ratio, seed=TAIL_SEED,
        ),
        tail_slots=options.tail_slots, microbatch=options.microbatch,
        jaxrl_microbatch=options.jaxrl_microbatch, threads=options.threads,
    )  # fmt: skip
    workload.save(folder / "workload.json")
    return workload


def _environment(threads: int) -> dict[str, str]:
    count = str(threads)
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "PYTHONPATH": str(record.ROOT),
    }  # fmt: skip


def _python(name: str) -> str | None:
    """The interpreter of a system's environment, if it is there."""
    path = record.ROOT / ENVIRONMENTS[name]
    return str(path) if path.is_file() else None


def start(name: str, python: str, workload: Workload, folder: Path) -> Worker:
    """Start a worker on `workload.threads` cores and wait until it has loaded."""
    log = folder / f"{name}.log"
    cores = sorted(os.sched_getaffinity(0))[: workload.threads]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [python, "-m", f"benchmarks.systems.{name}_system", str(folder / "workload.json")],
            cwd=folder, env=_environment(workload.threads), text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=errors,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )  # fmt: skip
    worker = Worker(name=name, process=process, log=log)
    worker.hello = worker.read()
    parameters = worker.hello.get("parameters", workload.shape.parameters)
    assert parameters == workload.shape.parameters, (name, parameters)
    return worker


def prepare(worker: Worker, workload: Workload, options: argparse.Namespace) -> None:
    """Greedy tokens, then unmeasured runs of every scenario, so that nothing compiles later; the tail first,
    which does not train."""
    if worker.name != "trl":  # it generates with the transformers that is checked itself
        worker.hello["greedy"] = worker.ask("greedy")["tokens"]
    for _ in range(options.warmup):
        for scenario in sorted(options.scenarios, key=lambda name: name != "tail"):
            answer = checked(worker, scenario, workload)
            if "rollout_peak_bytes" in answer:
                worker.hello["rollout_peak_bytes"] = answer["rollout_peak_bytes"]


def same_model(workers: Sequence[Worker]) -> None:
    """Every system completes the same prompts greedily with the same tokens."""
    seen = {w.name: w.hello["greedy"] for w in workers if "greedy" in w.hello}
    different = {name for name, tokens in seen.items() if tokens != next(iter(seen.values()))}
    assert not different, f"these systems compute another model: {different}: {seen}"


def checked(worker: Worker, scenario: str, workload: Workload) -> dict[str, Any]:
    """One measurement of one system, with its counts of tokens compared."""
    if scenario == "tail":
        answer = worker.ask("tail")
        assert answer["rollout_tokens"] == workload.tail_tokens, (worker.name, answer)
        return answer
    answer = worker.ask("step")
    assert answer["rollout_tokens"] == workload.tokens, (worker.name, answer)
    if "train_s" in answer:
        assert answer["train_tokens"] == workload.train_tokens, (worker.name, answer)
    return answer


def measure(
    workers: Sequence[Worker], workload: Workload, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Records {round, system, scenario, answer}, and the machine's matmul rate in every round."""
    records: list[dict[str, Any]] = []
    for n in range(options.rounds):
        for position in range(len(workers)):
            worker = workers[(n + position) % len(workers)]
            for scenario in options.scenarios:
                time.sleep(SETTLE_S)
                answer = checked(worker, scenario, workload)
                records.append({"round": n, "system": worker.name, "scenario": scenario, **answer})
        records += [
            {"round": n, "system": w.name, "scenario": "peak", **w.ask("peak")}
            for w in workers
            if w.name in WITH_PEAK
        ]
        print(f"round {n + 1} of {options.rounds} done", flush=True)
    return records


if __name__ == "__main__":
    main()
