"""Metrics, TensorBoard, samples, trace, summary and what the terminal shows."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jaxrl.telemetry import trace
from jaxrl.telemetry.metrics import MetricsWriter, assert_share
from jaxrl.telemetry.progress import PLAIN_WIDTH, RunProgress, format_duration
from jaxrl.telemetry.samples import append_samples, sample_records, samples_markdown
from jaxrl.telemetry.summary import (
    PhaseSummary,
    Summary,
    package_versions,
    summarise_phases,
    write_summary,
)
from jaxrl.telemetry.tables import histogram_lines, print_plan, print_summary
from jaxrl.types import Completion, Finish, Problem, Prompt, Reward, Rollout, RolloutGroup
from roofline.hardware import Hardware


@pytest.fixture
def writer(tmp_path):
    now = iter(range(100, 1000, 2))
    writer = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path, clock=lambda: float(next(now)))
    yield writer
    writer.close()


def _board(folder) -> EventAccumulator:
    board = EventAccumulator(str(folder))
    board.Reload()
    return board


def test_non_finite_metrics_are_null_and_counted_and_the_file_stays_json(writer, tmp_path):
    writer.write(step=1, version=1, metrics={"actor/loss": math.nan, "actor/lr": math.inf})
    writer.write(step=2, version=2, metrics={"actor/loss": np.float32(0.5)})
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["actor/loss"] is None
    assert first["actor/lr"] is None
    assert (first["metrics/nonfinite"], second["metrics/nonfinite"]) == (2, 0)
    assert second["actor/loss"] == 0.5
    assert (second["step"], second["version"]) == (2, 2)
    writer.close()
    board = _board(tmp_path)
    assert [event.value for event in board.Scalars("actor/loss")] == [0.5]
    assert [event.value for event in board.Scalars("metrics/nonfinite")] == [2, 0]


def test_a_step_has_one_line_and_keys_are_groups(writer):
    writer.write(step=1, version=1, metrics={})
    with pytest.raises(ValueError, match="after step 1"):
        writer.write(step=1, version=1, metrics={})
    with pytest.raises(ValueError, match="group/name"):
        writer.write(step=2, version=2, metrics={"loss": 1.0})


def test_wall_time_goes_on_after_a_restart(writer, tmp_path):
    first = writer.write(step=1, version=1, metrics={})
    writer.close()
    again = MetricsWriter(tmp_path / "metrics.jsonl", None, clock=iter([0.0, 7.0]).__next__)
    second = again.write(step=2, version=2, metrics={})
    again.close()
    assert first["wall_s"] == 2.0
    assert second["wall_s"] == 9.0


def test_tensorboard_forgets_steps_after_the_one_resumed_from(writer, tmp_path):
    for step in (1, 2, 3):
        writer.write(step=step, version=step, metrics={"reward/mean": 0.1})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text(lines[0] + "\n")
    again = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path)
    again.write(step=2, version=2, metrics={"reward/mean": 0.7})
    again.close()
    curve = {event.step: event.value for event in _board(tmp_path).Scalars("reward/mean")}
    assert curve == pytest.approx({1: 0.1, 2: 0.7})


def test_tensorboard_holds_curves_distributions_texts_and_a_layout(writer, tmp_path):
    writer.config("train:\n  steps: 3")
    writer.write(step=1, version=1, metrics={"reward/mean": 0.5, "mismatch/kl_mean": 0.1})
    writer.histogram("completions/length", [3, 4, 4, 9], 1)
    writer.text("samples/rollouts", samples_markdown(sample_records(1, _groups(2))), 1)
    writer.close()
    board = _board(tmp_path)
    tags = board.Tags()
    assert {"reward/mean", "00_story/1_reward", "00_story/6_mismatch_kl"} <= set(tags["scalars"])
    assert board.Histograms("completions/length")[0].histogram_value.num == 4
    config = board.Tensors("run/config/text_summary")[0].tensor_proto.string_val[0]
    assert b"steps: 3" in config
    assert b"2+3=" in board.Tensors("samples/rollouts/text_summary")[0].tensor_proto.string_val[0]
    layout = board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    titles = [b"1 learning", b"2 predicted and measured", b"3 staleness", b"4 sampler"]
    assert sorted(map(layout.index, titles)) == list(map(layout.index, titles))


@pytest.mark.parametrize("value", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_a_share_outside_its_range_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"perf/mfu_train=.*\(0, 1\]"):
        assert_share("perf/mfu_train", value)


def test_a_share_in_range_passes():
    assert assert_share("perf/mfu_train", 1.0) == 1.0
    assert assert_share("perf/padding_ratio", 0.0, zero_allowed=True) == 0.0
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        assert_share("perf/padding_ratio", -0.1, zero_allowed=True)


def _groups(count: int) -> list[RolloutGroup]:
    def group(i: int) -> RolloutGroup:
        completion = Completion(
            tokens=np.array([5, 6], np.int32),
            sampler_logprobs=np.zeros(2, np.float32),
            versions=np.array([i, i + 1], np.int32),
            finish=Finish.STOP,
            sample_index=0,
        )
        reward = Reward(total=1.0, parts={"answer": 1.0}, correct=True)
        problem = Problem(id=i, prompt=f"{i + 2}+3=", answer=f"{i + 5}", solution="")
        return RolloutGroup(
            prompt=Prompt(index=i, problem=problem, tokens=(1,)),
            birth_version=i,
            rollouts=(Rollout(completion=completion, text="5\n# `x`", reward=reward),),
        )

    return [group(i) for i in range(count)]


def test_samples_are_spread_over_the_groups_and_say_all_that_explains_them(tmp_path):
    records = sample_records(7, _groups(8), count=4)
    assert [record["prompt_index"] for record in records] == [0, 2, 4, 6]
    assert sample_records(7, [], count=4) == []
    assert len(sample_records(7, _groups(2), count=4)) == 2
    append_samples(tmp_path / "samples.jsonl", records[:1])
    append_samples(tmp_path / "samples.jsonl", records[1:])
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records
    assert json.loads(lines[0]) == {
        "step": 7,
        "prompt_index": 0,
        "prompt": "2+3=",
        "completion": "5\n# `x`",
        "answer": "5",
        "reward": 1.0,
        "reward_parts": {"answer": 1.0},
        "correct": True,
        "tokens": 2,
        "finish": "stop",
        "version_min": 0,
        "version_max": 1,
    }


def test_marks_inside_a_completion_stay_text():
    text = samples_markdown(sample_records(1, _groups(1)))
    assert "\n    2+3=5\n    # `x`" in text


def _span(phase: str, start_s: float, duration_s: float, lane: str = "rollout", **more) -> dict:
    empty = {"step": 1, "version": None, "work": {}, "cost": None}
    none = {"predicted_s": None, "lower_s": None, "bound": None}
    times = {"phase": phase, "lane": lane, "start_s": start_s, "duration_s": duration_s}
    return {**times, **empty, **none, **more}


def test_the_trace_has_a_row_per_lane_and_never_overlaps_without_nesting(tmp_path, capsys):
    spans = [
        _span("eval", 0.0, 1.0),
        _span("decode", 0.2, 0.5, predicted_s=0.25, lower_s=0.1, bound="memory", work={"n": 3}),
        _span("reward", 0.0, 1.0, "reward"),
        _span("reward", 0.5, 1.0, "reward"),
        _span("reward", 1.0, 1.0, "reward"),
    ]
    lines = "".join(json.dumps(span) + "\n" for span in spans)
    (tmp_path / "spans.jsonl").write_text(lines)
    trace.main([str(tmp_path), "-o", str(tmp_path / "t.json")])
    assert "5 spans" in capsys.readouterr().out
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    named = [event for event in events if event["name"] == "thread_name"]
    rows = {event["tid"]: event["args"]["name"] for event in named}
    done = [event for event in events if event["ph"] == "X"]
    assert sorted(rows.values()) == ["reward", "reward 2", "rollout"]
    assert [rows[e["tid"]] for e in done if e["name"] == "reward"] == [
        "reward",
        "reward 2",
        "reward",
    ]
    (decode,) = (event for event in done if event["name"] == "decode")
    assert (decode["ts"], decode["dur"]) == (0.2e6, 0.5e6)
    expected = {"predicted_s": 0.25, "bound": "memory", "measured / predicted": 2.0, "n": 3}
    assert decode["args"].items() >= expected.items()


def test_a_folder_without_spans_is_a_clear_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        trace.main([str(tmp_path)])
    assert stopped.value.code == 2
    assert "spans.jsonl does not exist" in capsys.readouterr().err


HARDWARE = Hardware(
    name="test",
    peak_flops_per_s={"float32": 1e9},
    hbm_bytes=1e9,
    hbm_bytes_per_s=1e8,
    link_bytes_per_s=1e8,
    dispatch_s=0.0,
    kernel_s=0.0,
)


def _costed(duration_s: float, bound: str, flops: float = 1e8) -> dict:
    cost = {"flops": flops, "hbm_bytes": 1e7, "link_bytes": 0.0, "launches": 1, "dispatches": 1}
    return _span(
        "train", 0.0, duration_s, "learner", cost=cost, predicted_s=0.1, lower_s=0.05, bound=bound
    )


def test_phases_are_summed_over_the_run_and_put_against_the_peaks():
    spans = [_costed(0.3, "compute"), _costed(0.1, "compute"), _costed(0.4, "memory")]
    spans += [_span("train", 0.0, 5.0, "learner"), _span("wait_batch", 0.0, 1.0, "learner")]
    phases = summarise_phases(spans, HARDWARE)
    assert list(phases) == ["train", "wait_batch"]
    train = phases["train"]
    assert (train.calls, train.bound) == (4, "compute")
    assert train.measured_s == pytest.approx(5.8)
    assert train.predicted_s == pytest.approx(0.3)
    assert train.ratio == pytest.approx(0.8 / 0.3)
    assert train.mfu == pytest.approx(3e8 / (0.8 * 1e9))
    assert train.mbu == pytest.approx(3e7 / (0.8 * 1e8))
    assert phases["wait_batch"].predicted_s is None


def test_beside_the_other_lane_more_is_predicted_than_alone():
    hardware = dataclasses.replace(HARDWARE, contention=2.0)
    beside = _span("decode", 0.0, 1.0, "rollout")
    train = summarise_phases([_costed(0.3, "compute"), beside], hardware)["train"]
    assert train.alone_s == pytest.approx(0.1)
    assert train.predicted_s == pytest.approx(0.2)
    assert train.ratio == pytest.approx(0.3 / 0.2)


def test_verifications_that_overlap_are_not_added_up_over_the_run():
    spans = [_span("reward", start_s, 1.0, "reward") for start_s in (0.0, 0.5, 2.0)]
    assert summarise_phases(spans)["reward"].measured_s == pytest.approx(2.5)


def _summary(phases: dict[str, PhaseSummary]) -> Summary:
    return Summary(
        pass_at_1_before=0.125,
        pass_at_1_after=0.75,
        pass_at_8_before=0.5,
        pass_at_8_after=None,
        wall_s=83.0,
        samples_per_s=math.nan,
        steps=20,
        staleness_histogram={0: 30, 1: 90},
        phases=phases,
        seed=3,
        device="cpu",
        config="runs/x/config.yaml",
        versions=package_versions(),
    )


def test_the_summary_is_json_with_the_keys_that_readers_expect(tmp_path):
    write_summary(_summary(summarise_phases([_costed(0.2, "memory")])), tmp_path / "summary.json")
    read = json.loads((tmp_path / "summary.json").read_text())
    assert (read["pass_at_1_before"], read["pass_at_8_after"]) == (0.125, None)
    assert read["samples_per_s"] is None
    assert read["staleness_histogram"] == {"0": 30, "1": 90}
    assert read["phases"]["train"]["ratio"] == pytest.approx(2.0)
    assert set(read["phases"]["train"]) == set(PhaseSummary.__dataclass_fields__)
    assert read["versions"]["python"].startswith("3.")


def _console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=PLAIN_WIDTH, highlight=False)


def _shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_closing_table_shows_predicted_measured_and_outcome_in_plain_text(tmp_path):
    console = _console(terminal=False)
    phases = summarise_phases([_costed(0.2, "memory"), _span("eval", 0.0, 1.0)], HARDWARE)
    report = tmp_path / "report.md"
    print_summary(_summary(phases), run_dir=tmp_path, report=report, console=console)
    text = _shown(console)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert rows["train"] == ["1", "0.100", "0.100", "0.200", "2.00", "memory", "50.0%", "50.0%"]
    assert rows["eval"] == ["1", "-", "-", "1.000", "-", "-", "-", "-"]
    assert rows["pass@1"] == ["12.5%", "75.0%"]
    assert rows["pass@8"] == ["50.0%", "-"]
    assert f"tensorboard --logdir {tmp_path}" in text
    assert str(report) in text
    assert "\x1b" not in text
    assert text.isascii()


def test_an_impossible_share_is_pointed_out(tmp_path):
    console = _console(terminal=False)
    phases = summarise_phases([_costed(0.1, "compute", flops=3e8)], HARDWARE)
    print_summary(_summary(phases), run_dir=tmp_path, console=console)
    assert "a cost or a peak is wrong: train MFU 3.00" in _shown(console)


@pytest.mark.parametrize("terminal", [True, False])
def test_tables_fit_their_width(terminal):
    console = _console(terminal=terminal)
    print_plan([("completions", "128", "16 prompts x 8 samples " * 8)], console)
    assert max(map(len, _shown(console).splitlines())) <= PLAIN_WIDTH + len("\x1b[1m\x1b[0m") * 8
    assert "completions" in _shown(console)


def test_histogram_bars_are_proportional():
    lines = histogram_lines({1: 30, 0: 10})
    assert [line.count("#") for line in lines] == [13, 40]
    assert lines[0].endswith("10 (25.0 %)")
    assert histogram_lines({}) == []


def test_progress_without_a_terminal_is_a_line_every_few_seconds_and_one_at_the_end():
    now = [0.0]
    console = _console(terminal=False)
    shown = RunProgress(12, first_step=2, console=console, every_s=5, clock=lambda: now[0])
    now[0] = 1000.0  # a cold start
    with shown:
        for step in range(3, 13):
            now[0] += 2.0
            evaluated = {"eval/pass_at_1": 0.5} if step == 3 else {}
            shown.update(step, {"reward/mean": step / 10, **evaluated})
    lines = _shown(console).splitlines()
    assert [line.split()[1] for line in lines] == ["3/12", "6/12", "9/12", "12/12"]
    assert lines[1] == "step 6/12  reward 0.600  pass@1 50.0%  ETA 0:12"
    assert lines[-1].endswith("ETA 0:00")


def test_progress_on_a_terminal_is_one_live_line():
    console = _console(terminal=True)
    with RunProgress(2, console=console) as shown:
        shown.update(1, {"reward/mean": 0.25, "actor/loss": None})
        shown.note("checkpoint written")
        shown.update(2, {"reward/mean": 0.5})
    text = _shown(console)
    assert "step 2/2" in text
    assert "reward 0.500" in text
    assert "checkpoint written" in text


def test_durations_read_as_clock_times():
    assert [format_duration(s) for s in (7, 725, 11045)] == ["0:07", "12:05", "3:04:05"]
