"""Tables of one results file, and how far it is from the figures to reach."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.record import table

HEAD = [
    "case", "bound ms", "predicted ms", "measured ms", "of bound", "measured / predicted", "binds",
    "MFU", "tokens/s", "peak GiB",
]  # fmt: skip
MEDIAN_ERROR, WORST_ERROR = 0.10, 0.15
"""Of calibrated predictions against measured phases."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A figure to reach, and what was reached."""

    name: str
    wanted: float
    reached: float | None
    """None: not measured."""
    most: bool = False
    """True: at most `wanted`, False: at least."""

    @property
    def verdict(self) -> str:
        """Reached, or by how much not."""
        if self.reached is None:
            return "not measured"
        if self.reached <= self.wanted if self.most else self.reached >= self.wanted:
            return "reached"
        factor = self.reached / self.wanted if self.most else self.wanted / max(self.reached, 1e-12)
        return f"missed by {factor:.2f}x"


Results = Mapping[str, Mapping[str, Any]]


def models(results: Results) -> list[str]:
    """Models of the results, in their order."""
    return list(dict.fromkeys(name.split()[0] for name in results))


def report(content: Mapping[str, Any]) -> str:
    """Everything: phases, peers, figures to reach, kernels, provenance."""
    results, made = content["results"], content["provenance"]
    parts = [f"# {made['device']}\n"]
    for model in models(results):
        parts.append(f"## {model}\n\n{table(HEAD, phase_rows(results, model))}\n")
        if compared := peer_rows(results, model):
            head = ["beside PyTorch", "jaxrl", "PyTorch", "jaxrl / PyTorch"]
            parts.append(f"{table(head, compared)}\n")
        parts += _without_times(results, model)
    rows = [
        [t.name, f"{'<=' if t.most else '>='} {t.wanted:g}",
         "" if t.reached is None else f"{t.reached:.3g}", t.verdict]
        for t in targets(results)
    ]  # fmt: skip
    if rows:
        parts.append(f"## Figures to reach\n\n{table(['figure', 'wanted', 'reached', ''], rows)}\n")
    parts += [_kernels(name, kernels) for name, kernels in content["kernels"].items()]
    parts.append(LEGEND + "\n" + foot(content))
    return "\n".join(parts)


LEGEND = (
    "Bound: the least time at the datasheet's peaks, for the work that the results need. Predicted: for the "
    "work that the programs do, at calibrated shares. Measured: median (least to most) of calls after "
    "warm-up. MFU: flops of the model alone (causal attention, nothing computed twice) over the peak. Decode "
    "is per chunk of steps, train per packed micro-batch. Peak: most memory of the process so far, <= where "
    "an earlier case of it may have set it.\n"
)


def foot(content: Mapping[str, Any]) -> str:
    """Date, commit, versions, whether the machine was busy."""
    made = content["provenance"]
    busy = "; ANOTHER PROGRAM WAS RUNNING at the start" if made["machine_was_busy"] else ""
    seen = ", ".join(f"{k} {v}" for k, v in {**made["versions"], **made.get("seen", {})}.items())
    return (
        f"{made['date']}, commit {made['commit'][:12]}, sources {content['key']['sources']}{busy}. "
        f"{seen}.\n"
    )


def phase_rows(results: Results, model: str) -> list[list[str]]:
    """One line per measured case of jaxrl."""
    rows = []
    for name, r in results.items():
        if not name.startswith(f"{model} ") or r["status"] != "done" or "bound_s" not in r:
            continue
        ms = {key: 1e3 * r["measured_s"][key] for key in ("median", "min", "max")}
        mfu = f"{r['mfu']:.1%}" if "mfu" in r else ""
        rate = f"{r['tokens_per_s']:,.0f}" if "tokens_per_s" in r else ""
        rows.append([
            name.removeprefix(f"{model} "), f"{1e3 * r['bound_s']:.2f}", f"{1e3 * r['expected_s']:.2f}",
            f"{ms['median']:.2f} ({ms['min']:.2f} to {ms['max']:.2f})", f"{r['share_of_bound']:.1%}",
            f"{r['ratio']:.2f}", r["binds"], mfu, rate,
            ("" if r["peak_is_this_cases"] else "<= ") + f"{r['peak_bytes'] / 2**30:.1f}",
        ])  # fmt: skip
    return rows


def peer_rows(results: Results, model: str) -> list[list[str]]:
    """Rollout and train step beside PyTorch's, in tokens per second."""
    rows = []
    for name, (ours, theirs) in _pairs(results, model).items():
        if ours and theirs:
            rows.append(
                [name, f"{ours:,.0f} tokens/s", f"{theirs:,.0f} tokens/s", f"{ours / theirs:.2f}"]
            )
    return rows


def _pairs(results: Results, model: str) -> dict[str, tuple[float | None, float | None]]:
    """(jaxrl's, PyTorch's) tokens per second by what is compared; each side's best variant."""

    def best(prefix: str) -> Mapping[str, Any] | None:
        done = [
            r for name, r in results.items()
            if name.startswith(f"{model} {prefix}") and r["status"] == "done"
        ]  # fmt: skip
        return max(done, key=lambda r: r["tokens_per_s"], default=None)

    rollout, generate = best("rollout"), best("peers generate")
    theirs = best("peers train")
    largest = max(
        (n for n in results if n.startswith(f"{model} train ")), default="", key=_packed_tokens
    )
    ours = best(" ".join(largest.split()[1:3])) if largest else None
    optimizer = results.get(f"{model} optimizer", {})
    step = None
    if ours and optimizer.get("status") == "done":
        tokens = ours["tokens_per_s"] * ours["measured_s"]["median"]
        step = tokens / (ours["measured_s"]["median"] + optimizer["measured_s"]["median"])
    return {
        "rollout": (_rate(rollout), _rate(generate)),
        "train step with optimizer": (step, _rate(theirs)),
    }


def _rate(result: Mapping[str, Any] | None) -> float | None:
    return None if result is None else result["tokens_per_s"]


def _packed_tokens(name: str) -> int:
    rows, tokens = name.split()[2].split("x")
    return int(rows) * int(tokens)


def _without_times(results: Results, model: str) -> list[str]:
    """A sentence for each case that gave no time."""
    return [
        f"{name}: {r['status']}, {r['why']}.\n"
        for name, r in results.items()
        if name.startswith(f"{model} ") and r["status"] != "done"
    ]


def _kernels(name: str, kernels: Sequence[Mapping[str, Any]]) -> str:
    head = ["kernel", "share", "ms", "calls", "from"]
    rows = [
        [k["kernel"][:60], f"{k['share']:.1%}", f"{1e3 * k['seconds']:.2f}", str(k["calls"]),
         (k["source"] or k["program"])[-80:].replace("|", "/")]
        for k in kernels
    ]  # fmt: skip
    return f"## Kernels of {name}\n\n{table(head, rows)}\n"


EIGHT_BITS = ("int8", "float8_e4m3")
SHARES = {
    # model: (decode 256x512 of bound, decode 1x512 of bound, prefill and scoring MFU, training MFU)
    "qwen3-0.6b": (0.65, 0.35, 0.45, 0.35),
    "qwen3-1.7b": (0.70, 0.50, 0.45, 0.45),
}
"""Figures to reach on one H200, bfloat16."""


def targets(results: Results) -> list[Target]:
    """The figures to reach beside what these results reached; none for models without figures."""
    found: list[Target] = []
    for model in (m for m in models(results) if m in SHARES):
        wide, single, forward, train = SHARES[model]
        found += [
            _best(results, f"{model} decode 256x512", "share_of_bound", wide),
            _best(results, f"{model} decode 1x512", "share_of_bound", single),
            _best(results, f"{model} prefill 8x2048", "mfu", forward),
            _best(results, f"{model} prefill 32x512", "mfu", forward),
            _best(results, f"{model} score 8x2048", "mfu", forward),
            _best(results, f"{model} train 8x2048", "mfu", train),
        ]
        published = results.get(f"{model} publish", {})
        took = (
            published["measured_s"]["median"] / published["copy_s"]
            if "copy_s" in published
            else None
        )
        found.append(
            Target(name=f"{model} publication over a bare copy", wanted=2, reached=took, most=True)
        )
        for name, wanted in (("rollout", 5.0), ("train step with optimizer", 1.3)):
            ours, theirs = _pairs(results, model)[name]
            ratio = ours / theirs if ours and theirs else None
            found.append(Target(name=f"{model} {name} over PyTorch", wanted=wanted, reached=ratio))
    return found + (_errors(results) if found else [])


def _best(results: Results, case: str, key: str, wanted: float) -> Target:
    """The best program, with or without recomputation, of those that keep everything in the compute dtype."""
    values = [
        r[key] for name, r in results.items()
        if (name == case or name.startswith(f"{case} ")) and key in r
        and name.split()[-1] not in EIGHT_BITS
    ]  # fmt: skip
    what = "MFU" if key == "mfu" else "share of bound"
    return Target(name=f"{case}: {what}", wanted=wanted, reached=max(values, default=None))


def _errors(results: Results) -> list[Target]:
    """How far single phases are from their calibrated prediction."""
    errors = [
        abs(r["ratio"] - 1)
        for name, r in results.items()
        if "ratio" in r and name.split()[1] not in ("rollout", "grpo")
    ]
    median, worst = (statistics.median(errors), max(errors)) if errors else (None, None)
    return [
        Target(name="error of predictions, median", wanted=MEDIAN_ERROR, reached=median, most=True),
        Target(name="error of predictions, worst", wanted=WORST_ERROR, reached=worst, most=True),
    ]
