"""Models and hardware by name, and how a command of this package reports what a user can mend."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from models.config import ModelConfig
from roofline import model_zoo
from roofline.datasheets import datasheet
from roofline.hardware import Hardware
from roofline.machine import cache_folder
from roofline.names import meant
from roofline.settings import Settings, model_of, read_settings, workload_of

EXIT_USER_ERROR = 2
VOCABULARY = 128
"""Tokens of a policy built from scratch, whose tokenizer nobody has made yet."""


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
    if not path.exists() and model_zoo.zoo_key(name) not in known:
        raise ValueError(
            f"no model {name!r}{meant(name, known)} Give a run folder, the path of a config.json or one "
            f"of {', '.join(known)}"
        )
    return model_zoo.find_model(name).config


def find_hardware(name: str, settings: Settings | None = None) -> Hardware:
    """A datasheet by name, a hardware JSON file, a run folder's, or "this": a stored calibration.

    Of several the newest that measured the shapes of `settings`; without settings or such a
    calibration the newest of all, which is said on stderr.

    Raises:
        ValueError: none of these; the message names the nearest.
    """
    path = Path(name)
    if path.is_file():
        return Hardware.load(path)
    if (path / "hardware.json").is_file():
        return Hardware.load(path / "hardware.json")
    if path.is_dir():
        raise ValueError(
            f"{path} holds no hardware.json; give a run folder, a file of `python -m "
            "roofline.calibrate --out FILE`, or the name of a datasheet"
        )
    return _calibration(settings) if name == "this" else datasheet(name)


def _calibration(settings: Settings | None) -> Hardware:
    files = cache_folder("calibration").glob("*.json")
    stored = [Hardware.load(f) for f in sorted(files, key=lambda f: -f.stat().st_mtime)]
    if not stored:
        raise ValueError("this machine is not calibrated; run `python -m roofline.calibrate`")
    if settings is None:
        return stored[0]
    for hardware in stored:
        if is_measured_for(hardware, settings):
            return hardware
    print(
        "Note: no calibration of this machine measured this configuration's model and shapes; the "
        "newest one is used, whose phases may reach other shares of the peaks. `python -m "
        "jaxrl.train --dry-run` with the same settings makes one.",
        file=sys.stderr,
    )
    return stored[0]


def is_measured_for(hardware: Hardware, settings: Settings) -> bool:
    """The calibration's phases have the model and the shapes of these settings."""
    shapes = dict(hardware.measured_for.get("workload", {}))
    shapes.pop("mesh", None)
    wanted = dataclasses.asdict(workload_of(settings))
    wanted.pop("mesh")
    return shapes == wanted and _shape(hardware.measured_for["model"]) == _shape(
        dataclasses.asdict(model_of(settings, 1))
    )


def measured_vocabulary(hardware: Hardware, settings: Settings) -> int | None:
    """Tokens of the model that was calibrated for these settings; None: the calibration is of other ones."""
    if not is_measured_for(hardware, settings):
        return None
    return hardware.measured_for["model"]["vocab_size"]


def _shape(model: Mapping[str, Any]) -> list[Any]:
    """What settings say of a model that is built from scratch."""
    names = ("width", "num_layers", "num_heads", "num_kv_heads", "head_size", "ffw_size", "qk_norm")
    return [model[name] for name in names]


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
    except OSError as error:
        if error.filename is None:
            raise
        print(f"Error: {error.filename}: {error.strerror}; name another path", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
