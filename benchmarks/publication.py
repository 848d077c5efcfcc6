"""Does publishing weights slow decoding down? python -m benchmarks.publication

A thread decodes chunk after chunk with the newest weights while another publishes, back to back, every
optimizer step's worth of decoding (--every-s 0: as fast as it can), against the same without. The
publisher also pays for the learner's side: cast, reshard and copy. Both alternate in one run.

Engine, store and snapshots are the trainer's own; on a CPU learner and rollout share the cores.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import record
from benchmarks.systems.checkpoint import model_config
from benchmarks.workload import SHAPES, random_prompts
from jaxrl.devices import simulate_cpu_devices
from jaxrl.observe import Observer
from jaxrl.rollout.engine import Request, RolloutEngine, SamplingParams
from jaxrl.weights import WeightStore
from models.sharding import init_sharded, make_mesh

PROMPT_TOKENS, CHUNK_STEPS = 32, 8


@dataclass(kw_only=True)
class Rig:
    """A busy engine and the store it samples from."""

    engine: RolloutEngine
    store: WeightStore
    policy: object
    prompts: list[list[int]]
    new_tokens: int
    version: int = 0
    stream: int = 0
    longest_chunk_s: float = 0.0

    def decode(self, seconds: float) -> float:
        """Tokens per second of decoding for `seconds`, slots always full."""
        tokens, began = 0, time.perf_counter()
        while (now := time.perf_counter()) - began < seconds:
            while self.engine.num_free_slots:
                self._submit()
            done = self.engine.run_chunk(self.store.current())
            tokens += sum(len(completion.tokens) for _, completion in done)
            self.longest_chunk_s = max(self.longest_chunk_s, time.perf_counter() - now)
        return tokens / (time.perf_counter() - began)

    def publish_until(self, stop: threading.Event, every_s: float) -> None:
        """Publish, wait, publish."""
        while not stop.is_set():
            self.version += 1
            self.store.publish(self.version, self.policy)  # pyright: ignore[reportArgumentType]
            stop.wait(every_s)

    def _submit(self) -> None:
        params = SamplingParams(max_new_tokens=self.new_tokens, stop_ids=())
        prompt = tuple(self.prompts[self.stream % len(self.prompts)])
        self.engine.submit(
            Request(stream=self.stream, prompt=prompt, sample_indices=(0,), params=params)
        )
        self.stream += 1


def make_rig(shape: str, slots: int, new_tokens: int) -> Rig:
    """Engine and store on two devices, as the trainer places them."""
    simulate_cpu_devices(2)
    config = model_config(SHAPES[shape])
    learner, rollout = make_mesh(jax.devices()[:1]), make_mesh(jax.devices()[1:2])
    store = WeightStore(
        config, learner_mesh=learner, rollout_mesh=rollout, dtype=jnp.dtype("float32")
    )
    policy = init_sharded(config, jax.random.key(0), learner, jnp.float32)
    store.publish(0, policy)
    engine = RolloutEngine(
        config, rollout, num_slots=slots, max_prompt_tokens=PROMPT_TOKENS,
        max_new_tokens=new_tokens, chunk_steps=CHUNK_STEPS, refill_cost_steps=1.0, num_stop_ids=1,
        dtype=jnp.dtype("float32"), seed=0, observer=Observer(),
    )  # fmt: skip
    prompts = random_prompts(64, PROMPT_TOKENS, config.vocab_size, 0)
    return Rig(engine=engine, store=store, policy=policy, prompts=prompts, new_tokens=new_tokens)


def measure(rig: Rig, *, seconds: float, every_s: float) -> tuple[float, int, float]:
    """(tokens/s, publications, longest chunk [s]) with a publisher; every_s < 0: without."""
    rig.longest_chunk_s, before = 0.0, rig.version
    stop = threading.Event()
    thread = threading.Thread(target=rig.publish_until, args=(stop, every_s))
    if every_s >= 0:
        thread.start()
    rate = rig.decode(seconds)
    stop.set()
    if every_s >= 0:
        thread.join()
    return rate, rig.version - before, rig.longest_chunk_s


def main(argv: Sequence[str] | None = None) -> None:
    """Alternate with and without publication and write the ratio."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publication")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="3m")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--every-s", type=float, default=1.0, help="between publications")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args(argv)
    made = record.provenance()
    rig = make_rig(options.shape, options.slots, options.new_tokens)
    for every_s in (-1.0, 0.0):  # compile everything
        measure(rig, seconds=max(2.0, options.seconds), every_s=every_s)
    cases = {"never": -1.0, f"every {options.every_s:g} s": options.every_s, "without pause": 0.0}
    seen = {name: [] for name in cases}
    for n in range(options.rounds):
        names = list(cases) if n % 2 == 0 else list(cases)[::-1]
        for name in names:
            seen[name].append(measure(rig, seconds=options.seconds, every_s=cases[name]))
    content = {
        name: {
            "tokens_per_s": record.spread([rate for rate, _, _ in results]),
            "ratio_to_never": record.spread(
                [one[0] / never[0] for one, never in zip(results, seen["never"], strict=True)]
            ),
            "publications": sum(count for _, count, _ in results),
            "longest_chunk_ms": record.spread([1e3 * longest for _, _, longest in results]),
        }
        for name, results in seen.items()
    }
    rows = [
        [name, record.shown(c["tokens_per_s"], 0), record.shown(c["ratio_to_never"], 3),
         str(c["publications"]), record.shown(c["longest_chunk_ms"], 1)]
        for name, c in content.items()
    ]  # fmt: skip
    head = ["published", "decode tokens/s", "ratio to never", "publications", "longest chunk ms"]
    parameters = SHAPES[options.shape].parameters
    markdown = (
        f"# Decoding while weights are published\n\n{parameters / 1e6:.2f}M parameters, float32, "
        f"{options.slots} slots, {options.rounds} rounds of {options.seconds:g} s, alternating; the "
        f"ratio is within a round.\n\n{record.table(head, rows)}"
    )
    record.write(
        f"publication_{options.shape}",
        {"provenance": made, "cases": content},
        markdown,
        options.out,
    )


if __name__ == "__main__":
    main()
