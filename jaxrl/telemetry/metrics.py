"""Curves: metrics.jsonl (one object per optimizer step) and TensorBoard.

Keys are group/name. Non-finite values are written as null (JSON has no NaN), counted under
metrics/nonfinite, and left out of TensorBoard.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from jaxrl.telemetry.jsonl import dump_line, finite_or_none, read_records
from roofline.phases import Phase

_KEY = re.compile(r"[a-z0-9_]+(/[A-Za-z0-9_.@-]+)+")

STORY = {
    "1_reward": "reward/mean",
    "2_held_out_pass_at_1": "eval/pass_at_1",
    "3_decode_measured_over_predicted": "roofline/decode/ratio",
    "4_train_measured_over_predicted": "roofline/train/ratio",
    "5_staleness": "off_policy/staleness_mean",
    "6_mismatch_kl": "mismatch/kl_mean",
}
"""Curves repeated under 00_story/, which TensorBoard sorts to the top of its first page."""


HISTOGRAM_BINS = "sqrt"
"""numpy's rule: the root of the number of values. tensorboardX's own takes 2 ms a step for its quantiles."""
_SHOWN_PHASES = (Phase.DECODE, Phase.TRAIN, Phase.PREFILL, Phase.OPTIMIZER, Phase.PUBLISH)


def story_layout() -> dict[str, dict[str, list[Any]]]:
    """Custom scalar layout: what is learnt, predicted | measured per phase, staleness, mismatch."""
    phases = {
        f"{phase}: predicted | measured [s]": [
            "Multiline",
            [f"roofline/{phase}/predicted_s", f"roofline/{phase}/measured_s"],
        ]
        for phase in _SHOWN_PHASES
    }
    return {
        "1 learning": {
            "reward": ["Multiline", ["reward/mean"]],
            "held-out pass@1": ["Multiline", ["eval/pass_at_1"]],
        },
        "2 predicted and measured": {
            "measured / predicted": ["Multiline", ["roofline/.*/ratio"]],
            **phases,
        },
        "3 staleness": {
            "staleness of consumed samples": ["Multiline", ["off_policy/staleness_.*"]],
            "idle share of each side": ["Multiline", ["perf/.*_idle_ratio"]],
        },
        "4 sampler against learner": {"mismatch": ["Multiline", ["mismatch/.*"]]},
    }


class MetricsWriter:
    """Writes one line per optimizer step and the TensorBoard event files. One thread only."""

    def __init__(
        self,
        path: Path,
        tensorboard_dir: Path | None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Open the files; lines already there stay, and wall_s goes on where they ended.

        Args:
            path: metrics.jsonl.
            tensorboard_dir: folder of the event files; None writes none.
            clock: seconds, monotonic.
        """
        self._last_step, elapsed_s = -1, 0.0
        for record in read_records(path):
            self._last_step, elapsed_s = record["step"], record["wall_s"]
        self._clock = clock
        self._origin_s = clock() - elapsed_s
        self._file = path.open("a", encoding="utf-8")
        self._board = None
        if tensorboard_dir is not None:
            next_step = self._last_step + 1
            self._board = SummaryWriter(
                str(tensorboard_dir),
                purge_step=next_step or None,
                filename_suffix=f".{next_step}",  # two starts within a second get two files
                max_queue=10_000,  # points; with few, every point of a step waits for the writer
            )
            self._board.add_custom_scalars(story_layout())

    def write(
        self, *, step: int, version: int, metrics: Mapping[str, float]
    ) -> dict[str, float | None]:
        """Append the line of one optimizer step and its curves; returns the line.

        Raises:
            ValueError: the step is not after the last one, or a key is not group/name.
        """
        if step <= self._last_step:
            raise ValueError(
                f"metrics of step {step} come after step {self._last_step}; steps must grow, "
                "one line each"
            )
        self._last_step = step
        wall_s = self._clock() - self._origin_s
        values = {_checked_key(key): float(value) for key, value in metrics.items()}
        finite = {key: finite_or_none(value) for key, value in values.items()}
        nonfinite = sum(value is None for value in finite.values())
        line: dict[str, float | None] = {
            "step": step,
            "version": version,
            "wall_s": round(wall_s, 4),
            **finite,
            "metrics/nonfinite": nonfinite,
        }
        self._file.write(dump_line(line))
        self._file.flush()
        self.curves(step, {**values, "metrics/nonfinite": nonfinite})
        return line

    def curves(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add points to TensorBoard only, for values that belong to no line of metrics.jsonl."""
        if self._board is None:
            return
        story = {f"00_story/{name}": metrics[key] for name, key in STORY.items() if key in metrics}
        for key, value in {**metrics, **story}.items():
            if np.isfinite(value):
                self._board.add_scalar(key, float(value), step)

    def histogram(self, name: str, values: Sequence[float] | np.ndarray, step: int) -> None:
        """Distribution within one step, e.g. completions/length, off_policy/staleness."""
        if self._board is not None and len(values):
            values = np.asarray(values, np.float64)
            self._board.add_histogram(_checked_key(name), values, step, bins=HISTOGRAM_BINS)

    def text(self, name: str, markdown: str, step: int) -> None:
        """Markdown, e.g. the sampled rollouts of a step or the resolved configuration."""
        if self._board is not None:
            self._board.add_text(_checked_key(name), markdown, step)

    def config(self, yaml_text: str) -> None:
        """The resolved configuration, on the text page."""
        self.text("run/config", f"```yaml\n{yaml_text}\n```", max(self._last_step, 0))

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Flush and close; may be called twice."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _checked_key(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"metric {key!r} is not group/name with the group in lower case")
    return key


def assert_share(name: str, value: float, *, zero_allowed: bool = False) -> float:
    """`value`, if it lies in (0, 1]; with `zero_allowed` in [0, 1] (idle and padding shares).

    Raises:
        ValueError: it does not: the count above or the time below the fraction bar is wrong.
    """
    if 0 < value <= 1 or (zero_allowed and value == 0):
        return value
    allowed = "[0, 1]" if zero_allowed else "(0, 1]"
    raise ValueError(
        f"{name}={value:g} must lie in {allowed}; its numerator or its denominator is wrong"
    )
