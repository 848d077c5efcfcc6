"""A whole run: synchronous mode, resume, workers that fail, staleness in practice."""

import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl import build, evaluate, train
from jaxrl.cli import ParsedArgs
from jaxrl.config import Config
from jaxrl.devices import make_meshes
from jaxrl.observe import Observer
from jaxrl.packing import groups_to_sequences, pack
from jaxrl.policy import first_policy
from jaxrl.prompts import PromptStream
from jaxrl.rollout.engine import Request, SamplingParams
from jaxrl.rollout.worker import completion_text
from jaxrl.types import Finish, Rollout, RolloutGroup
from roofline.hardware import Hardware

LEARNT = ("actor/grad_norm", "actor/pg_loss", "actor/entropy", "mismatch/kl_mean", "reward/mean")
"""Curves that any change of weights, samples or order would move."""


pytestmark = pytest.mark.usefixtures("optax_promotes")


@pytest.fixture(autouse=True)
def known_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions need some machine; measuring this one would take longer than the tests."""
    hardware = Hardware(
        name="test machine", peak_flops_per_s={"float32": 1e14, "bfloat16": 1e14}, hbm_bytes=1e12,
        hbm_bytes_per_s=1e14, link_bytes_per_s=1e14, dispatch_s=1e-5, kernel_s=1e-6,
    )  # fmt: skip
    monkeypatch.setattr(train, "cached_or_calibrate", lambda *_, **__: hardware)


def run(config: Config) -> list[dict[str, float]]:
    """Run to the end in this process; the lines of metrics.jsonl."""
    train.run(ParsedArgs(config=config, dry_run=False, debug=False, list_algorithms=False), [])
    return metrics_of(config.run.dir)


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def learnt(lines: list[dict[str, float]]) -> list[tuple[float, ...]]:
    return [tuple(line[name] for name in LEARNT) for line in lines]


def plain_loop(config: Config) -> Iterator[dict[str, float]]:
    """Synchronous GRPO without threads, buffer or telemetry: sample, verify, train, publish."""
    subject = build.make_subject(config)
    learner_mesh, rollout_mesh = make_meshes(config.mesh)
    policy = first_policy(config.model, subject.model, learner_mesh, config.run.seed)
    learner = build.make_learner(config, subject.model, learner_mesh, policy, Observer())
    store = build.make_store(config, subject.model, learner_mesh, rollout_mesh)
    engine = build.make_engine(config, subject, rollout_mesh, Observer())
    stream = PromptStream(
        subject.task.problems("train"), subject.tokenizer, config.run.seed, 4, False
    )
    params = SamplingParams(max_new_tokens=4, stop_ids=subject.tokenizer.stop_ids)
    per_step, samples = config.grpo.prompts_per_step, tuple(range(config.grpo.group_size))
    for step in range(config.train.steps):
        snapshot = store.publish(step, learner.state.policy)
        drawn = [stream.at(step * per_step + i) for i in range(per_step)]
        for prompt in drawn:
            request = Request(
                stream=prompt.index, prompt=prompt.tokens, sample_indices=samples, params=params
            )
            engine.submit(request)
        rollouts: dict[tuple[int, int], Rollout] = {}
        by_index = {prompt.index: prompt for prompt in drawn}
        while not engine.is_idle:
            for request, completion in engine.run_chunk(snapshot):
                text = completion_text(subject.tokenizer, completion)
                reward = subject.task.verify(
                    by_index[request.stream].problem, text, completion.finish is Finish.STOP
                )
                key = request.stream, completion.sample_index
                rollouts[key] = Rollout(completion=completion, text=text, reward=reward)
        groups = [
            RolloutGroup(
                prompt=p, birth_version=step, rollouts=tuple(rollouts[p.index, i] for i in samples)
            )
            for p in drawn
        ]
        sequences, metrics = groups_to_sequences(groups, config.grpo, 4)
        batches, _ = pack(sequences, row_tokens=16, rows_per_microbatch=8)
        yield {**metrics, **learner.update(batches)}


def test_staleness_zero_is_bitwise_the_plain_synchronous_loop(
    tiny_config: Callable[..., Config],
) -> None:
    config = tiny_config(steps=4, sft_steps=0)
    assert learnt(run(config)) == learnt(list(plain_loop(config)))


def test_a_resumed_synchronous_run_is_bitwise_the_uninterrupted_one(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny_config(steps=5, dir=tmp_path / "whole"))
    config = tiny_config(steps=5, dir=tmp_path / "broken", checkpoint_every=2)
    publish, calls = train.Loop._publish, []

    def breaks_in_step_4(self: train.Loop, step: int):
        calls.append(step)
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        if step == 4:
            raise KeyboardInterrupt
        return publish(self, step)

    monkeypatch.setattr(train.Loop, "_publish", breaks_in_step_4)
    with pytest.raises(KeyboardInterrupt):
        run(config)  # once Ctrl-C: ends after the step, with a checkpoint and a summary
    summary = json.loads((config.run.dir / "summary.json").read_text())
    assert (summary["steps"], summary["pass_at_1_after"]) == (1, None)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.setattr(train.Loop, "_publish", publish)
    assert learnt(run(config)) == learnt(whole)
    assert calls == [1, 2, 3, 4]


def test_the_learner_and_the_sampler_agree_when_synchronous(
    tiny_config: Callable[..., Config],
) -> None:
    for line in run(tiny_config(steps=3, sft_steps=0)):
        assert line["mismatch/logp_abs_diff_max"] < 1e-5  # float32, one device: the design's bound
        assert line["off_policy/staleness_max"] == 0


def test_asynchronous_staleness_stays_within_the_bound(tiny_config: Callable[..., Config]) -> None:
    lines = run(tiny_config(steps=6, max_staleness=2, sft_steps=0))
    worst = [line["off_policy/staleness_max"] for line in lines]
    assert max(worst) <= 2
    assert max(worst) >= 1  # it did run ahead


def test_a_verifier_that_raises_ends_the_run_with_its_error(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxrl.tasks.arithmetic import ArithmeticTask  # noqa: PLC0415

    verify, calls = ArithmeticTask.verify, []

    def breaks_later(self, problem, completion, finished):
        calls.append(problem)
        if len(calls) > 40:
            raise ZeroDivisionError("verifier bug")
        return verify(self, problem, completion, finished)

    monkeypatch.setattr(ArithmeticTask, "verify", breaks_later)
    with pytest.raises(Exception, match="verifier bug"):
        run(tiny_config(steps=50, max_staleness=1, sft_steps=0))
    assert not [t.name for t in threading.enumerate() if t.name in ("rollout", "watchdog")]


def test_a_sampler_that_raises_ends_the_run_with_its_error(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxrl.rollout.worker import RolloutWorker  # noqa: PLC0415

    def breaks(*_: object) -> None:
        raise FloatingPointError("sampler bug")

    monkeypatch.setattr(RolloutWorker, "_finish", breaks)
    with pytest.raises(FloatingPointError, match="sampler bug"):
        run(tiny_config(steps=50, max_staleness=1, sft_steps=0))
    assert not [t.name for t in threading.enumerate() if t.name in ("rollout", "watchdog")]


def test_a_run_leaves_what_its_folder_promises(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Even on a machine whose calibration is far too low."""
    hardware = Hardware(
        name="test machine", peak_flops_per_s={"float32": 1e3, "bfloat16": 1e3}, hbm_bytes=1e12,
        hbm_bytes_per_s=1e14, link_bytes_per_s=1e14, dispatch_s=1e-5, kernel_s=1e-6, calibrated=True,
    )  # fmt: skip
    monkeypatch.setattr(train, "cached_or_calibrate", lambda *_, **__: hardware)
    config = tiny_config(steps=3)
    lines = run(config)
    assert not any("perf/mfu_train" in line for line in lines)
    assert capsys.readouterr().out.count("measure it again with --recalibrate") == 1
    folder = config.run.dir
    for name in ("config.yaml", "metrics.jsonl", "spans.jsonl", "samples.jsonl", "summary.json",
                 "hardware.json", "checkpoints/0", "checkpoints/3", "report.md", "report.html"):  # fmt: skip
        assert (folder / name).exists(), name
    assert list(folder.glob("events.out.tfevents.*"))
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("pass_at_1_before", "pass_at_1_after", "wall_s", "phases", "staleness_histogram"):
        assert summary[key] is not None, key
    assert summary["staleness_histogram"] == {"0": 48}


def test_evaluate_reads_a_run_and_writes_its_figures(
    tiny_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(steps=2)
    run(config)
    folder = str(config.run.dir)
    evaluate.main(["--run", folder, "--samples", "4", "--k", "1", "2", "4", "--problems", "8"])
    assert "pass@k" in capsys.readouterr().out
    result = json.loads((config.run.dir / "evaluation.json").read_text())
    assert result["step"] == 2
    assert (result["problems"], result["samples"]) == (8, 4)
    assert result["pass_at"]["1"] == pytest.approx(result["pass_at_1"])
    assert result["pass_at"]["1"] <= result["pass_at"]["2"] <= result["pass_at"]["4"]
    with pytest.raises(SystemExit):
        evaluate.main(["--run", folder, "--samples", "4", "--k", "8"])
    assert "--samples is 4" in capsys.readouterr().err


def test_a_fork_starts_from_the_other_runs_weights(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    import dataclasses  # noqa: PLC0415

    run(tiny_config(steps=2, dir=tmp_path / "parent"))
    child = tiny_config(steps=1, dir=tmp_path / "child")
    child = dataclasses.replace(
        child, run=dataclasses.replace(child.run, fork_from=tmp_path / "parent")
    )
    run(child)
    parent_after = json.loads((tmp_path / "parent/summary.json").read_text())
    child_before = json.loads((tmp_path / "child/summary.json").read_text())
    assert child_before["pass_at_1_before"] == parent_after["pass_at_1_after"]


def test_publishing_survives_donation_of_the_learners_state(
    tiny_config: Callable[..., Config],
) -> None:
    config = tiny_config()
    subject = build.make_subject(config)
    for colocated in (False, True):
        learner_mesh, rollout_mesh = make_meshes(config.mesh)
        rollout_mesh = learner_mesh if colocated else rollout_mesh
        policy = first_policy(config.model, subject.model, learner_mesh, 0)
        store = build.make_store(config, subject.model, learner_mesh, rollout_mesh)
        snapshot = store.publish(0, policy)
        before = np.asarray(policy.embedding).copy()
        jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(policy)
        assert policy.embedding.is_deleted()
        np.testing.assert_array_equal(np.asarray(snapshot.policy.embedding), before)
