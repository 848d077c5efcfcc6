"""The folder of a run: who may write it, what it holds, how a later start finds it again.

config.yaml  commands.txt  hardware.json  metrics.jsonl  spans.jsonl  samples.jsonl  summary.json
checkpoints/  events.out.tfevents.* (TensorBoard)  report.md  report.html  report.json
"""

from __future__ import annotations

import fcntl
import io
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxrl.cli import config_difference, load_config, save_config
from jaxrl.config import Config
from jaxrl.errors import UserError
from jaxrl.telemetry.jsonl import keep_until

_FREE_SECTIONS = ("checkpoint.", "eval.")
_FREE_KEYS = ("run.dir", "run.report", "task.reward_workers")
_SHOWN_DIFFERENCES = 8  # more would hide the remedy


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """An open run folder. The lock ends with `close` or with the process, however it dies."""

    path: Path
    resumed: bool
    """The folder held this run already; its newest checkpoint, if any, is where to go on."""
    lock: io.FileIO

    @property
    def config(self) -> Path:
        """Resolved configuration; `--config` with this file repeats the run."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One object per optimizer step."""
        return self.path / "metrics.jsonl"

    @property
    def spans(self) -> Path:
        """One object per measured phase."""
        return self.path / "spans.jsonl"

    @property
    def samples(self) -> Path:
        """A few readable rollouts per step."""
        return self.path / "samples.jsonl"

    @property
    def summary(self) -> Path:
        """Outcome of the run."""
        return self.path / "summary.json"

    @property
    def hardware(self) -> Path:
        """Calibration that the predictions use."""
        return self.path / "hardware.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Folder of the event files: the run folder, so that TensorBoard names curves by run."""
        return self.path

    def rewind(self, step: int | None) -> None:
        """Forget what was logged after `step`, the step of the checkpoint to go on from.

        None: there is no checkpoint, the run begins anew. Call it before the log files are opened.
        """
        for log in (self.metrics, self.spans, self.samples):
            keep_until(log, step)

    def close(self) -> None:
        """Let another process write the folder."""
        self.lock.close()


def open_run(config: Config, argv: Sequence[str] = ()) -> RunFolder:
    """Create the folder config.run.dir, or open it to resume the run that it holds.

    `argv` is kept in commands.txt. A resumed run may differ from the stored configuration in
    checkpoint.*, eval.*, run.dir, run.report, task.reward_workers, and in train.steps and
    train.max_generated_tokens where the learning rate does not depend on them: what leaves the curve so
    far as it was.

    Raises:
        UserError: another process writes the folder, it holds another run, or it cannot be written.
    """
    path = config.run.dir
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
    except OSError as error:
        raise UserError(
            f"run.dir={path} cannot be written: {error.strerror} ({error.filename}); choose a "
            "folder that you may write with --run.dir=FOLDER"
        ) from error
    try:
        folder = RunFolder(path=path, resumed=_has_begun(path), lock=lock)
        if folder.resumed:
            _check_same_run(load_config(folder.config), config)
        elif not folder.config.exists():
            _check_empty(path)
        save_config(config, folder.config)
        with (path / "commands.txt").open("a", encoding="utf-8") as commands:
            commands.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {shlex.join(argv)}\n")
    except BaseException:
        lock.close()
        raise
    return folder


def _has_begun(path: Path) -> bool:
    """There is a complete checkpoint: a run that failed before its first one has nothing to protect."""
    return any(step.name.isdigit() for step in (path / "checkpoints").glob("*"))


def _locked(path: Path) -> io.FileIO:
    """Open `.lock` with an exclusive lock, which the kernel drops when this process dies.

    lockf, not flock: a forked worker that outlives the process would keep an flock.
    """
    lock = io.FileIO(os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644), "r+")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        owner = lock.read(64).decode(errors="replace").strip()
        lock.close()
        raise UserError(
            f"run.dir={path} is being written by process {owner or 'unknown'}; wait for it, stop "
            "it, or choose another folder with --run.dir=FOLDER"
        ) from error
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n".encode())
    return lock


def _check_same_run(stored: Config, wanted: Config) -> None:
    """Raise UserError, naming keys and both values, if resuming would change the curve so far."""
    constant = wanted.train.schedule == "constant"
    free = _FREE_KEYS + (("train.steps", "train.max_generated_tokens") if constant else ())
    if wanted.sft.path is not None and wanted.sft.schedule == "constant":
        free += ("sft.steps",)
    differing = {
        key: values
        for key, values in config_difference(stored, wanted).items()
        if key not in free and not key.startswith(_FREE_SECTIONS)
    }
    if not differing:
        return
    lines = [f"  {key}: {one} in the folder, {two} now" for key, (one, two) in differing.items()]
    if len(lines) > _SHOWN_DIFFERENCES:
        lines[_SHOWN_DIFFERENCES:] = [f"  and {len(lines) - _SHOWN_DIFFERENCES} more"]
    folder = wanted.run.dir
    raise UserError(
        f"run.dir={folder} holds a run with another configuration:\n"
        + "\n".join(lines)
        + f"\nStart a new run with --run.dir=ANOTHER_FOLDER (add --run.fork-from={folder} to begin "
        f"with its weights), or resume it with --config {folder}/config.yaml."
    )


def _check_empty(path: Path) -> None:
    """Raise UserError if the folder holds files of something else."""
    foreign = sorted(
        entry.name
        for entry in path.iterdir()
        if not entry.name.startswith(".") and entry.suffix != ".partial"
    )
    if foreign:
        shown = ", ".join(foreign[:5]) + (" ..." if len(foreign) > 5 else "")
        raise UserError(
            f"run.dir={path} holds {shown} but no config.yaml, so it is not a run folder; choose "
            "an empty or new one with --run.dir=FOLDER"
        )
