"""Hands over to the program that knows the trainer's phases, with a jax that looks for no GPU."""

from __future__ import annotations

import os
import runpy

BUILDER = "jaxrl.rehearse"
"""Module that builds the programs. It stands to the right of this package, so it is run, not imported."""


def main() -> None:
    """Run BUILDER with this command line."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    runpy.run_module(BUILDER, run_name="__main__")


if __name__ == "__main__":
    main()
