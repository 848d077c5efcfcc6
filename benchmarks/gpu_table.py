"""README's table of GPU figures from the results of the GPU suite: python -m benchmarks.gpu_table

Also writes what `model.attention=auto` and `rollout.attention=auto` choose from (`jaxrl.attention`).
Takes the newest results of each device in benchmarks/results and writes the text between the two
comment lines START and END of README. Without results it says so and leaves README as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.gpu.cases import GPU
from benchmarks.gpu.report import attention_table, foot, models, peer_rows, targets
from benchmarks.gpu.store import load_results
from jaxrl.attention import TABLE

START, END = "<!-- gpu:start -->\n", "<!-- gpu:end -->"
SHOWN = ("decode", "prefill", "score", "train", "optimizer", "publish", "rollout", "grpo")
HEAD = ["model", "phase", "bound ms", "predicted ms", "measured ms", "of bound", "MFU", "tokens/s"]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the table into README."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_table")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--readme", type=Path, default=record.README)
    parser.add_argument("--attention", type=Path, default=TABLE)
    options = parser.parse_args(argv)
    results = load_results(options.results)
    newest = {r["provenance"]["device"]: r for r in results}
    if not newest:
        sys.exit(
            f"{options.results.name} holds no results of benchmarks/gpu_suite.py; run it on a GPU first"
        )
    programs = attention_table(results)
    options.attention.write_text(json.dumps(programs, indent=1) + "\n", encoding="utf-8")
    made = "\n".join(block(content) for content in newest.values())
    record.put_into_readme(START, END, made, options.readme)


def block(content: Mapping[str, Any]) -> str:
    """One device: its phases, PyTorch beside it, which figures were reached, how much of the suite this is,
    where it comes from."""
    results = content["results"]
    rows = []
    for model in models(results):
        for name, r in results.items():
            if name.split()[0] != model or name.split()[1] not in SHOWN or r["status"] != "done":
                continue
            rows.append([
                model, name.removeprefix(f"{model} "),
                *(f"{1e3 * r[key]:.2f}" for key in ("bound_s", "expected_s")),
                f"{1e3 * r['measured_s']['median']:.2f}", f"{r['share_of_bound']:.0%}",
                f"{r['mfu']:.0%}" if "mfu" in r else "",
                f"{r['tokens_per_s']:,.0f}" if "tokens_per_s" in r else "",
            ])  # fmt: skip
    beside = [
        f"{model}, {name}: {ratio} times PyTorch ({ours} against {theirs})"
        for model in models(results)
        for name, ours, theirs, ratio in peer_rows(results, model)
    ]
    reached = [t for t in targets(results) if t.reached is not None]
    missed = [f"{t.name} {t.verdict}" for t in reached if t.verdict != "reached"]
    cases = [case.name for case in GPU.cases()]
    measured = sum(results.get(name, {}).get("status") == "done" for name in cases)
    words = [
        *beside, f"{len(reached) - len(missed)} of {len(targets(results))} figures reached",
        *([f"Missed: {'; '.join(missed)}"] if missed else []),
        *([f"{measured} of {len(cases)} cases measured so far"] if measured < len(cases) else []),
    ]  # fmt: skip
    return (
        f"{content['provenance']['device']}:\n\n{record.table(HEAD, rows)}\n\n"
        f"{'. '.join(words)}.\n{foot(content)}"
    )


if __name__ == "__main__":
    main()
