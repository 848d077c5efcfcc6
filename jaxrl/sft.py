"""`python -m jaxrl.sft`: the cold start alone. The same command line as `jaxrl.train`, and the same run folder:

`python -m jaxrl.train` with that folder goes on from there with reinforcement learning.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jaxrl.cli import parse_args, user_errors
from jaxrl.errors import UserError
from jaxrl.train import run


def main(argv: Sequence[str] | None = None) -> None:
    """Train on worked solutions, evaluate, and save checkpoint 0."""
    argv = sys.argv[1:] if argv is None else argv
    with user_errors(debug="--debug" in argv):
        parsed = parse_args(
            argv, prog="python -m jaxrl.sft",
            description="Train on the task's worked solutions, and stop there.",
        )  # fmt: skip
        if parsed.config.sft.steps == 0:
            raise UserError("sft.steps=0 leaves nothing to do; set --sft.steps to at least 1")
        run(parsed, argv, only_cold_start=True)


if __name__ == "__main__":
    main()
