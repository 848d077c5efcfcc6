"""Files with one JSON object per line, which survive a crash in the middle of a write."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxrl.errors import UserError


def dump_line(record: Mapping[str, Any]) -> str:
    """One line of valid JSON; raises ValueError on NaN or infinity, which JSON has no word for."""
    return json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"


def finite_or_none(value: float | None) -> float | None:
    """`value`, or None where JSON has no word for it."""
    return value if value is not None and math.isfinite(value) else None


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of the file in order; none if it does not exist. A torn last line is left out.

    Raises:
        UserError: a line other than the last is not a JSON object.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            record = _parsed(line)
            if record is not None:
                yield record
            elif next(lines, None) is not None:
                raise UserError(
                    f"line {number} of {path} is not a JSON object: {line[:60]!r}; delete that "
                    "line, or use another --run.dir"
                )


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and line.endswith("\n") else None


def keep_until(path: Path, step: int | None) -> None:
    """Drop records after `step`, and a torn last line, in one atomic move; None drops all."""
    if not path.exists():
        return
    kept = [r for r in read_records(path) if step is not None and r["step"] <= step]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(map(dump_line, kept)), encoding="utf-8")
    partial.replace(path)
