"""Errors that a user can cause. Entry points print them without a traceback and exit with code 2."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from types import TracebackType


class UserError(ValueError):
    """Something the user can mend. The text names the thing, the value, what is allowed, and the remedy."""


def user_message(error: BaseException) -> str | None:
    """What to tell the user about `error` or what caused it; None if it is a fault of the program."""
    return next(filter(None, map(_message, _with_causes(error))), None)


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from: a worker's error reaches the main thread as cause."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _message(error: BaseException) -> str | None:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ValueError) and _raised_in(error.__traceback__).startswith(
        ("models.", "roofline.")
    ):
        return str(error)
    number = error.errno if isinstance(error, OSError) else None
    file = getattr(error, "filename", None) or "a file of the run folder"
    if isinstance(error, PermissionError) or number == errno.EROFS:
        reason = os.strerror(number) if number else "permission denied"
        return (
            f"no permission for {file} ({reason}); choose a folder that you may write with "
            "--run.dir=FOLDER, or change its permissions"
        )
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        return (
            f"the disk is full while writing {file}; free some space, choose another --run.dir, or "
            "keep fewer checkpoints with --checkpoint.keep"
        )
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        detail = str(error).strip().partition("\n")[0] or "the host has no memory left"
        return (
            f"out of memory: {detail}\nLower --train.rows-per-microbatch or "
            "--train.logprob-chunk-tokens (learner), --rollout.slots or --rollout.max-new-tokens "
            "(rollout), or set --model.remat=block or --model.dtype=bfloat16; --dry-run prints the "
            "memory that each choice needs."
        )
    return None


def _raised_in(trace: TracebackType | None) -> str:
    """Name of the module whose code raised, '' when unknown."""
    name = ""
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        trace = trace.tb_next
    return name
