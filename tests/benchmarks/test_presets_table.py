"""The benchmark of algorithms: its command lines parse, and its table says what fell short."""

import importlib
import json
from pathlib import Path

import pytest

from jaxrl.cli import parse_args
from jaxrl.presets import presets

bench = importlib.import_module("benchmarks.presets")
NAMES = [preset.name for preset in presets()]


@pytest.mark.parametrize("name", [*bench.SETTINGS, "grpo", bench.SUPERVISED])
def test_an_algorithm_has_a_command_line_at_the_same_budget(name: str) -> None:
    words = ["--config=configs/quickstart.yaml", *bench.COMMON[1:], *bench.words_of(name)]
    config = parse_args(words).config
    if name == bench.SUPERVISED:
        assert (config.train.steps, config.sft.stop_at_pass) == (0, 1.0)
    else:
        assert config.train.max_generated_tokens == bench.BUDGET_TOKENS
        assert (config.grpo.prompts_per_step, config.grpo.group_size) == (64, 4)
        assert config.sft.steps == 0


def test_settings_name_algorithms_that_exist() -> None:
    assert set(bench.SETTINGS) <= set(NAMES)
    assert {*bench.CONTROLS, bench.SUPERVISED} <= set(NAMES)


def run(before: float, after: float) -> dict[str, float | str]:
    return {
        "before": before, "after": after, "pass_at_8": 0.9, "steps": 400, "tokens": 360_000,
        "wall_s": 60.0, "commit": "0123456789abcdef",
    }  # fmt: skip


def test_the_table_says_who_reached_the_target_and_who_fell_short() -> None:
    found = {
        "grpo": {"0": run(0.5, 0.85), "1": run(0.5, 0.81)},
        "raft": {"0": run(0.5, 0.7)},
        "control_random": {"0": run(0.5, 0.3)},
        "control_format": {"0": run(0.5, 0.75)},
    }
    rows = bench.report(bench.contents({}, found)).splitlines()
    by_name = {row.split("`")[1]: row for row in rows if row.startswith("| `")}
    assert set(by_name) == {"grpo", "raft", "control_random", "control_format"}
    assert "| yes |" in by_name["grpo"]
    assert "83.0%" in by_name["grpo"]
    assert "no, 10.0% short" in by_name["raft"]
    assert "learnt nothing" in by_name["control_random"]
    assert "LEARNT, and should not" in by_name["control_format"]


def test_an_outcome_of_other_words_is_not_kept(tmp_path: Path) -> None:
    found = {"grpo": {"0": run(0.5, 0.85)}, "raft": {"0": run(0.5, 0.7)}}
    content = bench.contents({}, found)
    content["words"]["raft"] = ["--train.steps=1"]
    (tmp_path / "presets.json").write_text(json.dumps(content))
    assert bench._kept(tmp_path) == {"grpo": found["grpo"]}
    assert bench._kept(tmp_path / "nowhere") == {}


def test_an_outcome_of_another_cold_start_is_not_kept(tmp_path: Path) -> None:
    content = bench.contents({}, {"grpo": {"0": run(0.5, 0.85)}, "ttrl": {"0": run(0.75, 0.84)}})
    assert content["cold_starts"] == {"grpo": bench.COLD_START, "ttrl": 0.78}
    content["cold_starts"]["ttrl"] = bench.COLD_START
    (tmp_path / "presets.json").write_text(json.dumps(content))
    assert set(bench._kept(tmp_path)) == {"grpo"}
    starts = [bench.start_folder(tmp_path, 1, at).name for at in (bench.COLD_START, 0.78)]
    assert starts == ["seed_1_start", "seed_1_start_78"]
