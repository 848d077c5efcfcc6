"""What grows with the size of a run, and what must not: python -m benchmarks.growth

    rollout   seconds per token with 64 to 4,096 prompts in the queue: flat
    memory    resident memory of the process over whole synchronous steps of every part of a run: flat
    learner   seconds per token of an optimizer step on 1 to 16 micro-batches: flat
    compile   seconds to compile each program at 2 to 32 layers: flat where layers are scanned (training,
              scoring, prefill). Decode unrolls its layers, because a scan would copy weights and cache in
              every step: it grows, and the table says by how much per layer
Small models: with them the host's share of the time, which is what could grow, is largest.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import record
from benchmarks.gpu.cases import TINY
from benchmarks.gpu.grpo import Step
from benchmarks.gpu.measure import Stopwatch
from benchmarks.gpu.phases import Bench, submit
from jaxrl.learner.steps import score
from jaxrl.rollout.sampling import decode_chunk, empty_slots
from jaxrl.types import Snapshot
from models.config import ModelConfig
from models.decoder import abstract_decoder, prefill
from models.fused import split_layers
from roofline.machine import keep_freed_memory

FLAT, FLAT_MEMORY = 1.10, 1.02
"""Largest over smallest that counts as flat: times, and memory after the first fifth of the steps."""
QUEUES = (64, 256, 1024, 4096)
MICROBATCHES = (1, 2, 4, 8, 16)
LAYERS, COMPILATIONS = (2, 8, 32), 3
PROMPT, NEW, SLOTS = 8, 32, 64
ROW_TOKENS, ROWS, SEQUENCE = 256, 8, 64
MODEL = ModelConfig(
    family="qwen3", vocab_size=256, width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_size=16,
    ffw_size=192, max_positions=512, norm_eps=1e-6, qk_norm=True,
)  # fmt: skip
SCALE = dataclasses.replace(
    TINY, models={"small": MODEL}, packed=((ROWS, ROW_TOKENS),), sequence=SEQUENCE,
    chunk_tokens=ROWS * ROW_TOKENS, chunk_steps=16,
)  # fmt: skip
Row = dict[str, Any]


def rollout(bench: Bench, repeats: int) -> list[Row]:
    """Seconds per token, from the first submission to the last completion."""
    engine = bench.engine(slots=SLOTS, prompt_tokens=PROMPT, new_tokens=NEW, observer=Stopwatch())
    snapshot, stream = Snapshot(version=0, policy=bench.policy(jnp.float32)), 0

    def once(queued: int) -> float:
        nonlocal stream
        prompts = bench.prompts(queued, PROMPT)
        began = time.perf_counter()
        submit(engine, prompts, group=1, new=NEW, stream=stream)
        stream += queued
        while not engine.is_idle:
            engine.run_chunk(snapshot)
        return (time.perf_counter() - began) / (queued * NEW)

    return _repeated(QUEUES, once, repeats)


def learner(bench: Bench, repeats: int) -> list[Row]:
    """Seconds per token of whole optimizer steps."""
    trained, batch = bench.learner(Stopwatch(), remat=False), bench.batch(ROWS, ROW_TOKENS)

    def once(count: int) -> float:
        began = time.perf_counter()
        trained.update([batch] * count)
        jax.block_until_ready(trained.state)
        return (time.perf_counter() - began) / (count * ROWS * ROW_TOKENS)

    return _repeated(MICROBATCHES, once, repeats)


def _repeated(sizes: Sequence[int], once: Callable[[int], float], repeats: int) -> list[Row]:
    """Medians by size; the rounds go through all sizes in turn, after one that compiles."""
    times = [[once(size) for size in sizes] for _ in range(repeats + 1)][1:]
    return [
        {"size": size, "seconds": record.spread([of_round[i] for of_round in times])}
        for i, size in enumerate(sizes)
    ]


def memory(steps: int, points: int = 20) -> list[Row]:
    """Resident bytes after some of the steps of rollout, verification, packing, training, publication."""
    rows: list[Row] = []
    with closing(Step(Bench(scale=TINY, name="tiny"), 0)) as run:
        for step in range(1, steps + 1):
            run.once()
            run.spans.clear()  # the benchmark's own
            if step % max(1, steps // points) == 0:
                rows.append({"size": step, "bytes": resident_bytes()})
    return rows


def resident_bytes() -> int:
    """Memory of this process, proc(5) VmRSS [bytes]."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return 1024 * int(line.split()[1])


def compile_times(layers: tuple[int, ...]) -> list[Row]:
    """Seconds to trace, lower and compile each program, by layers: medians of COMPILATIONS, one before."""
    found: dict[int, list[dict[str, float]]] = {count: [] for count in layers}
    for count in (layers[0], *layers * COMPILATIONS):
        config = dataclasses.replace(MODEL, num_layers=count)
        bench = Bench(scale=dataclasses.replace(SCALE, models={"small": config}), name="small")
        found[count].append(_programs(bench))
        jax.clear_caches()
    found[layers[0]] = found[layers[0]][1:]
    return [
        {"size": n, "seconds": {p: statistics.median(t[p] for t in times) for p in times[0]}}
        for n, times in found.items()
    ]


def _programs(bench: Bench) -> dict[str, float]:
    policy, forward = abstract_decoder(bench.model), bench.forward(remat=False)
    batch = bench.batch(ROWS, ROW_TOKENS)
    tokens, layers = jax.ShapeDtypeStruct((4, 64), jnp.int32), jax.eval_shape(split_layers, policy)
    slots = jax.eval_shape(
        partial(
            empty_slots, bench.model, num_slots=4, max_tokens=64, num_stop_ids=1,
            cache_dtype=jnp.dtype("float32"), attention="blocks",
        )
    )  # fmt: skip
    programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "score": (lambda p, b: score(p, b, forward)[0], (policy, batch)),
        "gradient": (jax.grad(lambda p, b: score(p, b, forward)[0].sum()), (policy, batch)),
        "prefill": (partial(prefill, dtype=jnp.float32), (policy, tokens)),
        "decode": (
            partial(decode_chunk, steps=4, dtype=jnp.dtype("float32"), filtered=False, greedy=False),
            (policy, layers, slots, jax.ShapeDtypeStruct((), jnp.int32)),
        ),
    }  # fmt: skip
    seconds = {}
    for name, (function, arguments) in programs.items():
        began = time.perf_counter()
        jax.jit(function).lower(*arguments).compile()
        seconds[name] = time.perf_counter() - began
    return seconds


def growth(rows: Sequence[Row]) -> float:
    """Largest over smallest median of seconds."""
    medians = [row["seconds"]["median"] for row in rows]
    return max(medians) / min(medians)


def findings(content: dict[str, Any]) -> list[list[str]]:
    """What was asked, what was found, whether it holds."""
    compiled, late = content["compile"], content["memory"][len(content["memory"]) // 5 :]
    held = statistics.median(r["bytes"] for r in late[-3:]) / statistics.median(
        r["bytes"] for r in late[:3]
    )
    found = [
        (f"rollout seconds per token, {QUEUES[0]} to {QUEUES[-1]:,} queued prompts",
         growth(content["rollout"]), FLAT),
        (f"learner seconds per token, {MICROBATCHES[0]} to {MICROBATCHES[-1]} micro-batches",
         growth(content["learner"]), FLAT),
        (f"resident memory, steps {late[0]['size']} to {late[-1]['size']:,}", held, FLAT_MEMORY),
    ]  # fmt: skip
    for name in compiled[0]["seconds"]:
        ratio = compiled[-1]["seconds"][name] / compiled[0]["seconds"][name]
        what = f"compile time of {name}, {compiled[0]['size']} to {compiled[-1]['size']} layers"
        found.append((what, ratio, FLAT))
    return [
        [what, f"{ratio:.3f}", f"{limit:.2f}", "holds" if ratio <= limit else "does not hold"]
        for what, ratio, limit in found
    ]


def report(content: dict[str, Any]) -> str:
    """The verdicts and the tables they come from."""
    head = ["measure", "largest / smallest", "flat up to", ""]
    times = [
        [f"{part}, {row['size']:,}", f"{1e6 * row['seconds']['median']:.2f} us per token"]
        for part in ("rollout", "learner")
        for row in content[part]
    ]
    times += [
        [f"compile {name}, {row['size']} layers", f"{seconds:.2f} s"]
        for row in content["compile"]
        for name, seconds in row["seconds"].items()
    ]
    times += [
        [f"memory, step {row['size']:,}", f"{row['bytes'] / 2**20:.1f} MiB"]
        for row in content["memory"]
    ]
    return (
        f"# What grows with a run\n\n{record.table(head, findings(content))}\n\n"
        f"Memory: last three against first three points after the first fifth.\n\n"
        f"{record.table(['', ''], times)}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth")
    parser.add_argument("--steps", type=int, default=1000, help="of the memory measurement")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args(argv)
    made = record.provenance()
    keep_freed_memory()
    bench = Bench(scale=SCALE, name="small")
    content = {
        "provenance": made,
        "compile": compile_times(LAYERS),
        "rollout": rollout(bench, options.repeats),
        "learner": learner(bench, options.repeats),
        "memory": memory(options.steps),
    }
    record.write("growth", content, report(content), options.out)


if __name__ == "__main__":
    main()
