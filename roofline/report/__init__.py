"""Predicted beside measured for one run: report.md, report.html and report.json.

    python -m roofline.report RUN_DIR

Reads only the run folder's files (see `roofline.read_run`); loads no jax. The HTML holds its style
and its charts inline and asks the network for nothing; report.json follows schema.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from roofline.read_run import read_run
from roofline.report.content import build
from roofline.report.page import html
from roofline.report.text import markdown

__all__ = ["main", "schema", "write"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the reports; 0, or 2 with one line on stderr when the folder cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m roofline.report", description="Predicted beside measured for one run."
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder that training wrote")
    folder = parser.parse_args(arguments).run
    try:
        paths = write(folder)
    except (OSError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0


def write(folder: Path) -> tuple[Path, Path, Path]:
    """Write report.md, report.html and report.json into a run folder and return their paths.

    Raises:
        ValueError: the folder is not a run folder; see `roofline.read_run.read_run`.
    """
    run = read_run(folder)
    report = build(run)
    texts = {
        "report.md": markdown(run, report),
        "report.html": html(run, report),
        "report.json": json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        partial = folder / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)
    return folder / "report.md", folder / "report.html", folder / "report.json"


def schema() -> dict[str, object]:
    """JSON schema of report.json (draft 2020-12)."""
    return json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))
