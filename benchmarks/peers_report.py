"""The numbers and the table of `benchmarks.peers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.record import shown, spread, table
from benchmarks.workload import Workload

HOW = {
    "jaxrl": "continuous batching: each sample its own limit, {slots} slots",
    "trl": "generate inside GRPOTrainer; a stopping criterion per row, runs to the longest row",
    "transformers": "generate, dynamic cache; a stopping criterion per row, runs to the longest row",
    "transformers_cb": "continuous batching of transformers; each sample its own limit",
    "ctranslate2": "a callback ends each sample (a call into Python per token); ended samples leave the batch",
    "tunix": "vanilla sampler; runs to the longest row, useful tokens counted",
}
"""How each system ends every completion of the tail scenario at its own length."""


def summarise(
    workload: Workload,
    records: Sequence[Mapping[str, Any]],
    hellos: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Medians and spreads per system, shares of the measured matmul peak, and the raw rounds."""
    peak = max((r["flops_per_s"] for r in records if r["scenario"] == "peak"), default=0.0)
    systems = {name: _system(name, workload, records, peak) for name in hellos}
    for name, hello in hellos.items():
        trains = "train_s" in systems[name]
        systems[name]["peak_bytes"] = hello["peak_bytes"]
        systems[name]["train_peak_bytes" if trains else "rollout_peak_bytes"] = hello["peak_bytes"]
        if "rollout_peak_bytes" in hello:
            systems[name]["rollout_peak_bytes"] = hello["rollout_peak_bytes"]
    return {
        "workload": _facts(workload),
        "matmul_peak_gflops_per_s": peak / 1e9,
        "systems": systems,
        "tail_mechanism": {name: _how(name, workload) for name in systems},
        "same_greedy_tokens": sorted(name for name, hello in hellos.items() if "greedy" in hello),
        "rounds": list(records),
    }


def _how(name: str, workload: Workload) -> str:
    return HOW[name].format(slots=workload.tail_slots)


def _facts(workload: Workload) -> dict[str, Any]:
    lengths = sorted(workload.tail_lengths)
    return {
        "parameters": workload.shape.parameters,
        "dtype": "float32",
        "threads": workload.threads,
        "fixed": f"{len(workload.prompts)} prompts x {workload.group_size} samples, "
        f"{workload.prompt_tokens} + {workload.new_tokens} tokens",
        "rollout_tokens": workload.tokens,
        "train_tokens": workload.train_tokens,
        "microbatch_sequences": workload.microbatch,
        "jaxrl_microbatch_sequences": workload.jaxrl_microbatch,
        "tail_samples": len(lengths),
        "tail_tokens": workload.tail_tokens,
        "tail_median": lengths[len(lengths) // 2],
        "tail_max": lengths[-1],
        "tail_slots": workload.tail_slots,
    }


def _system(
    name: str, workload: Workload, records: Sequence[Mapping[str, Any]], peak: float
) -> dict[str, Any]:
    fixed = [r for r in records if r["system"] == name and r["scenario"] == "fixed"]
    tail = [r for r in records if r["system"] == name and r["scenario"] == "tail"]
    trained = [r for r in fixed if "train_s" in r]
    out: dict[str, Any] = {}
    if fixed:
        out["rollout_tokens_per_s"] = spread([r["rollout_tokens"] / r["rollout_s"] for r in fixed])
    if trained:
        out["train_s"] = spread([r["train_s"] for r in trained])
        out["step_s"] = spread([r["rollout_s"] + r["train_s"] for r in trained])
    if tail:
        out["tail_tokens_per_s"] = spread([r["rollout_tokens"] / r["rollout_s"] for r in tail])
    if peak:
        flops = {
            "rollout": workload.rollout_flops() / workload.tokens,
            "tail": workload.tail_flops() / workload.tail_tokens,
        }
        out["share_of_peak"] = {
            key: flops[key] * out[f"{key}_tokens_per_s"]["median"] / peak
            for key in flops
            if f"{key}_tokens_per_s" in out
        }
        if trained:
            out["share_of_peak"]["train"] = workload.train_flops() / out["train_s"]["median"] / peak
    return out


def report(content: Mapping[str, Any]) -> str:
    """The table, best rollout first, with what was done above and below it."""
    facts, systems = content["workload"], content["systems"]

    def number(name: str, key: str, digits: int) -> str:
        return shown(systems[name][key], digits) if key in systems[name] else "-"

    def share(name: str) -> str:
        shares = systems[name].get("share_of_peak", {})
        return " / ".join(
            f"{shares[key]:.0%}" if key in shares else "-" for key in ("rollout", "train", "tail")
        )

    def memory(name: str) -> str:
        sizes = (systems[name].get(f"{what}_peak_bytes") for what in ("rollout", "train"))
        return " / ".join("-" if size is None else f"{size / 2**30:.2f}" for size in sizes)

    head = [
        "system", "rollout tokens/s", "train step s", "rollout + train s", "tail tokens/s",
        "share of peak: rollout / train / tail", "memory GiB: rollout / with training",
    ]  # fmt: skip
    rows = [
        [name, number(name, "rollout_tokens_per_s", 0), number(name, "train_s", 2),
         number(name, "step_s", 2), number(name, "tail_tokens_per_s", 0), share(name), memory(name)]
        for name in sorted(systems, key=lambda n: -_key(systems[n]))
    ]  # fmt: skip
    beside = "\n".join(
        f"- {what}: jaxrl {ratio:.2f} times as good as the best other ({best})"
        f"{_beside_wanted(what, ratio)}"
        for what, ratio, best in ratios(systems)
    )
    how = "\n".join(f"- {name}: {text}" for name, text in content["tail_mechanism"].items())
    return (
        f"# jaxrl beside other systems: {facts['parameters'] / 1e6:.2f}M parameters, float32, "
        f"{facts['threads']} cores\n\n"
        f"The same random Qwen3-shaped checkpoint everywhere; greedy completions were equal in "
        f"{', '.join(content['same_greedy_tokens'])}. Median (min to max) of interleaved rounds; "
        f"start, loading and compilation excluded. Memory: most that the process ever held, "
        f"compilation included; of systems that train, rollout alone only where they were asked before they "
        f"trained."
        f"\n\n{table(head, rows)}\n\n{beside}\n\n"
        f"Rollout: {facts['fixed']}, sampling at temperature 1, no end token; {facts['rollout_tokens']} "
        f"generated tokens, prefill included. Train step: GRPO loss and AdamW over "
        f"{facts['train_tokens']} tokens in micro-batches of {facts['microbatch_sequences']} sequences "
        f"(jaxrl: {facts['jaxrl_microbatch_sequences']}, whose prompt stands once in front of them; TRL and "
        f"tunix are no faster at 8, 16 or 64), "
        f"after the rewards are known (jaxrl's includes packing). Peak: "
        f"{content['matmul_peak_gflops_per_s']:.0f} GFLOP/s, the best 2048^3 float32 "
        f"product of torch and XLA in any round; shares count useful work only (each "
        f"prompt once, no padding).\n\n"
        f"Tail: {facts['tail_samples']} samples of the same prompt length whose completion lengths are "
        f"lognormal with median {facts['tail_median']} and longest {facts['tail_max']} tokens, "
        f"{facts['tail_tokens']} useful tokens. How lengths are imposed:\n\n{how}"
    )


RATIOS = (
    ("rollout", "rollout_tokens_per_s", False), ("train step", "train_s", True),
    ("tail", "tail_tokens_per_s", False), ("memory of rollout", "rollout_peak_bytes", True),
    ("memory with training", "train_peak_bytes", True),
)  # fmt: skip
"""What jaxrl is compared in: name, key, whether less is better."""
WANTED = {"rollout": 2.0, "train step": 1.8, "memory of rollout": 1.0, "memory with training": 1.0}
"""How many times as good it is to be."""


def _beside_wanted(what: str, ratio: float) -> str:
    if what not in WANTED:
        return ""
    short = WANTED[what] - ratio
    how = f"short by {short:.2f}, see benchmarks/LOG.md for why" if short > 0 else "holds"
    return f"; {WANTED[what]:g} wanted: {how}"


def ratios(systems: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, float, str]]:
    """Per measure: its name, how many times as good jaxrl is as the best other, and which that is."""

    def value(name: str, key: str) -> float:
        found = systems[name][key]
        return found["median"] if isinstance(found, Mapping) else found

    found = []
    for what, key, less in RATIOS:
        others = [n for n, s in systems.items() if n != "jaxrl" and key in s]
        if not others or key not in systems.get("jaxrl", {}):
            continue
        best = (min if less else max)(others, key=lambda name: value(name, key))
        ours, theirs = value("jaxrl", key), value(best, key)
        found.append((what, theirs / ours if less else ours / theirs, best))
    return found


def _key(system: Mapping[str, Any]) -> float:
    for key in ("rollout_tokens_per_s", "tail_tokens_per_s"):
        if key in system:
            return system[key]["median"]
    return 0.0
