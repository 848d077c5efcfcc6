"""What every benchmark writes: JSON and a table in benchmarks/results, with machine, versions and commit."""

from __future__ import annotations

import datetime
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl.telemetry.summary import package_versions
from roofline.machine import busy_core_s, host_memory_bytes, processor, usable_cores

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
README = ROOT / "README.md"
WATCHED_S = 2.0
"""Time before the measurement in which this process rests and others are watched [s]."""
MOST_OTHERS = 0.1
"""Share of the cores above which other programs mark the timings as taken on a busy machine."""


def provenance(versions: Mapping[str, str] | None = None, *, timed: bool = True) -> dict[str, Any]:
    """Date, machine, software and commit; call it before the measurement starts.

    `timed`: the result holds times or rates, which another program on the machine would spoil; then
    others are watched for WATCHED_S first.
    """
    others = _others() if timed else 0.0
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": processor(),
        "cores": usable_cores(),
        "memory_gib": round(host_memory_bytes() / 2**30, 1),
        "commit": _commit(),
        "versions": {**package_versions(), **(versions or {})},
        "others_before": round(others, 3),
        "machine_was_busy": others > MOST_OTHERS,
    }


def _others() -> float:
    """Share of the usable cores that other programs take, this process resting; 0 if unknown."""
    before = busy_core_s()
    time.sleep(WATCHED_S)
    after = busy_core_s()
    if before is None or after is None:
        return 0.0
    return (after - before) / (WATCHED_S * usable_cores())


def _commit() -> str:
    """HEAD, with '+changes' if the checkout differs from it; 'unknown' outside a checkout or without git."""

    def git(*words: str) -> str:
        if shutil.which("git") is None:  # as in a bare image
            return ""
        done = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--", "jaxrl", "models", "roofline", "benchmarks")
    changed = [line for line in changed.splitlines() if "benchmarks/results/" not in line]
    return (head or "unknown") + ("+changes" if changed else "")


def peak_bytes(process: int) -> int:
    """Most memory of its own that the process ever held, proc(5) VmHWM [bytes]."""
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes and number of the rounds' values."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "rounds": len(values),
    }


def shown(values: Mapping[str, float], digits: int = 2) -> str:
    """Median with the extremes, as a table shows it."""
    numbers = [f"{values[key]:,.{digits}f}" for key in ("median", "min", "max")]
    return f"{numbers[0]} ({numbers[1]} to {numbers[2]})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all but the first column to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(name: str, content: Mapping[str, Any], markdown: str, folder: Path = RESULTS) -> None:
    """Write NAME.json and NAME.md and print the table. `content` holds `provenance` under that key.

    Raises: ValueError if a path of this machine would be written.
    """
    made = content["provenance"]
    busy = "; ANOTHER PROGRAM WAS RUNNING, do not cite" if made.get("machine_was_busy") else ""
    versions = ", ".join(f"{package} {v}" for package, v in made["versions"].items())
    foot = (
        f"{made['date']}, {made['processor']} cores, {made['memory_gib']} GiB, commit "
        f"{made['commit'][:12]}{'+changes' if made['commit'].endswith('+changes') else ''}{busy}.\n"
        f"Versions: {versions}.\n"
    )
    text = json.dumps(content, indent=1) + "\n"
    for path in (str(ROOT), str(Path.home())):
        if path in text or path in markdown:
            raise ValueError(f"results of {name} name the path {path}; write relative names")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    (folder / f"{name}.md").write_text(f"{markdown}\n\n{foot}", encoding="utf-8")
    print(f"{markdown}\n\n{foot}")


def put_into_readme(start: str, end: str, block: str, readme: Path = README) -> None:
    """Replace what stands between two comment lines of README, and print it.

    Raises: SystemExit if README lacks the lines.
    """
    text = readme.read_text(encoding="utf-8")
    if start not in text or end not in text:
        sys.exit(
            f"{readme.name} lacks the lines {start.strip()} and {end}; add them where the table "
            "shall stand"
        )
    before, rest = text.split(start)
    readme.write_text(before + start + block + end + rest.split(end)[1], encoding="utf-8")
    print(block)
