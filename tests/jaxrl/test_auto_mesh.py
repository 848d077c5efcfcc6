"""`--mesh auto` takes the plan's split; plan, predict and dry run say the same of one configuration."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxrl import build, train
from jaxrl.attention import choose_programs
from jaxrl.auto_mesh import resolve, resolved_before, with_split
from jaxrl.cli import load_config, parse_args, resolve_config, save_config
from jaxrl.config import Config
from jaxrl.errors import UserError
from jaxrl.plan import make_plan, workload_of
from models.config import ModelConfig
from roofline import settings
from roofline.answer import answer
from roofline.choose import find_hardware
from roofline.datasheets import datasheet
from roofline.hardware import Efficiency, Hardware
from roofline.job import Job
from roofline.lengths import lognormal
from roofline.model_zoo import find_model
from roofline.phases import Phase
from roofline.plan import advise, assumed_lengths, best_split
from roofline.question import Question
from roofline.splits import layouts, learner_times, rollout_times, split_of

ROUNDING = 1e-9
ALGORITHMS = Path(__file__).resolve().parents[2] / "configs" / "algorithms"
H200 = datasheet("h200")
SHARED = dataclasses.replace(
    H200, name="test machine", devices_share_cores=False, contention=1.3, calibrated=True,
    phase_efficiency={"decode": Efficiency(compute=0.4, memory=0.5, call_s=1e-3)},
)  # fmt: skip
CPU = dataclasses.replace(SHARED, devices_share_cores=True)


def quickstart() -> Config:
    return load_config(resolve_config("quickstart"))


def of_job(config: Config, model: ModelConfig) -> Job:
    of = settings.settings_from(dataclasses.asdict(config))
    return Job(model=model, settings=of, lengths=assumed_lengths(of))


def model_of(config: Config) -> ModelConfig:
    return build.make_subject(config).model


@pytest.mark.parametrize("words", [["--mesh", "auto"], ["--mesh=auto"], ["--mesh.auto=true"]])
def test_the_word_means_the_setting(words: list[str]) -> None:
    parsed = parse_args(["--config", "quickstart", *words, "--rollout.slots=64"])
    assert parsed.config.mesh.auto
    assert parsed.config.rollout.slots == 64


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("qwen3_0.6b_gsm8k_1gpu", "qwen3-0.6b"),
        ("qwen2.5_1.5b_gsm8k_1gpu", "qwen2.5-1.5b"),
        ("qwen3_4b_math_8gpu", "qwen3-4b"),
        ("qwen3_4b_magistral_8gpu", "qwen3-4b"),
    ],
)
def test_no_split_of_its_h100s_beats_a_gpu_configuration_by_a_tenth(name: str, model: str) -> None:
    config, hardware = load_config(resolve_config(name)), datasheet("h100-sxm")
    job = of_job(config, find_model(model).config)
    mesh = config.mesh
    learners = layouts(job, hardware, mesh.learner_devices, learner=True)
    rollouts = layouts(job, hardware, mesh.rollout_devices, learner=False)
    learner = next(
        o for o in learners if (o.data, o.fsdp) == (mesh.learner_data, mesh.learner_fsdp)
    )
    rollout = next(o for o in rollouts if o.data == mesh.rollout_data)
    configured = split_of(
        job, hardware,
        learner_times(job, hardware, learner, config.train.rows_per_microbatch),
        rollout_times(job, hardware, rollout, config.rollout.slots),
        config.rollout.max_staleness, colocated=mesh.colocated,
    )  # fmt: skip
    best = advise(job, hardware, mesh.devices).best
    assert configured.step_s <= 1.1 * best.step_s


def test_a_yaml_file_may_say_it_too(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("mesh: auto\nrollout: {slots: 64}\n")
    assert load_config(path).mesh.auto
    assert settings.read_settings(str(path)).rollout.slots == 64


@pytest.mark.parametrize("words", [["--mesh", "all"], ["--mesh=8"], ["--mesh"]])
def test_any_other_word_is_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match="auto is the only word"):
        parse_args(["--config", "quickstart", *words])


def test_the_chosen_split_is_the_plan_s_best_for_the_devices_there_are() -> None:
    config = quickstart()
    model = model_of(config)
    chosen, said = resolve(config, model, H200)
    devices = len(jax.local_devices())
    best = best_split(model, settings.settings_from(dataclasses.asdict(config)), H200, devices)
    assert chosen.mesh.devices == devices == 8
    assert chosen == with_split(config, best)
    assert not chosen.mesh.auto
    text = "\n".join(said)
    for words in ("mesh auto: ", "the fastest of", "next best", "regret", "per step"):
        assert words in text


def test_a_dry_run_on_eight_devices_prints_the_split_and_its_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(train, "cached_or_calibrate", lambda *_, **__: H200)
    folder = f"--run.dir={tmp_path / 'run'}"
    train.main(["--config", "quickstart", "--mesh", "auto", "--dry-run", folder])
    text = capsys.readouterr().out
    assert "mesh auto: " in text
    assert "regret" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["devices", "8"] in [row[:2] for row in rows]


def test_a_run_that_began_goes_on_with_the_split_that_it_began_with(
    tiny_config: Callable[..., Config],
) -> None:
    config = tiny_config()
    assert resolved_before(config) is None
    chosen, _ = resolve(config, model_of(config), H200)
    config.run.dir.mkdir(parents=True, exist_ok=True)
    save_config(chosen, config.run.dir / "config.yaml")
    auto = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, auto=True))
    assert resolved_before(auto) == chosen


@pytest.mark.parametrize("hardware", [H200, SHARED, CPU], ids=["datasheet", "calibrated", "cpu"])
@pytest.mark.parametrize("bound", [0, 1])
def test_plan_predict_and_dry_run_agree(
    monkeypatch: pytest.MonkeyPatch, hardware: Hardware, bound: int
) -> None:
    if hardware is not CPU:  # this process has none of the hardware that it plans for
        monkeypatch.setattr("models.fused.can_view", lambda *_: False)
    config = quickstart()
    limit = config.rollout.max_new_tokens
    config = dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, max_staleness=bound)
    )
    model = model_of(config)
    job = Job(
        model=model, settings=settings.settings_from(dataclasses.asdict(config)),
        lengths=lognormal(limit, 0, limit),
    )  # fmt: skip
    planned = next(split for split in advise(job, hardware, 2).splits if not split.colocated)
    config = with_split(config, planned)
    dry, rollout = make_plan(config, model, hardware), config.rollout
    assert planned.phase_s == pytest.approx(dry.phase_s, rel=ROUNDING)
    assert planned.step_s == pytest.approx(dry.overlapped_s if bound else dry.lockstep_s)
    common = {"model": model, "hardware": hardware, "dtype": config.model.dtype}
    chunk = Question(
        **common, phase=Phase.DECODE, batch=rollout.slots, steps=rollout.chunk_steps,
        kv_len=rollout.max_prompt_tokens + limit,
    )  # fmt: skip
    chunks = -(-limit // rollout.chunk_steps) * dry.samples / rollout.slots
    decode_s = chunks * answer(chunk).prediction.expected_s
    assert decode_s == pytest.approx(dry.phase_s[Phase.DECODE], rel=ROUNDING)
    optimizer = answer(Question(**common, phase=Phase.OPTIMIZER)).prediction.expected_s
    assert optimizer == pytest.approx(dry.phase_s[Phase.OPTIMIZER], rel=ROUNDING)
    rows = config.train.rows_per_microbatch
    micro = answer(
        Question(**common, phase=Phase.TRAIN, batch=rows, tokens=config.train.row_tokens)
    )
    fixed_s = dry.phase_s[Phase.TRAIN] / dry.microbatches
    assert micro.prediction.expected_s == pytest.approx(fixed_s, rel=ROUNDING)


def test_this_machine_means_the_calibration_that_measured_the_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = quickstart()
    of_it = settings.settings_from(dataclasses.asdict(config))

    def store(name: str, slots: int) -> Hardware:
        shapes = dataclasses.replace(workload_of(config), slots=slots)
        made = dataclasses.replace(
            SHARED, name=name,
            measured_for={
                "model": dataclasses.asdict(model_of(config)),
                "workload": dataclasses.asdict(shapes),
            },
        )  # fmt: skip
        made.save(tmp_path / "jaxrl" / "calibration" / f"{name}.json")
        return made

    store("of it", config.rollout.slots)
    assert find_hardware("this", of_it).name == "of it"
    other = tmp_path / "jaxrl" / "calibration" / "of another.json"
    store("of another", 7)
    later = other.stat().st_mtime + 10
    os.utime(other, (later, later))
    assert find_hardware("this").name == "of another"
    assert find_hardware("this", of_it).name == "of it"
    assert not capsys.readouterr().err
    (tmp_path / "jaxrl" / "calibration" / "of it.json").unlink()
    assert find_hardware("this", of_it).name == "of another"
    assert "no calibration of this machine measured" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(path.stem for path in ALGORITHMS.glob("*.yaml")))
def test_the_plan_counts_the_passes_of_every_algorithm(name: str) -> None:
    config = parse_args(["--config", "quickstart", "--algorithm", name]).config
    seen = settings.settings_from(dataclasses.asdict(config))
    assert seen.scoring_passes == config.grpo.scoring_passes
    assert seen.updates_per_step == config.grpo.updates_per_step


def test_the_plan_counts_the_pass_that_rejection_sampling_needs() -> None:
    words = ["--config=quickstart", "--algorithm=sequence_mask"]
    without = parse_args(words).config
    config = parse_args([*words, "--grpo.correction-denominator=kept"]).config
    seen = settings.settings_from(dataclasses.asdict(config))
    assert seen.scoring_passes == config.grpo.scoring_passes == without.grpo.scoring_passes + 1


@pytest.mark.usefixtures("optax_promotes")
@pytest.mark.slow
def test_a_short_run_on_two_devices_learns_on_the_split_that_was_chosen(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "cached_or_calibrate", lambda *_, **__: SHARED)
    pair = jax.local_devices()[:2]
    monkeypatch.setattr(jax, "local_devices", lambda: pair)
    config = tiny_config()
    path = config.run.dir.parent / "tiny.yaml"
    save_config(config, path)
    train.main(["--config", str(path), "--mesh", "auto"])
    stored = load_config(config.run.dir / "config.yaml")
    assert stored.mesh.devices == 2
    assert not stored.mesh.auto
    assert (config.run.dir / "summary.json").is_file()


@pytest.mark.parametrize("card", ["a100-sxm-80gb", "h100-sxm", "b200", "rtx-4090"])
@pytest.mark.parametrize(
    ("dtype", "asked", "parts"),
    [
        ("bfloat16", "auto", 1),
        ("bfloat16", "auto", 2),
        ("float32", "auto", 1),
        ("bfloat16", "xla", 1),
    ],
)
def test_the_plan_of_a_card_attends_with_the_programs_that_a_run_takes_there(
    card: str, dtype: str, asked: str, parts: int
) -> None:
    words = ["--config", "quickstart", f"--model.dtype={dtype}", f"--model.attention={asked}"]
    if parts > 1:
        words += ["--train.shared-prompt-tokens=32", f"--train.row-parts={parts}"]
        words += ["--train.row-tokens=96"]
    config, hardware = parse_args(words).config, datasheet(card)
    device = SimpleNamespace(
        platform="gpu", device_kind="a card", compute_capability=str(hardware.capability)
    )
    shape = dataclasses.replace(model_of(config), head_size=64)
    run = choose_programs(config, device, shape, {})
    seen = settings.settings_from(dataclasses.asdict(config))
    job = Job(model=shape, settings=seen, lengths=lognormal(4, 0.5, 6))
    best = advise(job, hardware, 2).best
    assert (best.learner.attention, best.rollout.attention) == (run.train, run.prompts)
    question = Question(model=shape, hardware=hardware, phase=Phase.PREFILL, dtype=dtype)
    assert question.layout.attention == run.prompts or asked != "auto"


def test_a_kernel_of_attention_is_planned_to_take_less_time_and_memory() -> None:
    long = Question(
        model=model_of(quickstart()), hardware=H200, phase=Phase.TRAIN, batch=8, tokens=4096
    )
    older = dataclasses.replace(H200, capability=8.0)
    kernel, written_out = answer(long), answer(dataclasses.replace(long, hardware=older))
    assert long.layout.attention == "cudnn"
    assert kernel.prediction.expected_s < 0.7 * written_out.prediction.expected_s
    assert kernel.memory_bytes["working"] < written_out.memory_bytes["working"]
