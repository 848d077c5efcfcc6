"""Rows of problems from where they are: JSON lines, parquet, or a data set of the hub. Loads no jax."""

from __future__ import annotations

import gzip
import importlib
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxrl.errors import UserError

_HUB = re.compile(
    r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<subset>[^:/]+))?(?::(?P<split>[^:/]+))"
)
_FORMS = "give a .jsonl, .jsonl.gz or .parquet file, or owner/name:split of the hub"

Row = dict[str, Any]


def check_source(option: str, source: Path) -> None:
    """Raise UserError unless `source` is a file or has the form of a data set's name; reads nothing.

    option: the setting that names it, for the message.
    """
    if not source.is_file() and not _HUB.fullmatch(str(source)):
        raise UserError(f"{option}={source} is no file; {_FORMS}")


def read_rows(source: Path) -> Iterator[tuple[str, Row]]:
    """(where it stands, row) of each row, in order; empty lines are skipped.

    A file wins over a data set of the same name.
    Raises: UserError naming the place, what is wrong and the remedy.
    """
    if not source.is_file():
        yield from _hub_rows(str(source))
    elif source.suffix == ".parquet":
        yield from _parquet_rows(source)
    else:
        yield from _json_rows(source)


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rb") as file:
            text = file.read().decode("utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); {_FORMS}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _object(line, where)


def _object(line: str, where: str) -> Row:
    form = "write one JSON object per line"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, column {error.colno}: not JSON ({error.msg}); {form}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__} instead of an object; {form}")
    if "\\ud" in line.lower():
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: half a surrogate pair is no text; remove it") from error
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    parquet = _optional("pyarrow.parquet", "pyarrow", f"{path} is a parquet file")
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise UserError(f"{path} cannot be read as parquet ({error}); fetch it again") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _hub_rows(source: str) -> Iterator[tuple[str, Row]]:
    named = _HUB.fullmatch(source)
    if named is None:
        raise UserError(f"{source} is no file; {_FORMS}")
    datasets = _optional("datasets", "datasets", f"{source} is no file but a data set of the hub")
    try:
        rows = datasets.load_dataset(named["name"], named["subset"], split=named["split"])
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"data set {source} cannot be had: {_first_line(error)}; check name, subset and split, or "
            "where there is no network fetch it elsewhere and give its file"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{source}, row {number}", dict(row)


def _optional(module: str, package: str, why: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{why}, which needs the package {package}: pip install {package}, or give JSON lines"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
