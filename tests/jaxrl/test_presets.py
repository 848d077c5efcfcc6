"""Algorithm files: each parses, names its source, composes; the table and the listing; what is refused."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrl import cli
from jaxrl.algorithms.contradictions import unread
from jaxrl.config import Config, GrpoConfig, RolloutConfig
from jaxrl.errors import UserError
from jaxrl.presets import END, START, Preset, listing, presets, table, with_table

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = {"grpo", "sft", "train"}  # a task, a model and a mesh are nobody's algorithm


@pytest.fixture(scope="module")
def shipped() -> tuple[Preset, ...]:
    return presets()


def test_every_algorithm_has_a_source_and_says_how_it_departs(shipped):
    assert len(shipped) >= 30
    for preset in shipped:
        assert preset.about.source
        assert preset.about.departures
        assert all(preset.choices)


def test_an_algorithm_touches_neither_task_nor_model_nor_devices(shipped):
    for preset in shipped:
        changed = cli.config_difference(Config(), preset.config)
        assert {key.partition(".")[0] for key in changed} <= SECTIONS, preset.name
        assert not {"grpo.prompts_per_step", "grpo.group_size", "train.learning_rate"} & set(
            changed
        )


def test_no_two_algorithms_are_the_same(shipped):
    configs = [preset.config for preset in shipped]
    assert len(set(configs)) == len(configs)
    assert next(p for p in shipped if p.name == "bypass").config == Config()  # written out


def test_an_algorithm_replaces_all_of_grpo_but_the_batch(shipped):
    """Whatever the configuration below says, as stories does of KL and clip."""
    stories = cli.load_config(cli.resolve_config("stories"))
    sums = dataclasses.replace(stories, task=Config().task)  # with answers to vote on
    for preset in shipped:
        base = sums if preset.config.grpo.reward_from == "majority" else stories
        made, _ = cli.load_algorithm(cli.resolve_config(preset.name, "--algorithm"), base)
        assert made.grpo == dataclasses.replace(
            preset.config.grpo,
            prompts_per_step=base.grpo.prompts_per_step,
            group_size=base.grpo.group_size,
        )
        assert (made.task, made.model, made.rollout) == (base.task, base.model, base.rollout)


def test_the_command_line_wins_over_the_algorithm():
    words = ["--algorithm", "dapo", "--grpo.clip-high=0.5"]
    assert cli.parse_args(words).config.grpo.clip_high == 0.5


def test_the_command_line_mends_what_contradicts_the_algorithm():
    """Magistral's reward has a penalty of length already; gspo_token has entropy shaping, gspo none."""
    words = ["--config=qwen3_4b_magistral_8gpu", "--algorithm=magistral"]
    with pytest.raises(UserError, match=r"set grpo\.length_reward=none"):
        cli.parse_args(words)
    made = cli.parse_args([*words, "--grpo.length-reward=none"]).config
    assert (made.task.shaping.kind, made.grpo.length_reward) == ("magistral", "none")
    made, _ = cli.load_algorithm(
        cli.resolve_config("reinforce_pp", "--algorithm"),
        Config(grpo=GrpoConfig(group_size=1, advantage_baseline="none", advantage_scale="none",
                               drop_zero_advantage=False)),
    )  # fmt: skip
    assert made.grpo.group_size == 1
    words = ["--algorithm=gspo_token", "--grpo.ratio=gspo", "--grpo.entropy-shaping=0"]
    assert cli.parse_args(words).config.grpo.ratio == "gspo"


@pytest.mark.parametrize(
    "name", ["gspo", "gspo.yaml", "algorithms/gspo", "configs/algorithms/gspo.yaml"]
)
def test_an_algorithm_is_found_by_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.parse_args(["--algorithm", name]).config.grpo.ratio == "gspo"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--algorithm", "gsop"], "did you mean gspo?"),
        (["--algorithm", "gspo", "--algorithm=dapo"], "--algorithm is given 2 times"),
    ],
)
def test_a_wrong_algorithm_is_refused_with_a_remedy(words, said):
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        cli.parse_args(words)


def test_a_file_without_its_source_is_no_algorithm(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("about: {source: me}\ngrpo: {clip_high: 0.3}\n")
    with pytest.raises(UserError, match="a section 'about' with exactly departures, source"):
        cli.load_algorithm(path, Config())


def test_a_misspelt_key_of_an_algorithm_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text('about: {source: me, departures: "-"}\ngrpo: {clip_hihg: 0.3}\n')
    with pytest.raises(UserError, match=r"mine\.yaml is not a valid configuration"):
        cli.load_algorithm(path, Config())


def test_readme_holds_the_table_made_from_the_files():
    assert table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_is_replaced_between_its_markers():
    old = f"before\n{START}\n| old |\n{END}\nafter\n"
    assert with_table(old) == f"before\n{table()}\nafter\n"
    with pytest.raises(UserError, match="add both"):
        with_table("no markers")


def test_the_listing_has_a_line_for_each_algorithm(shipped):
    lines = listing().splitlines()
    assert [line.split()[0] for line in lines] == [preset.name for preset in shipped]


def test_the_listing_is_printed_without_a_run():
    done = subprocess.run(
        [sys.executable, "-m", "jaxrl.train", "--list-algorithms"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == listing()


BATCH = {"drop_zero_advantage": False}
KEPT = {"correction_denominator": "kept"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ratio": "gspo", "aggregation": "sequence_sum"}, "sequence ratio and needs"),
        ({"ratio": "gspo_token"}, "sequence ratio and needs"),
        (
            {"ratio": "gspo", "aggregation": "sequence_mean", "advantage_baseline": "value",
             "advantage_scale": "none", **BATCH},
            "set grpo.ratio=gspo_token",
        ),
        ({"correction": "truncated"}, "by learner/sampler twice"),
        ({"kl_in": "reward", **BATCH}, "subtracts nothing"),
        ({"kl_in": "reward", "kl_weight": 0.1}, "still differ in their KL"),
        (
            {"kl_in": "reward", "kl_weight": 0.1, "kl_estimator": "k3_straight", **BATCH},
            "k1 (exact there)",
        ),
        ({"kl_in": "reward", "kl_weight": 0.1, "kl_bound": 10.0, **BATCH}, "set grpo.kl_in=loss"),
        ({"kl_importance": True}, "that grpo.kl_weight=0 leaves out"),
        ({"kl_target": 1.0, "kl_horizon": 0}, "usual: 10000"),
        ({"kl_weight": -0.1}, "must be at least 0"),
        ({"clip_high": float("nan")}, "must be a finite number"),
        ({"entropy_weight": float("inf")}, "must be a finite number"),
        ({"gamma": 0.9}, "compares whole completions"),
        ({"gae_lambda": 0.95}, "has no critic"),
        ({"kl_target": 1.0}, "adapts the KL of grpo.kl_in=reward only"),
        ({"reference_refresh_steps": 10}, "refreshes a reference that nothing uses"),
        ({"group_size": 1}, "at least 2 samples"),
        ({"advantage_baseline": "none", "advantage_scale": "none"}, "drop_zero_advantage=false"),
        ({"advantage_baseline": "value", **BATCH}, "compares samples of a group"),
        (
            {"advantage_baseline": "value", "advantage_scale": "batch_std", **BATCH},
            "rewards per token",
        ),
        ({"refill_rounds": 3, **BATCH}, "grpo.drop_zero_advantage=true drops"),
        ({"minibatches": 17}, "a minibatch holds whole groups"),
        ({"count_masked": True}, "set both or neither"),
        ({"mask_truncated": True, "count_masked": True, "minibatches": 2}, "over the whole batch"),
        ({"length_reward": "cosine", "reward_scale": 2.0}, "would change nothing"),
        ({"overlong_buffer": 4}, "nothing but soft_overlong uses a buffer"),
        ({"overlong_buffer": -4}, "a fifth of the limit"),
        ({"advantage_scale": "group_mean", "reward_shift": -0.5}, "can make negative"),
        ({"correction": "masked", "correction_cap": 1.0, "ratio_from": "learner"}, "exact agreement"),
        ({"ratio": "gspo", "aggregation": "sequence_mean", "entropy_shaping": 0.4}, "gspo_token"),
        ({"ratio": "gspo", "aggregation": "sequence_mean", "top_entropy_share": 0.2}, "gspo_token"),
        ({"ratio": "cispo", "clip_bounds": "absolute"}, "0 <= clip_low=0.2 <= 1 <= clip_high"),
        ({"ratio": "cispo", "dual_clip": 3.0}, "bounds the PPO clip only"),
        ({"entropy_shaping": 0.4, "entropy_shaping_bound": 1.0}, "advantages change sign"),
        ({"top_entropy_share": 0.0}, "must lie in"),
        ({"mask_low": 1.1}, "either side of 1"),
        (KEPT, "nothing is left out that could be uncounted; set grpo.correction=masked or"),
        ({"correction": "truncated", "ratio_from": "learner", **KEPT}, "nothing is left out"),
        ({"sequence_mask": "off_policy", **KEPT}, "made before the first update"),
        (
            {"ratio": "gspo", "aggregation": "sequence_mean", "ratio_from": "learner",
             "correction": "masked", **KEPT},
            "set grpo.correction_level=sequence or geometric",
        ),
        (
            {"mask_truncated": True, "count_masked": True, "sequence_mask": "product", **KEPT},
            "does not; set grpo.count_masked=false",
        ),
    ],
)  # fmt: skip
def test_contradictions_are_refused_with_the_reason(settings, said):
    with pytest.raises(UserError) as refused:
        GrpoConfig(**settings)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ratio_from": "learner", "correction": "truncated"},
        {"ratio_from": "learner", "sequence_mask": "geometric"},
    ],
)
def test_a_filtered_sampler_refuses_a_ratio_to_it(settings):
    with pytest.raises(UserError, match=r"grpo\.ratio_from=learner with .* or top_p=1"):
        Config(rollout=RolloutConfig(top_p=0.9), grpo=GrpoConfig(**settings))


def test_a_penalty_longer_than_the_completions_is_refused():
    grpo = GrpoConfig(length_reward="soft_overlong", overlong_buffer=40)
    with pytest.raises(UserError, match="set it to 0 for a fifth"):
        Config(grpo=grpo)


@pytest.mark.parametrize("name", ["clip_high", "correction_cap", "mask_high"])
def test_infinity_switches_a_bound_off(name):
    """AReaL's newer default, CISPO as importance-weighted REINFORCE."""
    made = cli.parse_args([f"--grpo.{name}=inf", "--grpo.ratio-from=learner"]).config.grpo
    assert getattr(made, name) == float("inf")


@pytest.mark.parametrize(
    ("settings", "written", "switch"),
    [
        ({"correction_cap": 5.0}, "correction_cap=5.0", "grpo.correction=truncated or masked"),
        ({"ratio": "sapo", "clip_high": 0.28}, "clip_high=0.28", "grpo.ratio=ppo, cispo or gspo"),
        (
            {"kl_estimator": "k2"},
            "kl_estimator=k2",
            "a reference: grpo.kl_weight or grpo.log_reference",
        ),
        (
            {"sequence_mask": "off_policy", "mask_high": 3.0},
            "mask_high=3.0",
            "grpo.sequence_mask=geom",
        ),
        ({"off_policy_bound": 0.1}, "off_policy_bound=0.1", "grpo.sequence_mask=off_policy"),
        ({"value_clip": 0.1}, "value_clip=0.1", "a critic: grpo.advantage_baseline=value"),
        ({"sapo_tau_positive": 2.0}, "sapo_tau_positive=2.0", "grpo.ratio=sapo"),
        ({"dppo_delta": 0.1}, "dppo_delta=0.1", "grpo.ratio=dppo"),
        (
            {"top_entropy_denominator": "kept"},
            "top_entropy_denominator=kept",
            "grpo.top_entropy_share",
        ),
        ({"entropy_shaping_bound": 3.0}, "entropy_shaping_bound=3.0", "grpo.entropy_shaping"),
        ({"kl_horizon": 5}, "kl_horizon=5", "grpo.kl_target"),
        ({"repetition_penalty": 0.5}, "repetition_penalty=0.5", "grpo.repetition_ngram"),
        ({"overlong_penalty": 0.1}, "overlong_penalty=0.1", "grpo.length_reward=soft_overlong"),
    ],
)
def test_a_setting_that_another_one_switches_off_is_told(settings, written, switch):
    ((told, read_with),) = unread(GrpoConfig(**settings))
    assert told == f"grpo.{written}"
    assert read_with.startswith(switch)


def test_an_algorithm_has_no_setting_that_is_not_read(shipped):
    assert {
        preset.name: unread(preset.config.grpo) for preset in shipped if unread(preset.config.grpo)
    } == {}


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({}, False),
        ({"ratio_from": "learner"}, False),
        ({"ratio_from": "learner", "epochs": 2}, True),
        ({"epochs": 2}, False),
        ({"top_entropy_share": 0.2}, True),
        ({"sequence_mask": "geometric", "minibatches": 2}, True),
        ({"sequence_mask": "geometric"}, False),
        ({"sequence_mask": "geometric", **KEPT}, True),
    ],
)
def test_the_batch_is_scored_first_only_where_something_needs_it(settings, first):
    assert GrpoConfig(**settings).scores_first == first
