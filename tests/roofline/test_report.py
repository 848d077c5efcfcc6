"""The report of a small synthetic run folder."""

from __future__ import annotations

import dataclasses
import html.parser
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from models.config import ModelConfig
from roofline import cost
from roofline.analyse import overlaps, phase_rows, step_times
from roofline.datasheets import datasheet
from roofline.hardware import Hardware
from roofline.lengths import measured
from roofline.phases import Phase, PhaseCost
from roofline.predict import predict, stretched
from roofline.read_run import Span, read_run
from roofline.report import main, schema, write
from roofline.report.content import build
from roofline.report.outlook import job_of_run
from roofline.report.text import header
from roofline.settings import model_of, read_settings, workload_of

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(
    vocab_size=20, width=128, num_layers=2, num_heads=4, num_kv_heads=2, head_size=32, ffw_size=384
)
STEPS = 6
IMPORT_S = 0.5
"""What `import roofline.report` may take: a report must not be a thing to wait for."""


def shared_cores() -> Hardware:
    """A machine whose lanes slow each other down by a half."""
    return dataclasses.replace(
        datasheet("l4"), name="test machine", devices_share_cores=True, contention=1.5,
        calibrated=True, held_out={"decode 64x32": 1.1},
    )  # fmt: skip


def line(phase: Phase, lane: str, start_s: float, duration_s: float, step: int, **more: Any) -> str:
    work: PhaseCost | None = more.get("cost")
    predicted = predict(work, shared_cores()) if work else None
    fields = {} if work is None else dataclasses.asdict(work)
    fields.pop("phase", None)
    return json.dumps({
        "phase": phase.value, "lane": lane, "start_s": start_s, "duration_s": duration_s,
        "step": step, "version": step, "work": more.get("work", {}), "cost": fields or None,
        "predicted_s": predicted.expected_s if predicted else None,
        "lower_s": predicted.lower_s if predicted else None,
        "bound": predicted.bound if predicted else None,
    })  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return _write_run(tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The three reports of that run, for tests that change nothing."""
    return write(_write_run(tmp_path_factory.mktemp("run")))


def _write_run(tmp_path: Path) -> Path:
    """Each second: one lane prefills and decodes; the other waits, trains, steps, publishes."""
    layout = cost.Layout()
    lines = []
    for step in range(STEPS):
        t = float(step)
        lines += [
            line(Phase.PREFILL, "rollout", t, 0.1, step,
                 cost=cost.prefill(MODEL, layout, 16, 32, 128), work={"samples": 128}),
            line(Phase.DECODE, "rollout", t + 0.1, 0.9, step,
                 cost=cost.decode(MODEL, layout, 64, 32, 8), work={"steps": 8, "kv_len": 32}),
            line(Phase.WAIT_BATCH, "learner", t, 0.2, step),
            line(Phase.TRAIN, "learner", t + 0.2, 0.6, step,
                 cost=cost.train(MODEL, layout, 64, 64)),
            line(Phase.OPTIMIZER, "learner", t + 0.8, 0.1, step,
                 cost=cost.optimizer(MODEL, layout)),
            line(Phase.PUBLISH, "learner", t + 0.9, 0.05, step,
                 cost=cost.publish(MODEL, layout, layout)),
            line(Phase.REWARD, "reward", t + 0.1, 0.3, step),
        ]  # fmt: skip
    metrics = [
        {"step": s, "version": s, "wall_s": float(s), "reward/mean": s / 10, "odd/value": None}
        for s in range(STEPS)
    ]
    summary = {"staleness_histogram": {"0": 12, "1": 30}, "pass_at_1_after": 0.5, "phases": {}}
    (tmp_path / "spans.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "config.yaml").write_text(
        "run:\n  seed: 3\nmodel:\n  width: 128  # D\n  dtype: float32\ntask:\n  name: arithmetic\n"
        "mesh:\n  colocated: false\n  learner_data: 1\n  learner_fsdp: 1\n  learner_tensor: 1\n"
        "  rollout_data: 1\n  rollout_tensor: 1\n"
    )
    (tmp_path / "samples.jsonl").write_text(
        "".join(json.dumps({"tokens": tokens}) + "\n" for tokens in range(4, 33))
    )
    shared_cores().save(tmp_path / "hardware.json")
    return tmp_path


class _Document(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.outside += [v or "" for k, v in attrs if k in ("src", "href", "srcset")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_html_is_balanced_and_refers_to_nothing_outside(
    written: tuple[Path, Path, Path],
) -> None:
    path = written[1]
    document = _Document()
    document.feed(path.read_text())
    assert document.open == []
    assert document.outside == []
    assert "script" not in document.seen
    # two waterfalls, roofline, times, gantt, scatter, staleness, split, learning
    assert document.seen.count("svg") == 9


def test_both_reports_show_every_phase_with_its_bound_and_ratio(
    written: tuple[Path, Path, Path],
) -> None:
    rows = {row.phase: row for row in phase_rows(read_run(written[0].parent))}
    for path in written[:2]:
        text = path.read_text()
        assert "decode 64x32" in text  # what calibration held out
        for phase, row in rows.items():
            assert phase.value in text
            if row.ratio is not None:
                assert f"{row.ratio:.2f}" in text


def test_a_call_beside_a_computing_lane_is_compared_with_the_stretched_prediction(
    run_dir: Path,
) -> None:
    rows = {row.phase: row for row in phase_rows(read_run(run_dir))}
    train, decode = rows[Phase.TRAIN], rows[Phase.DECODE]
    assert train.overlap == pytest.approx(1.0)
    between = (
        0.75 + 0.05 * (STEPS - 1) / STEPS
    )  # train, optimizer, publish, and what follows but once
    assert decode.overlap == pytest.approx(between / 0.9)
    assert train.alone_s is not None
    assert train.shared_s == pytest.approx(1.5 * train.alone_s)
    assert decode.alone_s is not None
    assert decode.shared_s == pytest.approx(stretched(decode.alone_s, 0.8 / 0.9, 1.5))
    assert train.ratio == pytest.approx(0.6 / train.shared_s)


def test_waiting_and_verifying_disturb_nobody() -> None:
    spans = [
        Span(phase=Phase.DECODE, lane="rollout", start_s=0, duration_s=1),
        Span(phase=Phase.WAIT_BATCH, lane="learner", start_s=0, duration_s=1),
        Span(phase=Phase.REWARD, lane="reward", start_s=0, duration_s=1),
    ]
    assert overlaps(spans) == [0.0, 0.0, 0.0]


def test_the_step_time_is_the_median_distance_of_steps(run_dir: Path) -> None:
    times = step_times(read_run(run_dir))
    assert times is not None
    assert times.measured_s == pytest.approx(1.0)
    assert times.predicted.sync_s >= times.predicted.async_s


def test_the_report_loads_no_jax(run_dir: Path) -> None:
    code = (
        "import sys; from roofline.report import main; "
        f"code = main([{str(run_dir)!r}]); "
        "heavy = {'jax', 'flax'} & set(sys.modules); "
        "sys.exit(code or ('loaded ' + str(heavy) if heavy else 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout


def test_importing_the_report_takes_less_than_half_a_second() -> None:
    code = (
        "import time; t = time.process_time(); import roofline.report; "
        "print(time.process_time() - t)"
    )

    def once() -> float:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return float(done.stdout)

    assert min(once() for _ in range(3)) < IMPORT_S  # processor time: other programs also run


def test_report_json_follows_the_schema_and_nothing_else_does(
    written: tuple[Path, Path, Path],
) -> None:
    values = json.loads(written[2].read_text())
    check = jsonschema.Draft202012Validator(schema())
    check.validate(values)
    assert {row["phase"] for row in values["phases"]} >= {"decode", "train"}
    assert not check.is_valid({**values, "surprise": 1})
    assert not check.is_valid({name: value for name, value in values.items() if name != "split"})
    assert not check.is_valid({**values, "wall_s": "long"})


def test_a_run_without_training_steps_gets_a_report_that_says_what_is_missing(
    run_dir: Path,
) -> None:
    lines = [
        line(Phase.EVAL, "learner", 0.0, 2.0, 1),
        line(Phase.COMPILE, "rollout", 2.0, 0.5, 1),
        line(Phase.REWARD, "reward", 2.5, 0.1, 1),
    ]
    (run_dir / "spans.jsonl").write_text("\n".join(lines) + "\n")
    (run_dir / "metrics.jsonl").write_text("")
    (run_dir / "summary.json").write_text('{"staleness_histogram": {}, "steps": 0}')
    assert main([str(run_dir)]) == 0
    values = json.loads((run_dir / "report.json").read_text())
    jsonschema.Draft202012Validator(schema()).validate(values)
    assert values["waterfalls"] == []
    assert values["step"] is None
    assert any("0 publish spans" in note for note in values["notes"])
    assert "eval" in (run_dir / "report.html").read_text()


def test_colocated_lanes_have_no_split_and_the_report_says_so(run_dir: Path) -> None:
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("colocated: false", "colocated: true"))
    values = json.loads(write(run_dir)[2].read_text())
    assert values["split"] is None
    assert any("share all devices" in note for note in values["notes"])


def test_a_model_that_is_not_there_is_named_once(run_dir: Path) -> None:
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("model:\n", "model:\n  path: gone/weights\n"))
    values = json.loads(write(run_dir)[2].read_text())
    assert values["elsewhere"] == []
    assert values["simulated"] is not None
    assert sum("gone/weights" in note for note in values["notes"]) == 1


def test_many_verifications_at_once_are_drawn_as_their_number(run_dir: Path) -> None:
    with (run_dir / "spans.jsonl").open("a") as file:
        for index in range(40):
            file.write(line(Phase.REWARD, "reward", 2.0 + index / 100, 2.0, 2) + "\n")
    path = write(run_dir)[1]
    assert "up to 41" in path.read_text()
    reward = next(row for row in phase_rows(read_run(run_dir)) if row.phase is Phase.REWARD)
    assert reward.measured_s > 80
    # 0.3 s each around seconds 0, 1 and 5; 2.0 to 4.39 and 4.1 to 4.4 without a gap
    assert reward.wall_share == pytest.approx((3 * 0.3 + 2.4) / 6, abs=1e-6)


def test_a_split_gives_each_lane_the_time_of_its_share(
    written: tuple[Path, Path, Path],
) -> None:
    values = json.loads(written[2].read_text())
    points = values["split"]["points"]
    shares = [point["learner_share"] for point in points]
    assert shares == sorted(shares)
    for earlier, later in itertools.pairwise(points):
        assert later["generators_s"] > earlier["generators_s"]
        assert later["learner_s"] < earlier["learner_s"]
    for point in points:
        work = point["learner_s"] * point["learner_share"]
        assert work == pytest.approx(points[0]["learner_s"] * points[0]["learner_share"])
        assert point["step_s"] >= max(point["learner_s"], point["generators_s"]) * 0.999
    assert values["split"]["best"]["step_s"] == min(point["step_s"] for point in points)


def test_a_faster_lane_never_slows_the_simulated_run(
    written: tuple[Path, Path, Path],
) -> None:
    values = json.loads(written[2].read_text())
    changed = {row["change"]: row for row in values["changes"]}
    assert changed["as it ran"]["speedup"] == 1
    for name, row in changed.items():
        if "as fast" in name or "of their own" in name:
            assert row["speedup"] >= 0.999
    assert changed["staleness at most 0 (synchronous)"]["staleness"] == 0


def test_the_simulation_stands_beside_the_measured_step(
    written: tuple[Path, Path, Path],
) -> None:
    seen = json.loads(written[2].read_text())["simulated"]
    assert seen["measured_step_s"] == pytest.approx(1.0)
    assert sum(seen["staleness"].values()) == pytest.approx(1.0)


def _no_spans(folder: Path) -> None:
    (folder / "spans.jsonl").unlink()


def _empty_spans(folder: Path) -> None:
    (folder / "spans.jsonl").write_text("")


def _no_hardware(folder: Path) -> None:
    (folder / "hardware.json").unlink()


def _wrong_phase(folder: Path) -> None:
    (folder / "spans.jsonl").write_text(
        '{"phase": "dreaming", "lane": "a", "start_s": 0, "duration_s": 1}\n'
    )


def _no_duration(folder: Path) -> None:
    (folder / "spans.jsonl").write_text('{"phase": "train", "lane": "learner", "start_s": 0}\n')


def _broken_line(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')


def _list_summary(folder: Path) -> None:
    (folder / "summary.json").write_text("[1]")


def _odd_hardware(folder: Path) -> None:
    (folder / "hardware.json").write_text('{"name": "x", "speed": 3}')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_no_spans, ["spans.jsonl is missing"]),
        (_empty_spans, ["spans.jsonl holds no span"]),
        (_no_hardware, ["hardware.json is missing"]),
        (_wrong_phase, ["spans.jsonl:1", "dreaming"]),
        (_no_duration, ["spans.jsonl:1", "duration_s"]),
        (_broken_line, ["metrics.jsonl:2", "not JSON"]),
        (_list_summary, ["summary.json", "list"]),
        (_odd_hardware, ["speed", "hbm_bytes"]),
    ],
)
def test_a_damaged_run_folder_gives_one_line_and_code_2(
    run_dir: Path, damage: Any, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run_dir)
    assert main([str(run_dir)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "Traceback" not in message
    for word in words:
        assert word in message


def test_a_missing_folder_gives_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err


def test_a_torn_last_line_is_left_out_and_noted(run_dir: Path) -> None:
    before = len(read_run(run_dir).spans)
    with (run_dir / "spans.jsonl").open("a") as file:
        file.write('{"phase": "tra')
    run = read_run(run_dir)
    assert len(run.spans) == before
    assert any("torn" in note for note in run.notes)


def test_an_unfinished_run_without_summary_and_metrics_still_gets_a_report(run_dir: Path) -> None:
    for name in ("summary.json", "metrics.jsonl", "config.yaml"):
        (run_dir / name).unlink()
    path = write(run_dir)[0]
    assert "has not finished" in path.read_text()


def test_an_edge_curriculum_shows_where_its_problems_stand_and_what_probes_cost_and_found(
    run_dir: Path,
) -> None:
    counts = {"active": 37, "solved": 2, "unsolved": 1347, "unseen": 0, "probes": 116}
    counts |= {"probe_samples": 440, "probe_tokens": 1500, "probe_cancelled": 24, "promoted": 8}
    last = {"step": 9, "version": 9, "wall_s": 9.0, "perf/generated_tokens": 6000.0}
    last |= {f"curriculum/{name}": float(n) for name, n in counts.items()}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(last) + "\n")
    text = write(run_dir)[0].read_text()
    assert "- problems: 37 active, 2 solved, 1,347 unsolved, 0 unseen" in text
    assert "116 of unsolved problems took 1,500 tokens, 25.0% of all that were sampled" in text
    assert "440 samples were judged, 24 cut short" in text
    assert "8 problems were promoted, one for every 188 tokens" in text


def test_text_of_the_run_is_escaped(run_dir: Path) -> None:
    hardware = dataclasses.replace(shared_cores(), name="<b>card</b> & co")
    hardware.save(run_dir / "hardware.json")
    path = write(run_dir)[1]
    assert "<b>card" not in path.read_text()
    assert "&lt;b&gt;card&lt;/b&gt; &amp; co" in path.read_text()


def test_the_header_counts_the_parameters_that_calibration_knew(run_dir: Path) -> None:
    settings = read_settings(str(run_dir))
    run = read_run(run_dir)
    assert "parameters" not in dict(header(build(run)))["model"]
    measured_for = {
        "model": dataclasses.asdict(dataclasses.replace(MODEL, qk_norm=True, vocab_size=20)),
        "workload": dataclasses.asdict(workload_of(settings)),
    }
    dataclasses.replace(shared_cores(), measured_for=measured_for).save(run_dir / "hardware.json")
    run = read_run(run_dir)
    shape = model_of(settings, 20)
    assert f"{shape.num_parameters:,} parameters" in dict(header(build(run)))["model"]
    assert job_of_run(run, measured(run_dir)).model == shape
