"""README's table of jaxrl beside other systems, from the committed results: python -m benchmarks.peers_table"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.peers_report import ratios
from benchmarks.record import shown

START, END = "<!-- peers:start -->\n", "<!-- peers:end -->"
HEAD = ["model", "system", "rollout tokens/s", "train step s", "10x tail tokens/s", "memory GiB"]
MEASURES = (("rollout_tokens_per_s", 0), ("train_s", 2), ("tail_tokens_per_s", 0))
"""Key of each measured column and its decimals."""


def results(folder: Path = record.RESULTS) -> list[dict[str, Any]]:
    """The results of every size that was measured, smallest model first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("peers_*.json")]
    return sorted(found, key=lambda content: content["workload"]["parameters"])


def block(contents: Sequence[Mapping[str, Any]]) -> str:
    """One row per size and system; then, per size, jaxrl beside the best of the others, date and commit."""
    rows, words = [], []
    for content in contents:
        systems, made = content["systems"], content["provenance"]
        model = f"{content['workload']['parameters'] / 1e6:.1f}M"
        for name, system in systems.items():
            cells = [
                shown(system[key], digits) if key in system else "-" for key, digits in MEASURES
            ]
            rows.append([model, name, *cells, f"{system['peak_bytes'] / 2**30:.2f}"])
        beside = ", ".join(f"{what} {ratio:.2f} ({best})" for what, ratio, best in ratios(systems))
        words.append(
            f"- {model}: {beside}; {made['date']}, {made['processor']} cores, commit {made['commit'][:10]}"
            + ("; another program was running" if made["machine_was_busy"] else "")
        )
    return (
        f"{record.table(HEAD, rows)}\n\n"
        "How many times as good as the best of the others (above 1 is better):\n\n"
        + "\n".join(words)
        + "\n"
    )


def main() -> None:
    """Write the table into README."""
    record.put_into_readme(START, END, block(results()))


if __name__ == "__main__":
    main()
