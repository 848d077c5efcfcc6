"""Decode steps on completions with a long tail: slots that refill against batches that wait.

    python -m benchmarks.slot_refill

Pure counting with the real engine and a tiny model: every sample has a length of its own, lognormal
with the longest 10 times the median. Counted are decode steps and slot-steps (steps x slots decoded); ideal
is one slot-step per token and, for steps, the larger of tokens / slots and the longest sample. The other
side: fixed batches of as many rows as there are slots, each until its slowest row ends. Few samples (--samples
256) show what the last ones cost, which decode on fewer slots or, with --all-slots, do not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import record
from benchmarks.systems.checkpoint import model_config
from benchmarks.workload import SHAPES, random_prompts, tail_lengths
from jaxrl.observe import Observer
from jaxrl.rollout.engine import Request, RolloutEngine, SamplingParams
from jaxrl.types import Snapshot
from models.decoder import Decoder
from models.sharding import make_mesh

PROMPT_TOKENS, GROUP = 8, 8
LONGEST_CHUNK, NEVER = 64, 1e6


class StepCounter(Observer):
    """Counts what every decode call really did."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.slot_steps = 0
        self.tokens = 0
        self.calls = 0

    @contextmanager
    def decode(self, *, version: int) -> Iterator[dict[str, int]]:
        """Add the call's counts."""
        work: dict[str, int] = {}
        yield work
        self.calls += 1
        self.steps += work["steps"]
        self.slot_steps += work["steps"] * work["slots"]
        self.tokens += work["tokens"]


def count(
    lengths: Sequence[int], *, slots: int, chunk_steps: int, refill_cost_steps: float, narrow: bool
) -> StepCounter:
    """Decode every length through `slots` slots."""
    config, counter = model_config(SHAPES["tiny"]), StepCounter()
    engine = RolloutEngine(
        config, make_mesh(jax.devices()[:1]), num_slots=slots, max_prompt_tokens=PROMPT_TOKENS,
        max_new_tokens=max(lengths), chunk_steps=chunk_steps, refill_cost_steps=refill_cost_steps,
        num_stop_ids=1, dtype=jnp.dtype("float32"), seed=0, observer=counter, narrow_tail=narrow,
    )  # fmt: skip
    prompts = random_prompts(-(-len(lengths) // GROUP), PROMPT_TOKENS, config.vocab_size, 0)
    for i, length in enumerate(lengths):
        params = SamplingParams(max_new_tokens=length, stop_ids=())
        engine.submit(
            Request(
                stream=i // GROUP, prompt=tuple(prompts[i // GROUP]), sample_indices=(i % GROUP,),
                params=params,
            )
        )  # fmt: skip
    snapshot = Snapshot(version=0, policy=Decoder(config, jax.random.key(0)))
    finished = 0
    while not engine.is_idle:
        finished += sum(len(c.tokens) for _, c in engine.run_chunk(snapshot))
    assert finished == counter.tokens == sum(lengths), (finished, counter.tokens, sum(lengths))
    return counter


def facts(
    name: str, lengths: Sequence[int], slots: int, *, steps: int, slot_steps: int, calls: int
) -> dict[str, Any]:
    """Counts beside the ideal."""
    tokens = sum(lengths)
    ideal = ideal_steps(lengths, slots)
    return {
        "way": name,
        "steps": steps,
        "calls": calls,
        "ideal_steps": ideal,
        "steps_over_ideal": steps / ideal,
        "slot_steps_per_token": slot_steps / tokens,
        "steps_per_call": steps / calls,
    }


def ideal_steps(lengths: Sequence[int], slots: int) -> int:
    """The larger of all tokens over all slots and the longest sample."""
    return max(-(-sum(lengths) // slots), max(lengths))


def main(argv: Sequence[str] | None = None) -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slot_refill")
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--median", type=int, default=16, help="tokens")
    parser.add_argument("--ratio", type=float, default=10.0, help="longest / median")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--costs", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--all-slots", action="store_true", help="the last samples too")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args(argv)
    made = record.provenance(timed=False)  # counts of steps
    lengths = tail_lengths(options.samples, median=options.median, ratio=options.ratio, seed=1)
    slots, narrow = options.slots, not options.all_slots
    batches = [lengths[i : i + slots] for i in range(0, len(lengths), slots)]
    waiting = sum(map(max, batches))
    rows = [
        facts(f"batches of {slots} that wait for their slowest", lengths, slots, steps=waiting,
              slot_steps=waiting * slots, calls=len(batches))
    ]  # fmt: skip
    ways = [(f"refilled every {chunk} steps", chunk, NEVER) for chunk in options.chunks]
    ways += [
        (f"refilled once idle slots have cost {cost} steps", LONGEST_CHUNK, cost)
        for cost in options.costs
    ]
    for name, chunk, cost in ways:
        seen = count(lengths, slots=slots, chunk_steps=chunk, refill_cost_steps=cost, narrow=narrow)
        rows.append(
            facts(name, lengths, slots, steps=seen.steps, slot_steps=seen.slot_steps,
                  calls=seen.calls)
        )  # fmt: skip
    head = ["way", "decode steps", "over ideal", "slot-steps per token", "steps per call"]
    cells = [
        [r["way"], f"{r['steps']:,}", f"{r['steps_over_ideal']:.2f}",
         f"{r['slot_steps_per_token']:.2f}", f"{r['steps_per_call']:.1f}"]
        for r in rows
    ]  # fmt: skip
    markdown = (
        f"# Refilling slots on a 10x tail\n\n{len(lengths)} samples, {sum(lengths):,} tokens, median "
        f"{options.median}, longest {max(lengths)}, {slots} slots; ideal: {ideal_steps(lengths, slots):,} "
        f"steps. Counts, not times; they repeat exactly.\n\n{record.table(head, cells)}"
    )
    content = {"provenance": made, "lengths": lengths, "rows": rows}
    record.write("slot_refill", content, markdown, options.out)


if __name__ == "__main__":
    main()
