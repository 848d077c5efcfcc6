"""What a run's own phases compile to for GPUs that are not there: python -m benchmarks.rehearse [--devices 8]

Needs jax's CUDA plug-in and no GPU: `make rehearse-setup`, then .venv-rehearse/bin/python. Nothing runs, so
every time in the results is a prediction; counts, bytes and what must hold are read from the executables.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is there: the devices are only described

from benchmarks import record
from jaxrl import rehearse

HARDWARE = "h200"
CONFIGS = {1: "qwen3_0.6b_gsm8k_1gpu", 8: "qwen3_4b_math_8gpu"}
"""What is compiled for so many devices."""


def main(argv: Sequence[str] | None = None) -> None:
    """Compile, read, write results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rehearse", description=__doc__)
    parser.add_argument("--devices", type=int, choices=list(CONFIGS), default=1)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args(argv)
    words = ["--config", CONFIGS[options.devices], "--hardware", HARDWARE]
    words += ["--devices", str(options.devices)]
    made = record.provenance()
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "compiled"
        rehearse.main([*words, "--out", str(compiled)])
        report = json.loads(compiled.with_suffix(".json").read_text(encoding="utf-8"))
        told = compiled.with_suffix(".md").read_text(encoding="utf-8")
    name = (
        f"rehearse_{HARDWARE}" if options.devices == 1 else f"rehearse_{options.devices}x{HARDWARE}"
    )
    content = {"provenance": made, "asked": " ".join(words), **report}
    record.write(name, content, f"{told}\nAsked: `{content['asked']}`.", options.out)


if __name__ == "__main__":
    main()
