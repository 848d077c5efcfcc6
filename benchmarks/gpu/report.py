"""Tables of one results file, and how far it is from the figures to reach."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.cases import GPU, TINY, Case
from benchmarks.record import shown, table

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
        if theirs := pytorch_rows(results, model):
            parts.append(f"{table(['PyTorch', 'measured ms', 'tokens/s', 'peak GiB'], theirs)}\n")
        parts += _without_times(results, model)
    rows = [
        [t.name, f"{'<=' if t.most else '>='} {t.wanted:g}",
         "" if t.reached is None else f"{t.reached:.3g}", t.verdict]
        for t in targets(results)
    ]  # fmt: skip
    if rows:
        parts.append(
            f"## Figures to reach on one H200\n\n{table(['figure', 'wanted', 'reached', ''], rows)}\n"
        )
    profiles = content["profiles"].items()
    parts += [_kernels(name, p["kernels"]) for name, p in profiles if "kernels" in p]
    parts += [
        f"Kernels of {name}: {p['status']}, {p['why']}.\n" for name, p in profiles if "why" in p
    ]
    parts.append(LEGEND + "\n" + foot(content))
    return "\n".join(parts)


LEGEND = (
    "Bound: the least time at the datasheet's peaks (on a CPU: at the best rates measured) for the work that "
    "the results need: in decode every weight and every key and value once per step, in rows of tokens the "
    "model's own flops (causal attention, nothing computed twice), which over the peak are MFU too. Predicted: "
    "for the work that the programs do, at calibrated shares. Measured: median (least to most) of calls after "
    "two that warm up (PyTorch, where it does not compile: one); compilation is not in it. Decode is per chunk "
    "of steps, train per packed micro-batch, "
    "rollout and grpo per optimizer step. The first line of a shape runs the program of attention that "
    "attention=auto takes without measurements, whole steps the fastest one measured. Peak: most memory of the "
    "process so far, <= where an earlier case of it may have set it.\n"
)


def foot(content: Mapping[str, Any]) -> str:
    """Date, commit, versions, the card and its clock, whether the machine was busy."""
    made, results = content["provenance"], content["results"].values()
    busy = "; ANOTHER PROGRAM WAS RUNNING at the start" if made["machine_was_busy"] else ""
    seen = ", ".join(f"{k} {v}" for k, v in {**made["versions"], **made.get("seen", {})}.items())
    card = ", ".join(f"{name} {value}" for name, value in made.get("card", {}).items())
    uncalibrated = any(r.get("calibrated") is False for r in results)
    sources = content["key"]["sources"]
    older = sum(r.get("sources", sources) != sources for r in results)
    words = [
        f"{made['date']}, commit {made['commit'][:12]}, sources {sources}{busy}",
        f"{older} OF THE RESULTS ARE OF OTHER SOURCES" if older else "",
        seen, card, _clocks([r["card"] for r in results if "card" in r]),
        "SOME PREDICTIONS ARE THE DATASHEET'S: no calibration had succeeded" if uncalibrated else "",
    ]  # fmt: skip
    return ". ".join(word for word in words if word) + ".\n"


def _clocks(cards: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    """How the card ran while cases did; empty where it did not say."""

    def told(name: str, of: str) -> list[float]:
        return [card[name][of] for card in cards if name in card]

    words = []
    if clocks := told("clocks.sm", "median"):
        words.append(f"SM clock {min(clocks):.0f} to {max(clocks):.0f} MHz (medians)")
    if watts := told("power.draw", "max"):
        words.append(f"at most {max(watts):.0f} W")
    if celsius := told("temperature.gpu", "max"):
        words.append(f"at most {max(celsius):.0f} degrees Celsius")
    return f"While cases ran: {', '.join(words)}" if words else ""


def phase_rows(results: Results, model: str) -> list[list[str]]:
    """One line per measured case of jaxrl."""
    rows = []
    for name, r in results.items():
        if not name.startswith(f"{model} ") or r["status"] != "done" or "bound_s" not in r:
            continue
        mfu = f"{r['mfu']:.1%}" if "mfu" in r else ""
        rate = f"{r['tokens_per_s']:,.0f}" if "tokens_per_s" in r else ""
        rows.append([
            name.removeprefix(f"{model} "), f"{1e3 * r['bound_s']:.2f}", f"{1e3 * r['expected_s']:.2f}",
            _milliseconds(r), f"{r['share_of_bound']:.1%}",
            f"{r['ratio']:.2f}", r["binds"], mfu, rate,
            ("" if r["peak_is_this_cases"] else "<= ") + f"{r['peak_bytes'] / 2**30:.1f}",
        ])  # fmt: skip
    return rows


def _milliseconds(result: Mapping[str, Any]) -> str:
    return shown({key: 1e3 * value for key, value in result["measured_s"].items()})


def pytorch_rows(results: Results, model: str) -> list[list[str]]:
    """One line per measured case of transformers and PyTorch; the peak is known on a GPU alone."""
    start = f"{model} peers "
    return [
        [name.removeprefix(start), _milliseconds(r), f"{r['tokens_per_s']:,.0f}",
         f"{r['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in r else ""]
        for name, r in results.items()
        if name.startswith(start) and r["status"] == "done"
    ]  # fmt: skip


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


def attention_table(results: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Median seconds of each program of attention, by device kind and shape, of the first model measured: what
    `jaxrl.attention.fastest` reads. Cases in the compute dtype alone; train with recomputation. Of several
    results of a device, oldest first, the last one that compares programs at a shape decides."""
    scales = {scale.name: scale for scale in (GPU, TINY)}
    found: defaultdict[str, dict[tuple[str, int, int], dict[str, float]]] = defaultdict(dict)
    for content in results:
        scale = scales[content["key"]["scale"]]
        model = next(iter(scale.models))
        seconds: defaultdict[tuple[str, int, int], dict[str, float]] = defaultdict(dict)
        for case in scale.cases():
            result = content["results"].get(case.name, {})
            plain = case.model == model and not case.cache_dtype and not case.shares
            if plain and _compares_programs(case) and result.get("status") == "done":
                shape = (case.kind, case.rows, case.tokens)
                seconds[shape][result["attention"]] = result["measured_s"]["median"]
        made = content["provenance"]
        found[made.get("seen", {}).get("device", made["device"])] |= {
            shape: of_programs for shape, of_programs in seconds.items() if len(of_programs) > 1
        }
    return {
        device: [
            {"phase": kind, "rows": rows, "tokens": tokens, "seconds": of_programs}
            for (kind, rows, tokens), of_programs in shapes.items()
        ]
        for device, shapes in found.items()
    }


def _compares_programs(case: Case) -> bool:
    return case.kind == "decode" or (case.kind == "train" and case.remat == "block")


OTHER_CACHES = ("int8", "float8_e4m3", "shared")
"""Variants of decode that read fewer bytes than the book's bound of the figures to reach counts."""
SHARES = {
    # model: (decode 256x512 of bound, decode 1x512 of bound, prefill and scoring MFU, training MFU)
    "qwen3-0.6b": (0.65, 0.35, 0.45, 0.35),
    "qwen3-1.7b": (0.70, 0.50, 0.45, 0.45),
}
"""Figures to reach on one H200, bfloat16."""


def targets(results: Results) -> list[Target]:
    """The figures to reach beside what these results reached; none for results of other models alone."""
    found: list[Target] = []
    if not SHARES.keys() & set(models(results)):
        return found
    for model, (wide, single, forward, train) in SHARES.items():
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
    return found + _errors(results)


def _best(results: Results, case: str, key: str, wanted: float) -> Target:
    """The best program, with or without recomputation, of those with a cache of each slot's own in the compute
    dtype."""
    values = [
        r[key] for name, r in results.items()
        if (name == case or name.startswith(f"{case} ")) and key in r
        and name.split()[-1] not in OTHER_CACHES
    ]  # fmt: skip
    what = "MFU" if key == "mfu" else "share of bound"
    return Target(name=f"{case}: {what}", wanted=wanted, reached=max(values, default=None))


def _errors(results: Results) -> list[Target]:
    """|predicted / measured - 1| of single phases, calibrated, with the programs that calibration runs."""
    single = [
        case.name for case in GPU.cases()
        if case.kind not in ("rollout", "grpo", "peers")
        and not (case.attention or case.cache_dtype or case.shares)
    ]  # fmt: skip
    errors = [
        abs(1 / results[name]["ratio"] - 1)
        for name in single
        if name in results and results[name].get("calibrated")
    ]
    median, worst = (statistics.median(errors), max(errors)) if errors else (None, None)
    return [
        Target(name="error of predictions, median", wanted=MEDIAN_ERROR, reached=median, most=True),
        Target(name="error of predictions, worst", wanted=WORST_ERROR, reached=worst, most=True),
    ]
