"""A prompt's keys held once for all its samples, or in every slot: python -m benchmarks.shared_prefix

Both engines in one process, their rounds interleaved, on the same prompts: time of a whole rollout (prefill,
copies, decode), bytes of the caches, and what `roofline.cost` says that a decode step reads. The samples of
both are compared: greedy tokens must be equal.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import record
from benchmarks.systems.checkpoint import model_config
from benchmarks.workload import SHAPES, random_prompts
from jaxrl.observe import Observer
from jaxrl.rollout.engine import Request, RolloutEngine, SamplingParams
from jaxrl.types import Snapshot
from models.decoder import Decoder
from models.rows import PrefixRows
from models.sharding import make_mesh
from roofline import cost
from roofline.kernels import Layout
from roofline.machine import keep_freed_memory, prefer_wide_vectors

CHUNK_STEPS, REFILL_COST_STEPS = 16, 0.5
GREEDY_TOKENS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Sizes of one comparison."""

    prompt: int
    new: int
    group: int
    prompts: int
    slots: int

    @property
    def rows(self) -> int:
        """Rows of prompts: as many as are under way."""
        return self.slots // self.group


def engine_of(work: Work, size: str, *, shares: bool) -> RolloutEngine:
    """An engine that shares prompts, or one that copies them."""
    rows = PrefixRows(rows=work.rows, lanes=work.group, tokens=work.prompt) if shares else None
    return RolloutEngine(
        model_config(SHAPES[size]), make_mesh(jax.devices()[:1]), num_slots=work.slots,
        max_prompt_tokens=work.prompt, max_new_tokens=work.new, chunk_steps=CHUNK_STEPS,
        refill_cost_steps=REFILL_COST_STEPS, num_stop_ids=1, dtype=jnp.dtype("float32"), seed=0,
        observer=Observer(), prefixes=rows,
    )  # fmt: skip


def rollout(
    engine: RolloutEngine, snapshot: Snapshot, work: Work, new: int, temperature: float
) -> tuple[float, list[list[int]]]:
    """Seconds of the whole rollout, and the tokens of all samples in order."""
    params = SamplingParams(max_new_tokens=new, stop_ids=(), temperature=temperature)
    vocab = snapshot.policy.config.vocab_size
    began = time.perf_counter()
    for stream, prompt in enumerate(random_prompts(work.prompts, work.prompt, vocab, 0)):
        engine.submit(
            Request(
                stream=stream, prompt=tuple(prompt), sample_indices=tuple(range(work.group)),
                params=params,
            )
        )  # fmt: skip
    found = []
    while not engine.is_idle:
        found += engine.run_chunk(snapshot)
    seconds = time.perf_counter() - began
    found.sort(key=lambda pair: (pair[0].stream, pair[1].sample_index))
    return seconds, [done.tokens.tolist() for _, done in found]


def compare(work: Work, size: str, rounds: int) -> dict[str, Any]:
    """Times, bytes and predicted bytes of both, and their ratios."""
    engines = {
        name: engine_of(work, size, shares=name == "shared") for name in ("copies", "shared")
    }
    config = model_config(SHAPES[size])
    snapshot = Snapshot(version=0, policy=Decoder(config, jax.random.key(0)))
    greedy = [rollout(e, snapshot, work, GREEDY_TOKENS, 0.0)[1] for e in engines.values()]
    assert greedy[0] == greedy[1], "greedy tokens differ"
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds + 1):
        for name, engine in engines.items():
            times[name].append(rollout(engine, snapshot, work, work.new, 1.0)[0])
    tokens = work.prompts * work.group * work.new
    rates = {name: record.spread([tokens / s for s in found[1:]]) for name, found in times.items()}
    held = {
        name: sum(
            leaf.nbytes
            for tree in (e.slots.cache, e.slots.prefixes)
            for leaf in jax.tree.leaves(tree)
        )
        for name, e in engines.items()
    }
    rows = PrefixRows(rows=work.rows, lanes=work.group, tokens=work.prompt)
    read = {
        "copies": cost.decode(config, Layout(), work.slots, work.prompt + work.new, 1).hbm_bytes,
        "shared": cost.decode(config, Layout(), work.slots, work.new, 1, rows).hbm_bytes,
    }
    return {
        "work": dataclasses.asdict(work),
        "tokens_per_s": rates,
        "cache_bytes": held,
        "predicted_step_bytes": read,
        "speedup": rates["shared"]["median"] / rates["copies"]["median"],
        "memory_saved": held["copies"] / held["shared"],
        "bytes_saved": read["copies"] / read["shared"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shared_prefix")
    parser.add_argument("--size", choices=sorted(SHAPES), default="3m", help="model")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args(argv)
    made = record.provenance()
    prefer_wide_vectors()
    keep_freed_memory()
    found = [
        compare(
            Work(
                prompt=prompt, new=options.new_tokens, group=options.group, prompts=options.prompts,
                slots=options.slots,
            ),
            options.size, options.rounds,
        )
        for prompt in options.prompt_tokens
    ]  # fmt: skip
    head = [
        "prompt", "copies tokens/s", "shared tokens/s", "speed", "cache copies", "cache shared",
        "memory", "bytes of a step, predicted",
    ]  # fmt: skip
    cells = [
        [
            str(f["work"]["prompt"]),
            *(f"{f['tokens_per_s'][name]['median']:,.0f}" for name in ("copies", "shared")),
            f"{f['speedup']:.2f}",
            *(f"{f['cache_bytes'][name] / 2**20:.1f} MiB" for name in ("copies", "shared")),
            f"{f['memory_saved']:.2f}",
            f"{f['bytes_saved']:.2f}",
        ]
        for f in found
    ]
    markdown = (
        f"# Prompts held once for their samples\n\n{options.size}, float32, {options.slots} slots, "
        f"{options.prompts} prompts x {options.group} samples of {options.new_tokens} tokens; whole rollouts, "
        "interleaved rounds. Ratios: copies over shared, speed the other way round.\n\n"
        f"{record.table(head, cells)}"
    )
    record.write("shared_prefix", {"provenance": made, "found": found}, markdown, options.out)


if __name__ == "__main__":
    main()
