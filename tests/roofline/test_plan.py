"""Splits of the devices: feasible, ordered, never better than the continuum, and true to simulation."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from jaxrl.cli import save_config
from jaxrl.config import Config
from models.config import ModelConfig
from roofline.answer import answer
from roofline.closed_form import closed_step_s, expected_staleness
from roofline.datasheets import datasheet
from roofline.events import Mode, Pipeline, simulate
from roofline.job import Job
from roofline.kernels import Layout
from roofline.lengths import Lengths, lognormal
from roofline.phases import Phase
from roofline.plan import advise, best_split, main, split_svg
from roofline.question import Question
from roofline.settings import Settings, read_settings, settings_from
from roofline.simulate import main as simulate_main
from roofline.simulate import pipeline_of, scaled_split
from roofline.splits import learner_times, publish_s, with_staleness

ROUNDING = 1 + 1e-9
CLOSED_FORM_LOW, CLOSED_FORM_HIGH = 0.85, 1.03
"""Closed over simulated step on devices of their own: expectations of maxima leave out that the
slowest cohort of several binds, so the form is a little low; 3 % is sampling."""
STALENESS = 0.1  # latency of a group leaves out what it waits for the end of its chunks
SHARED_LOW, SHARED_HIGH = 0.80, 1.12
"""The same where lanes take turns: how long both compute at once is approximated too."""

MODEL = ModelConfig(
    vocab_size=32000, width=2048, num_layers=24, num_heads=16, num_kv_heads=8, head_size=128,
    ffw_size=6144,
)  # fmt: skip
H200 = datasheet("h200")


def settings(max_staleness: int = 1) -> Settings:
    plain = Settings()
    return dataclasses.replace(
        plain,
        model=dataclasses.replace(plain.model, dtype="bfloat16", remat="block"),
        train=dataclasses.replace(plain.train, row_tokens=1024),
        rollout=dataclasses.replace(
            plain.rollout, max_prompt_tokens=128, max_new_tokens=896, max_staleness=max_staleness
        ),
        grpo=dataclasses.replace(plain.grpo, prompts_per_step=32, group_size=8),
    )


def job(max_staleness: int = 1, lengths: Lengths | None = None) -> Job:
    spread = lognormal(448, 0.6, 896)
    return Job(model=MODEL, settings=settings(max_staleness), lengths=lengths or spread)


@pytest.fixture(scope="module")
def advice():
    return advise(job(), H200, 4)


def test_every_split_uses_all_devices_divides_the_model_and_fits(advice) -> None:
    for split in advice.splits:
        assert split.devices == 4
        for layout in (split.learner, split.rollout):
            assert MODEL.num_kv_heads % layout.tensor == 0
        assert split.slots % split.rollout.data == 0
        assert split.rows_per_microbatch % split.learner.row_shards == 0
        assert max(split.learner_bytes, split.rollout_bytes) <= H200.hbm_bytes


def test_every_placement_and_every_number_of_generators_is_tried(advice) -> None:
    placements = {(s.colocated, s.rollout.devices, s.learner.devices) for s in advice.splits}
    assert placements == {(True, 4, 4), (False, 1, 3), (False, 2, 2), (False, 3, 1)}


def test_no_split_beats_the_continuous_optimum_and_the_best_comes_first(advice) -> None:
    steps = [split.step_s for split in advice.splits]
    assert steps == sorted(steps)
    assert advice.optimum_s <= steps[0] * ROUNDING
    assert advice.regret == pytest.approx(steps[0] / advice.optimum_s - 1)
    assert 0 < advice.optimum_generators < 4


def test_idle_shares_and_staleness_stay_in_their_ranges(advice) -> None:
    for split in advice.splits:
        assert 0 <= split.idle <= 1
        assert 0 <= split.staleness <= split.max_staleness == 1


def test_a_long_tail_makes_asynchrony_pay_and_even_lengths_take_the_gain_away() -> None:
    tail = advise(job(lengths=lognormal(224, 1.0, 896)), H200, 4)
    even = advise(job(lengths=lognormal(224, 0.0, 896)), H200, 4)
    assert tail.speedup > even.speedup
    assert tail.speedup > 1.2


def test_a_looser_bound_is_never_slower() -> None:
    tight, loose = (advise(job(bound), H200, 4).asynchronous for bound in (1, 4))
    assert loose.step_s <= tight.step_s * ROUNDING


def test_one_device_is_shared() -> None:
    assert all(split.colocated for split in advise(job(), H200, 1).splits)


def test_where_nothing_fits_the_smallest_number_of_devices_that_does_is_named() -> None:
    small = dataclasses.replace(H200, hbm_bytes=20e9)
    with pytest.raises(ValueError, match=r"no split of 1 x h200 .* it fits on (\d+)") as refused:
        advise(job(), small, 1)
    needed = int(str(refused.value).rsplit(" ", 1)[1])
    assert advise(job(), small, needed).best.devices == needed
    with pytest.raises(ValueError, match="no split"):
        advise(job(), small, needed - 1)


def test_where_only_recomputation_fits_it_is_proposed_with_its_number_of_devices() -> None:
    long = dataclasses.replace(settings().train, row_tokens=16384)
    remade = dataclasses.replace(job(), settings=dataclasses.replace(settings(), train=long))
    model = dataclasses.replace(settings().model, remat="none")
    kept = dataclasses.replace(remade, settings=dataclasses.replace(remade.settings, model=model))
    small = dataclasses.replace(H200, hbm_bytes=15e9, node_devices=4, network_bytes_per_s=0.0)
    with pytest.raises(ValueError, match=r"with --model\.remat=block it fits on (\d)") as refused:
        advise(kept, small, 2)
    needed = int(str(refused.value).rsplit(" ", 1)[1])
    assert advise(remade, small, needed).best.devices == needed
    with pytest.raises(ValueError, match=r"on no number of them: lower --train\.row_tokens"):
        advise(kept, dataclasses.replace(small, hbm_bytes=1e9), 2)


def test_collectives_beyond_a_node_run_at_the_network_s_rate() -> None:
    slow = dataclasses.replace(H200, network_bytes_per_s=1e9)
    assert advise(job(), slow, 16).best.step_s > advise(job(), H200, 16).best.step_s
    unknown = dataclasses.replace(H200, network_bytes_per_s=0.0)
    with pytest.raises(ValueError, match="use at most 8 devices"):
        advise(job(), unknown, 16)


@pytest.mark.parametrize(
    ("data", "fsdp", "tensor"),
    [(64, 1, 1), (1, 64, 1), (8, 1, 8), (16, 4, 1), (4, 2, 8), (2, 2, 2)],
)
def test_a_learner_over_nodes_is_planned_as_its_phase_is_predicted(
    data: int, fsdp: int, tensor: int
) -> None:
    """Groups that run beside each other in a node share its egress."""
    work = job()
    layout = Layout(
        data=data, fsdp=fsdp, tensor=tensor, compute_dtype="bfloat16", kv_dtype="bfloat16",
        attention="cudnn",
    )  # fmt: skip
    rows = -(-work.rows_per_step // layout.row_shards) * layout.row_shards
    slow = dataclasses.replace(H200, network_bytes_per_s=5e9)
    asked = Question(
        model=MODEL, hardware=slow, phase=Phase.TRAIN, batch=rows, tokens=1024, data=data, fsdp=fsdp,
        tensor=tensor, remat="block",
    )  # fmt: skip
    planned = learner_times(work, slow, layout, rows)
    assert planned.phase_s[Phase.TRAIN] == pytest.approx(answer(asked).prediction.expected_s)
    if layout.devices > 8:
        assert planned.seconds > learner_times(work, H200, layout, rows).seconds


def test_weights_that_leave_the_node_are_published_at_each_device_s_part_of_the_network() -> None:
    learner, generators = Layout(data=8), Layout(data=56, param_dtype="bfloat16")
    bf16 = 2.0 * MODEL.num_parameters
    copies = bf16 * 56 / 8 / H200.network_bytes_per_s / H200.efficiency.link
    seconds = publish_s(MODEL, learner, generators, H200, colocated=False)
    assert copies < seconds < 1.2 * copies
    beside = publish_s(MODEL, Layout(data=4), Layout(data=4), H200, colocated=False)
    assert beside < seconds / 20


# -- closed form against simulation ----------------------------------------------------------------

CASES = list(itertools.product((0.25, 1, 2), (0, 1, 4), (0.2, 2.0), (0.3, 0.8)))


@pytest.mark.parametrize(
    ("contention", "low", "high"),
    [(1.0, CLOSED_FORM_LOW, CLOSED_FORM_HIGH), (2.0, SHARED_LOW, SHARED_HIGH)],
)
@pytest.mark.parametrize(("slots_share", "bound", "learner_s", "sigma"), CASES)
def test_the_closed_form_agrees_with_the_simulation(
    slots_share: float, bound: int, learner_s: float, sigma: float,
    contention: float, low: float, high: float,
) -> None:  # fmt: skip
    lengths, samples, step_s = lognormal(64, sigma, 256), 64, 0.01
    slots = int(samples * slots_share)
    held = lengths.in_chunks(4).mean
    reused = max(0, samples - slots) / slots * held
    steady_s = samples * held / slots * step_s
    lockstep_s = (reused + lengths.expected_max(min(samples, slots))) * step_s
    closed = closed_step_s(steady_s, lockstep_s, learner_s, bound, contention=contention)
    work = Pipeline(
        mode=Mode.IN_FLIGHT, prompts_per_step=16, group_size=4, slots=slots, chunk_steps=4,
        decode_step_s=step_s, learner_s=learner_s, max_staleness=bound, contention=contention,
    )  # fmt: skip
    simulated = simulate(work, lengths, steps=bound + 2 + 40).step_s
    assert low <= closed / simulated <= high


@pytest.mark.parametrize("contention", [1.0, 2.0])
def test_expected_staleness_is_what_the_simulation_counts(contention: float) -> None:
    lengths, samples, step_s, learner_s = lognormal(64, 0.6, 256), 64, 0.01, 0.2
    work = Pipeline(
        mode=Mode.IN_FLIGHT, prompts_per_step=16, group_size=4, slots=32, chunk_steps=4,
        decode_step_s=step_s, learner_s=learner_s, max_staleness=6, contention=contention,
    )  # fmt: skip
    seen = simulate(work, lengths, steps=200)
    steady_s = samples * lengths.in_chunks(4).mean / 32 * step_s
    latency_s = lengths.expected_max(4) * step_s
    closed = closed_step_s(steady_s, 2 * steady_s, learner_s, 6, contention=contention)
    stale = expected_staleness(steady_s, latency_s, learner_s, closed, 6, contention=contention)
    assert stale == pytest.approx(seen.mean_staleness, rel=STALENESS)


def test_a_split_s_step_is_what_its_simulation_takes() -> None:
    work = job()
    split = next(s for s in advise(work, H200, 4).splits if not s.colocated)
    seen = simulate(pipeline_of(work, split, H200, Mode.IN_FLIGHT), work.lengths, steps=43)
    assert CLOSED_FORM_LOW <= split.step_s / seen.step_s <= CLOSED_FORM_HIGH
    lockstep = simulate(pipeline_of(work, split, H200, Mode.SYNCHRONOUS), work.lengths, steps=43)
    assert lockstep.step_s > seen.step_s


def test_nodes_side_by_side_hold_as_many_times_the_batch() -> None:
    grown, split = scaled_split(job(), H200, 32)
    assert split.devices == 32
    assert grown.settings.samples_per_step == 4 * job().settings.samples_per_step
    with pytest.raises(ValueError, match="use 24 or 32"):
        scaled_split(job(), H200, 30)


# -- settings --------------------------------------------------------------------------------------


def test_settings_have_the_names_and_defaults_of_the_run_s_configuration() -> None:
    config = Config()
    for section in dataclasses.fields(Settings):
        ours, theirs = getattr(Settings(), section.name), getattr(config, section.name)
        for field in dataclasses.fields(ours):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


def test_a_complete_configuration_is_read_and_no_key_of_it_refused(tmp_path: Path) -> None:
    save_config(Config(), tmp_path / "config.yaml")
    assert read_settings(str(tmp_path)) == Settings()
    assert settings_from(dataclasses.asdict(Config())) == Settings()
    words = ["--rollout.max-staleness=3", "--model.dtype", "bfloat16"]
    seen = read_settings(str(tmp_path), words)
    assert (seen.rollout.max_staleness, seen.model.dtype) == (3, "bfloat16")
    assert with_staleness(seen, 1).rollout.max_staleness == 1


@pytest.mark.parametrize(
    ("tree", "words", "message"),
    [
        (
            {"rollout": {"slot": 8}},
            [],
            r"unknown setting rollout\.slot; did you mean rollout\.slots",
        ),
        ({"rollout": {"slots": "many"}}, [], r"rollout\.slots='many' is a str"),
        ({}, ["--rollout.slotz=8"], r"unknown setting rollout\.slotz; did you mean rollout\.slots"),
        ({}, ["--rollout.slots"], "has no value"),
        ({}, ["slots=8"], "unknown argument 'slots=8'"),
    ],
)
def test_a_misspelt_setting_is_refused_with_the_nearest(
    tmp_path: Path, tree: dict, words: list[str], message: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=message):
        read_settings(str(path), words)


# -- commands --------------------------------------------------------------------------------------

ARGUMENTS = ["--config", "quickstart", "--hardware", "l4", "--devices", "2"]


def test_the_command_prints_every_split_as_json_and_as_a_curve(capsys, tmp_path: Path) -> None:
    main([*ARGUMENTS, "--json", "--svg", str(tmp_path / "split.svg")])
    seen = json.loads(capsys.readouterr().out)
    assert seen["splits"][0]["step_s"] == min(split["step_s"] for split in seen["splits"])
    assert ElementTree.parse(tmp_path / "split.svg").getroot().tag.endswith("svg")


def test_the_command_marks_the_best_and_says_which_mode_wins(capsys) -> None:
    main(ARGUMENTS)
    text = capsys.readouterr().out
    for words in ("* ", "regret", "times as fast: synchronous", "lognormal"):
        assert words in text


def test_a_single_placement_still_makes_a_curve() -> None:
    assert "<svg" in split_svg(advise(job(), H200, 1))


def test_simulation_prints_each_mode_with_its_staleness(capsys) -> None:
    simulate_main([*ARGUMENTS, "--steps", "8"])
    text = capsys.readouterr().out
    assert all(mode.value in text for mode in Mode)
    assert "staleness 0" in text


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        (main, ["--config", "nowhere"], "no configuration 'nowhere'"),
        (main, [*ARGUMENTS[:3], "h300"], "did you mean"),
        (main, [*ARGUMENTS, "--rollout.slots=0"], "rollout.slots=0 must be a number of at least 1"),
        (
            main,
            [*ARGUMENTS, "--task.reward_workers=-1"],
            "reward_workers=-1 must be a number of at least 0",
        ),
        (main, [*ARGUMENTS, "--task.reward_latency_s=.nan"], "reward_latency_s=nan must be"),
        (main, [*ARGUMENTS, "--model.dtype=bf16"], "did you mean 'bfloat16'"),
        (main, [*ARGUMENTS, "--rollout.cache_dtype=int9"], "did you mean 'int8'"),
        (main, [*ARGUMENTS, "--rollout.max_new_tokens=1024"], "set --train.row_tokens=1032"),
        (simulate_main, [*ARGUMENTS, "--seed=-1"], "--seed=-1 must be >= 0"),
        (main, ["--config", "quickstrt"], "did you mean 'quickstart'"),
        (main, [*ARGUMENTS, "--vocab-size", "-3"], "--vocab-size=-3 must be >= 1"),
        (main, [*ARGUMENTS, "--model", "qwen3-1.8b"], "did you mean 'qwen3-1.7b'"),
        (main, [*ARGUMENTS, "--devices", "0"], "--devices=0 must be at least 1"),
        (main, [*ARGUMENTS, "--mean-tokens", "99"], r"must lie in [1, 6]"),
        (simulate_main, [*ARGUMENTS, "--steps", "2"], "warm-up of 3"),
    ],
)
def test_what_cannot_be_is_refused_with_exit_code_2(command, arguments, words, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        command(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_mesh_auto_takes_the_best_split_of_the_run_s_own_bound() -> None:
    chosen = best_split(MODEL, settings(0), H200, 2)
    assert chosen.max_staleness == 0
    assert chosen.devices == 2


def test_rows_with_shared_prompts_must_hold_the_longest_completion_in_each_part(capsys) -> None:
    words = [*ARGUMENTS, "--train.shared_prompt_tokens=32", "--train.row_parts=4"]
    words += ["--rollout.max_new_tokens=100", "--mean-tokens=50"]
    main([*words, "--train.row_tokens=432", "--json"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*words, "--train.row_tokens=428"])
    assert "set --train.row_tokens=432" in capsys.readouterr().err


def test_a_long_search_shows_a_bar_on_a_terminal_and_leaves_the_output_alone(
    capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--config", "quickstart", "--hardware", "h200", "--devices", "2", "--json"]
    main(words)
    quiet = capsys.readouterr()
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any stream for a terminal
    main(words)
    shown = capsys.readouterr()
    assert quiet.err == ""
    assert "splits of 2 devices" in shown.err
    assert json.loads(shown.out) == json.loads(quiet.out)
