"""The report of a small synthetic run folder."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models.config import ModelConfig
from roofline import cost
from roofline.analyse import overlaps, phase_rows, step_times
from roofline.datasheets import datasheet
from roofline.hardware import Hardware
from roofline.phases import Phase, PhaseCost
from roofline.predict import predict, stretched
from roofline.read_run import Span, read_run
from roofline.report import main, write

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(
    vocab_size=20, width=128, num_layers=2, num_heads=4, num_kv_heads=2, head_size=32, ffw_size=384
)
STEPS = 6


def shared_cores() -> Hardware:
    """A machine whose lanes slow each other down by a half."""
    return dataclasses.replace(
        datasheet("l4"), name="test machine", devices_share_cores=True, contention=1.5
    )


def line(phase: Phase, lane: str, start_s: float, duration_s: float, step: int, **more: Any) -> str:
    work: PhaseCost | None = more.get("cost")
    predicted = predict(work, shared_cores()) if work else None
    fields = {} if work is None else dataclasses.asdict(work)
    fields.pop("phase", None)
    return json.dumps({
        "phase": phase.value, "lane": lane, "start_s": start_s, "duration_s": duration_s,
        "step": step, "version": step, "work": {}, "cost": fields or None,
        "predicted_s": predicted.expected_s if predicted else None,
        "lower_s": predicted.lower_s if predicted else None,
        "bound": predicted.bound if predicted else None,
    })  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Each second: one lane decodes all along; the other waits, trains, steps and publishes."""
    layout = cost.Layout()
    lines = []
    for step in range(STEPS):
        t = float(step)
        lines += [
            line(Phase.DECODE, "rollout", t, 1.0, step, cost=cost.decode(MODEL, layout, 64, 32, 8)),
            line(Phase.WAIT_BATCH, "learner", t, 0.2, step),
            line(
                Phase.TRAIN, "learner", t + 0.2, 0.6, step, cost=cost.train(MODEL, layout, 64, 64)
            ),
            line(
                Phase.OPTIMIZER, "learner", t + 0.8, 0.1, step, cost=cost.optimizer(MODEL, layout)
            ),
            line(
                Phase.PUBLISH,
                "learner",
                t + 0.9,
                0.05,
                step,
                cost=cost.publish(MODEL, layout, layout),
            ),
            line(Phase.REWARD, "reward", t + 0.1, 0.3, step),
        ]
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
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_html_is_balanced_and_refers_to_nothing_outside(run_dir: Path) -> None:
    _, path = write(run_dir)
    document = _Document()
    document.feed(path.read_text())
    assert document.open == []
    assert document.outside == []
    assert "script" not in document.seen
    assert document.seen.count("svg") == 5  # times, roofline, gantt, learning, staleness


def test_both_reports_show_every_phase_with_its_bound_and_ratio(run_dir: Path) -> None:
    rows = {row.phase: row for row in phase_rows(read_run(run_dir))}
    for path in write(run_dir):
        text = path.read_text()
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
    assert decode.overlap == pytest.approx(0.75)  # train, optimizer, publish: 0.6 + 0.1 + 0.05
    assert train.alone_s is not None
    assert train.shared_s == pytest.approx(1.5 * train.alone_s)
    assert decode.alone_s is not None
    assert decode.shared_s == pytest.approx(stretched(decode.alone_s, 0.75, 1.5))
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


def test_the_report_loads_no_jax_and_starts_quickly(run_dir: Path) -> None:
    code = (
        "import sys; from roofline.report import main; "
        f"code = main([{str(run_dir)!r}]); "
        "heavy = {'jax', 'numpy', 'flax', 'yaml'} & set(sys.modules); "
        "sys.exit(code or ('loaded ' + str(heavy) if heavy else 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout


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
    path, _ = write(run_dir)
    assert "has not finished" in path.read_text()


def test_text_of_the_run_is_escaped(run_dir: Path) -> None:
    hardware = dataclasses.replace(shared_cores(), name="<b>card</b> & co")
    hardware.save(run_dir / "hardware.json")
    _, path = write(run_dir)
    assert "<b>card" not in path.read_text()
    assert "&lt;b&gt;card&lt;/b&gt; &amp; co" in path.read_text()
