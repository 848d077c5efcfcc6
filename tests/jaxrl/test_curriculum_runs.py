"""Whole runs with a curriculum: the stages are kept to, and a stopped run goes on as if it never stopped."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

from jaxrl import build, train
from jaxrl.cli import ParsedArgs, load_config
from jaxrl.config import Config, CurriculumConfig
from jaxrl.curricula import plan_curricula, probe_slots
from jaxrl.errors import UserError
from jaxrl.plan import make_plan
from jaxrl.rollout.engine import RolloutEngine
from roofline.hardware import Hardware
from roofline.phases import Phase

LEARNT = ("actor/grad_norm", "actor/pg_loss", "reward/mean", "completions/max_length")
HARDWARE = Hardware(
    name="test machine", peak_flops_per_s={"float32": 1e14, "bfloat16": 1e14}, hbm_bytes=2e9,
    hbm_bytes_per_s=1e14, link_bytes_per_s=1e14, dispatch_s=1e-5, kernel_s=1e-6,
)  # fmt: skip


@pytest.fixture(autouse=True)
def known_hardware(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """optax raises floats to integer counts, which strict promotion forbids."""
    monkeypatch.setattr(train, "cached_or_calibrate", lambda *_, **__: HARDWARE)
    with jax.numpy_dtype_promotion("standard"):
        yield


def run(config: Config, *, dry_run: bool = False) -> list[dict[str, float]]:
    train.run(ParsedArgs(config=config, dry_run=dry_run, debug=False, list_algorithms=False), [])
    lines = (config.run.dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def curves(lines: list[dict[str, float]], *more: str) -> list[tuple[float, ...]]:
    return [tuple(line[name] for name in (*LEARNT, *more)) for line in lines]


@pytest.mark.slow
def test_completions_and_slots_follow_the_stages_and_each_compiles_once(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(
        tiny_config(steps=12, sft_steps=0, eval_every=0, max_staleness=1),
        curriculum=CurriculumConfig(lengths=(1, 2, 4), slots=(16, 8, 12), stage_steps=(4, 8)),
    )
    traced: dict[tuple[int, int], list[int]] = {}
    run_chunk = RolloutEngine.run_chunk

    def counts(self: RolloutEngine, snapshot, *, more_waits: bool = False):
        done = run_chunk(self, snapshot, more_waits=more_waits)
        traced.setdefault((self.num_slots, self.max_tokens), []).append(self._decode._cache_size())
        return done

    monkeypatch.setattr(RolloutEngine, "run_chunk", counts)
    lines = run(config)
    assert [line["curriculum/stage"] for line in lines] == [0] * 4 + [1] * 4 + [2] * 4
    for line in lines:
        assert line["completions/max_length"] <= line["curriculum/max_new_tokens"]
    assert lines[-1]["completions/max_length"] > 2
    for slots, length in ((16, 5), (8, 6), (12, 8)):
        assert max(traced[slots, length]) == 1  # one decode program per stage: the caches are short


@pytest.mark.slow
def test_a_resumed_run_has_the_same_curriculum(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(name: str, every: int) -> Config:
        config = tiny_config(steps=9, dir=tmp_path / name, checkpoint_every=every, eval_every=0)
        return dataclasses.replace(
            config,
            curriculum=CurriculumConfig(
                edge=True, unsolved_after=4, max_pass=0.7, lengths=(3, 4), stage_steps=(6,)
            ),
        )

    names = tuple(f"curriculum/{name}" for name in ("active", "solved", "unsolved", "stage"))
    whole = run(made("whole", 0))
    assert whole[-1]["curriculum/unsolved"] > 0
    publish = train.Loop._publish

    def breaks_in_step_7(self: train.Loop, step: int):
        if step == 7:
            raise KeyboardInterrupt
        return publish(self, step)

    monkeypatch.setattr(train.Loop, "_publish", breaks_in_step_7)
    with pytest.raises(KeyboardInterrupt):
        run(made("broken", 3))
    monkeypatch.setattr(train.Loop, "_publish", publish)
    assert curves(run(made("broken", 3)), *names) == curves(whole, *names)


@pytest.mark.slow
def test_probes_of_a_real_run_are_counted_and_leave_the_batch_whole(
    tiny_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(steps=8, sft_steps=0, eval_every=0)
    config = dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, slots=24),  # 8 more than samples of a step
        curriculum=CurriculumConfig(edge=True, unsolved_after=4, probe_slots=-1, probe_samples=2),
    )
    last = run(config)[-1]
    assert last["curriculum/probes"] > 0
    assert last["curriculum/probe_tokens"] > 0
    sampled = 8 * 16 * 4  # at most: steps, samples, tokens
    assert last["perf/generated_tokens"] <= sampled + last["curriculum/probe_tokens"]
    report = (config.run.dir / "report.md").read_text()
    assert "of unsolved problems took" in report
    assert "never taken by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("slots", "staleness", "decode_s", "step_s", "expected"),
    [
        (40, 1, 0.5, 1.0, 39),  # a completion takes 0.5 s, and so long nothing is decoded
        (40, 1, 0.9, 1.0, 6),  # it does not: 8 of the slots are never taken
        (12, 1, 0.9, 1.0, 0),
        (8, 0, 0.6, 0.9, 6),  # two waves of 0.3 s
    ],
)
def test_the_roofline_says_how_many_slots_may_probe(
    tiny_config: Callable[..., Config],
    slots: int, staleness: int, decode_s: float, step_s: float, expected: int,
) -> None:  # fmt: skip
    config = tiny_config(max_staleness=staleness)
    config = dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, slots=slots),
        curriculum=CurriculumConfig(edge=True, probe_slots=-1, probe_samples=3),
    )
    model = build.make_subject(config).model
    plan = make_plan(config, model, HARDWARE)
    assert plan.samples == 16
    plan = dataclasses.replace(
        plan, lockstep_s=step_s, overlapped_s=step_s, phase_s={Phase.DECODE: decode_s}
    )
    (row,) = plan_curricula(config, model, HARDWARE, plan)
    assert row[:2] == ("slots for probes", str(expected))
    fixed = dataclasses.replace(config, curriculum=CurriculumConfig(edge=True, probe_slots=5))
    assert probe_slots(fixed, plan) == 5


def test_a_stage_that_does_not_fit_is_refused_before_the_run(
    tiny_config: Callable[..., Config],
) -> None:
    config = dataclasses.replace(
        tiny_config(), curriculum=CurriculumConfig(lengths=(2, 4), slots=(10**7, 12))
    )
    with pytest.raises(UserError, match=r"GiB.*rollout\.slots"):
        run(config, dry_run=True)


def test_lists_are_read_from_yaml_and_written_to_it(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    from jaxrl.cli import parse_args, save_config  # noqa: PLC0415

    config = dataclasses.replace(
        tiny_config(), curriculum=CurriculumConfig(lengths=(2, 4), stage_steps=(3,))
    )
    save_config(config, tmp_path / "a.yaml")
    assert load_config(tmp_path / "a.yaml") == config
    words = ["--config", str(tmp_path / "a.yaml"), "--curriculum.lengths", "1", "2", "4"]
    words += ["--curriculum.stage-steps", "3", "9"]
    assert parse_args(words).config.curriculum.lengths == (1, 2, 4)


@pytest.mark.slow
def test_a_budget_of_tokens_ends_the_run_and_a_larger_one_goes_on(
    tiny_config: Callable[..., Config],
) -> None:
    config = tiny_config(steps=20, sft_steps=0, eval_every=0)

    def with_budget(tokens: int) -> Config:
        return dataclasses.replace(
            config, train=dataclasses.replace(config.train, max_generated_tokens=tokens)
        )

    first = run(with_budget(200))
    assert len(first) < 10
    assert first[-2]["perf/generated_tokens"] < 200 <= first[-1]["perf/generated_tokens"]
    summary = json.loads((config.run.dir / "summary.json").read_text())
    assert summary["pass_at_1_after"] is not None
    second = run(with_budget(400))
    assert second[: len(first)] == first
    assert second[-2]["perf/generated_tokens"] < 400 <= second[-1]["perf/generated_tokens"]
