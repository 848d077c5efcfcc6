"""The algorithms of configs/algorithms as one table, on the terminal and in README. Loads no jax.

python -m jaxrl.presets README.md          # rewrite the table between its markers
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxrl.algorithms.config import GrpoConfig
from jaxrl.cli import CONFIG_FOLDERS, About, load_algorithm, user_errors
from jaxrl.config import Config
from jaxrl.errors import UserError

START, END = "<!-- algorithms:start -->", "<!-- algorithms:end -->"


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One algorithm file."""

    name: str
    config: Config
    about: About

    @property
    def choices(self) -> tuple[str, str, str, str]:
        """Advantage, ratio, aggregation and correction in words."""
        if self.config.train.steps == 0:
            return "-", "none: supervised", "token mean", "-"
        grpo = self.config.grpo
        return _advantage(grpo), _ratio(grpo), grpo.aggregation.replace("_", " "), _correction(grpo)


@functools.cache
def presets() -> tuple[Preset, ...]:
    """Every algorithm that ships, by name."""
    folder = next(f / "algorithms" for f in CONFIG_FOLDERS if (f / "algorithms").is_dir())
    made = []
    for path in sorted(folder.glob("*.yaml")):
        config, about = load_algorithm(path, Config())
        made.append(Preset(name=path.stem, config=config, about=about))
    return tuple(made)


def _advantage(grpo: GrpoConfig) -> str:
    baseline = {
        "mean": "group mean", "leave_one_out": "leave one out", "none": "reward", "value": "critic",
    }[grpo.advantage_baseline]  # fmt: skip
    scale = "" if grpo.advantage_scale == "none" else f" / {grpo.advantage_scale.replace('_', ' ')}"
    parts = [baseline + scale]
    if grpo.reward_from != "task":
        parts.append(f"{grpo.reward_from} reward")
    if grpo.keep_samples != "all":
        parts.append(f"{grpo.keep_samples} samples")
    if grpo.kl_in == "reward":
        parts.append(f"{grpo.kl_estimator} in reward {grpo.kl_weight:g}")
    if grpo.length_reward != "none":
        parts.append(grpo.length_reward.replace("_", " "))
    if grpo.entropy_shaping:
        parts.append(f"entropy shaping {grpo.entropy_shaping:g}")
    if grpo.top_entropy_share < 1:
        parts.append(f"top {grpo.top_entropy_share:.0%} entropy")
    return ", ".join(parts)


def _ratio(grpo: GrpoConfig) -> str:
    to = f" to {grpo.ratio_from}"
    if grpo.ratio == "reinforce":
        return "none"
    if grpo.ratio == "sapo":
        return f"sapo {grpo.sapo_tau_positive:g}/{grpo.sapo_tau_negative:g}{to}"
    if grpo.ratio == "dppo":
        return f"dppo {grpo.dppo_delta:g}{to}"
    low, high = grpo.relative_bounds
    dual = f" dual {grpo.dual_clip:g}" if grpo.dual_clip else ""
    return f"{grpo.ratio.replace('_', '-')} [{1 - low:.3g}, {1 + high:.3g}]{dual}{to}"


def _correction(grpo: GrpoConfig) -> str:
    parts = []
    if grpo.correction != "none":
        low = grpo.correction_floor or (
            1 / grpo.correction_cap if grpo.correction == "masked" else 0
        )
        parts.append(
            f"{grpo.correction_level} {grpo.correction} [{low:.3g}, {grpo.correction_cap:g}]"
        )
    if grpo.sequence_mask == "off_policy":
        parts.append(f"off-policy mask {grpo.off_policy_bound:g}")
    elif grpo.sequence_mask != "none":
        parts.append(f"{grpo.sequence_mask} mask [{grpo.mask_low:g}, {grpo.mask_high:g}]")
    if grpo.correction_denominator == "kept":
        parts.append("rejected uncounted")
    if grpo.kl_weight and grpo.kl_in == "loss":
        weighted = "weighted " if grpo.kl_importance else ""
        parts.append(f"{weighted}{grpo.kl_estimator} {grpo.kl_weight:g}")
    return ", ".join(parts) or "-"


def listing() -> str:
    """One line for each algorithm: name, four choices, source."""
    rows = [(preset.name, " | ".join(preset.choices), preset.about.source) for preset in presets()]
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:{width}}  {choices}  <- {source}" for name, choices, source in rows)


def table() -> str:
    """The table of README, with its markers."""
    lines = [
        "| `--algorithm` | advantage | ratio | aggregation | correction, KL in loss | source | departures |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for preset in presets():
        cells = (f"`{preset.name}`", *preset.choices, preset.about.source, preset.about.departures)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([START, *lines, END])


def with_table(text: str) -> str:
    """`text` with the present table between the markers.

    Raises:
        UserError: a marker is missing.
    """
    if START not in text or END not in text:
        raise UserError(
            f"the file has no lines {START} and {END}; add both where the table belongs"
        )
    before, _, rest = text.partition(START)
    return before + table() + rest.partition(END)[2]


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Rewrite the table in the file that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m jaxrl.presets", description=main.__doc__)
    parser.add_argument("file", type=Path, help="Markdown file with the two markers")
    path = parser.parse_args(argv).file
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
