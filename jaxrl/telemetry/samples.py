"""samples.jsonl: a few rollouts of each step, to be read by eye."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrl.telemetry.jsonl import dump_line
from jaxrl.types import Rollout, RolloutGroup


def sample_records(
    step: int, groups: Sequence[RolloutGroup], count: int = 4
) -> list[dict[str, Any]]:
    """The first rollout of `count` groups, evenly spaced: a sample that no reward has chosen."""
    count = min(count, len(groups))
    chosen = [groups[i * len(groups) // count] for i in range(count)]
    return [_record(step, group, group.rollouts[0]) for group in chosen]


def _record(step: int, group: RolloutGroup, rollout: Rollout) -> dict[str, Any]:
    completion, reward = rollout.completion, rollout.reward
    return {
        "step": step,
        "prompt_index": group.prompt.index,
        "prompt": group.prompt.problem.prompt,
        "completion": rollout.text,
        "answer": group.prompt.problem.answer,
        "reward": float(reward.total),
        "reward_parts": {name: float(value) for name, value in reward.parts.items()},
        "correct": bool(reward.correct),
        "tokens": len(completion.tokens),
        "finish": str(completion.finish),
        "version_min": completion.oldest_version,
        "version_max": completion.newest_version,
    }


def append_samples(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Add records to samples.jsonl."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(map(dump_line, records)))


def samples_markdown(records: Sequence[dict[str, Any]]) -> str:
    """The records as Markdown for TensorBoard; texts are indented, so that marks stay text."""
    return "\n\n".join(
        f"**reward {r['reward']:g}, {'correct' if r['correct'] else 'wrong'}**, answer "
        f"`{r['answer']}`, {r['tokens']} tokens, finish {r['finish']}, weights "
        f"{r['version_min']}..{r['version_max']}\n\n"
        + textwrap.indent(f"{r['prompt']}{r['completion']}", "    ", lambda line: True)
        for r in records
    )
