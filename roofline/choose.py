"""Models and hardware by name, and how a command of this package reports what a user can mend."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from models.config import ModelConfig
from roofline import model_zoo
from roofline.datasheets import datasheet
from roofline.hardware import Hardware
from roofline.machine import cache_folder
from roofline.settings import model_of, read_settings

EXIT_USER_ERROR = 2


def find_model(name: str, vocab_size: int) -> ModelConfig:
    """A named model, a Hugging Face config.json (or the folder that holds it), or a run folder.

    `vocab_size`: tokens of a run whose policy was built from scratch.

    Raises:
        ValueError: none of these; the message names the nearest.
    """
    path = Path(name)
    if (path / "config.yaml").is_file():
        return model_of(read_settings(name), vocab_size)
    known = model_zoo.ZOO
    if not path.exists() and name.rpartition("/")[2].lower() not in known:
        nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"no model {name!r}; did you mean {nearest!r}? Give a run folder, the path of a "
            f"config.json or one of {', '.join(known)}"
        )
    return model_zoo.find_model(name).config


def find_hardware(name: str) -> Hardware:
    """A datasheet by name, a hardware JSON file, a run folder's, or "this": the newest calibration.

    Raises:
        ValueError: none of these; the message names the nearest.
    """
    path = Path(name)
    if path.is_file():
        return Hardware.load(path)
    if (path / "hardware.json").is_file():
        return Hardware.load(path / "hardware.json")
    return _newest_calibration() if name == "this" else datasheet(name)


def _newest_calibration() -> Hardware:
    files = cache_folder("calibration").glob("*.json")
    newest = max(files, key=lambda file: file.stat().st_mtime, default=None)
    if newest is None:
        raise ValueError("this machine is not calibrated; run `python -m roofline.calibrate`")
    return Hardware.load(newest)


def report_errors(command: Callable[[], None]) -> None:
    """Run a command; what a user can mend ends it with one message and exit code 2."""
    try:
        command()
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
    except BrokenPipeError:  # the reader left, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
        raise SystemExit(EXIT_USER_ERROR) from None
