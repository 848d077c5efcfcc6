"""`python -m jaxrl.sft`: supervised training, with the same settings and the same command line as
`jaxrl.train`.

    --sft.path chats.jsonl     on chats of your own: jaxrl.fine_tune; rows as jaxrl.chats says. Reinforcement
                               learning goes on from there with --run.fork-from
    without it                 the cold start on the task's worked solutions alone; `python -m jaxrl.train`
                               with the same folder goes on with reinforcement learning
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jaxrl.cli import parse_args, user_errors
from jaxrl.errors import UserError
from jaxrl.fine_tune import fine_tune
from jaxrl.train import run


def main(argv: Sequence[str] | None = None) -> None:
    """Train on chats or worked solutions, and stop there."""
    argv = sys.argv[1:] if argv is None else argv
    with user_errors(debug="--debug" in argv):
        parsed = parse_args(
            argv, prog="python -m jaxrl.sft",
            description="Train on chats (sft.path), or on the task's worked solutions.",
        )  # fmt: skip
        if parsed.config.sft.path is not None:
            fine_tune(parsed, argv)
            return
        if parsed.config.sft.steps == 0:
            raise UserError(
                "nothing to learn from: set --sft.path to a file of chats, or --sft.steps to at least 1 "
                "for the task's worked solutions"
            )
        run(parsed, argv, only_cold_start=True)


if __name__ == "__main__":
    main()
