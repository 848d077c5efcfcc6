"""A saved configuration is the configuration."""

import dataclasses
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from jaxrl.cli import config_difference, config_yaml, load_config, parse_args, save_config
from jaxrl.config import (
    Config,
    GrpoConfig,
    ModelOptions,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
)

EXAMPLES = 25  # each parses over a hundred options, 50 ms and more
# A path called None reads back as no path, and surrogates are no text: neither is a file's name.
NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(
    lambda name: name != "None"
)
PATHS = st.none() | NAMES.map(Path)
RATES = st.floats(1e-30, 1e30)
SEEDS = st.integers(0, 2**31 - 1)

CONFIGS = st.builds(
    Config,
    run=st.builds(RunConfig, dir=NAMES.map(Path), seed=SEEDS, fork_from=PATHS, report=...),
    model=st.builds(ModelOptions, path=PATHS, qk_norm=..., dtype=...),
    task=st.builds(TaskConfig, operators=st.text(max_size=6), worked=..., name=..., path=PATHS),
    train=st.builds(
        TrainConfig, learning_rate=RATES, eps=RATES, schedule=..., row_tokens=st.integers(64, 10**6)
    ),
    rollout=st.builds(RolloutConfig, temperature=RATES, kv_on_swap=...),
    grpo=st.builds(
        GrpoConfig,
        clip_low=st.floats(0, 1),
        clip_high=st.floats(0, allow_nan=False),
        advantage_scale=...,
        kl_weight=st.floats(min_value=0, allow_infinity=False, allow_nan=False),
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("configs")


@settings(max_examples=EXAMPLES, deadline=None)
@given(config=CONFIGS)
@example(config=Config(task=TaskConfig(operators="\x85")))  # YAML's next-line, easily folded away
@example(config=Config(task=TaskConfig(operators="")))
@example(config=Config(run=RunConfig(dir=Path("false"))))
def test_saving_and_loading_is_the_identity(config, folder):
    save_config(config, folder / "config.yaml")
    assert load_config(folder / "config.yaml") == config


def test_a_saved_configuration_reproduces_the_command_line_that_made_it(folder):
    words = ["--grpo.clip-high=0.28", "--train.learning-rate=1e-6", "--task.operators=+-*"]
    made = parse_args(words).config
    save_config(made, folder / "config.yaml")
    assert parse_args(["--config", str(folder / "config.yaml")]).config == made


def test_a_saved_configuration_names_every_field(folder):
    text = config_yaml(Config())
    for section in dataclasses.fields(Config):
        assert f"{section.name}:\n" in text
        for item in dataclasses.fields(section.default_factory()):
            assert f"  {item.name}:" in text


def test_a_failed_save_leaves_the_old_file(folder, monkeypatch):
    path = folder / "config.yaml"
    save_config(Config(), path)
    monkeypatch.setattr(Path, "replace", _no_replace)
    with pytest.raises(OSError, match="no replace"):
        save_config(Config(run=RunConfig(seed=1)), path)
    assert load_config(path) == Config()


def _no_replace(self: Path, target: Path) -> Path:
    raise OSError("no replace")


@given(seed=SEEDS, clip=st.floats(0, 1))
def test_the_difference_lists_exactly_the_keys_that_differ(seed, clip):
    base = Config()
    other = dataclasses.replace(
        base, run=RunConfig(seed=seed), grpo=dataclasses.replace(base.grpo, clip_high=clip)
    )
    expected = {}
    if seed != base.run.seed:
        expected["run.seed"] = (base.run.seed, seed)
    if clip != base.grpo.clip_high:
        expected["grpo.clip_high"] = (base.grpo.clip_high, clip)
    assert config_difference(base, other) == expected
