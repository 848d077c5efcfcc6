"""`python -m jaxrl.score`: what it reads, writes, counts and refuses."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrl.score import EXIT_ROW_ERRORS, main

OWN = """
import time

def score(prompt, completion, answer, row):
    if completion == "hang":
        time.sleep(1e6)
    return {"length": len(completion) / row["most"], "correct": completion == answer}
"""


def _write(path: Path, rows: list[dict]) -> Path:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_row_gets_reward_and_parts_in_order(tmp_path: Path, capsys: pytest.CaptureFixture):
    rows = [
        {"gold": r"\frac{1}{2}", "pred": "0.5", "expected": True},
        {"prompt": "2+2=", "completion": r"It is \boxed{5}.", "answer": "4", "expected": 1},
        {"answer": 72, "response": "So.\n#### 72", "expected": 1.0},
    ]
    out = tmp_path / "out.jsonl"
    cases = _write(tmp_path / "cases.jsonl.gz", rows)
    main(["--verifier", "math", "--cases", str(cases), "--out", str(out), "--workers=1"])
    assert _read(out) == [
        {"row": 1, "reward": 1.0, "correct": True, "parts": {"correct": 1.0, "answered": 0.0}},
        {"row": 2, "reward": 0.0, "correct": False, "parts": {"correct": 0.0, "answered": 1.0}},
        {"row": 3, "reward": 1.0, "correct": True, "parts": {"correct": 1.0, "answered": 1.0}},
    ]
    shown = capsys.readouterr().out
    assert "2 (66.7 %)" in shown
    assert "2 of 3 (66.67 %); not on lines 2" in shown


def test_failing_and_hanging_rows_are_shown_counted_and_do_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "own.py").write_text(OWN)
    rows = [{"gold": "ab", "pred": "ab", "most": 4}, {"gold": "ab", "pred": "a"},
            {"gold": "ab", "pred": "hang", "most": 4}, {"gold": "ab", "pred": "b", "most": 4}]  # fmt: skip
    cases = _write(tmp_path / "cases.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        main(["--verifier", "own.py:score", "--cases", str(cases), "--timeout-s=2"])
    assert exit_info.value.code == EXIT_ROW_ERRORS
    found = _read(tmp_path / "cases.scores.jsonl")
    assert [line["reward"] for line in found] == [1.5, None, 0.0, 0.25]
    assert found[2]["parts"] == {}
    assert "KeyError: 'most'" in found[1]["error"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "timeouts 1 errors 1" in shown
    assert "line 2" in shown


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"gold": "1", "pred": "1"}\n{"gold": 1', "line 2: not JSON"),
        ("[1]", "line 1: a list"),
        ('{"gold": "1"}', "line 1: no text in any of the fields"),
        (None, "cannot be read"),
    ],
)
def test_a_malformed_file_is_refused_before_any_row_is_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture, text: str | None, says: str
):
    cases = tmp_path / "cases.jsonl"
    if text is not None:
        cases.write_text(text)
    out = tmp_path / "out.jsonl"
    with pytest.raises(SystemExit) as exit_info:
        main(["--verifier", "math", "--cases", str(cases), "--out", str(out)])
    assert exit_info.value.code == 2
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_a_verifier_that_does_not_exist_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    cases = _write(tmp_path / "cases.jsonl", [{"gold": "1", "pred": "1"}])
    for verifier, says in [("mth", "neither math"), ("gone.py:score", "no file")]:
        with pytest.raises(SystemExit) as exit_info:
            main(["--verifier", verifier, "--cases", str(cases), f"--out={tmp_path / 'out'}"])
        assert exit_info.value.code == 2
        assert says in capsys.readouterr().err


def test_a_result_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    cases = _write(tmp_path / "cases.jsonl", [{"gold": "1", "pred": "1"}])
    before = cases.read_bytes()
    for out, says in [(cases, "would overwrite the cases"), (cases / "x", "cannot be written")]:
        with pytest.raises(SystemExit) as exit_info:
            main(["--verifier", "exact", "--cases", str(cases), f"--out={out}"])
        assert exit_info.value.code == 2
        assert says in capsys.readouterr().err
    assert cases.read_bytes() == before


def test_the_command_scores_the_answer_pairs(shared_data: Path, tmp_path: Path):
    root = Path(__file__).resolve().parents[2]
    cases = shared_data / "goldens/math500_answer_pairs.jsonl"
    subprocess.run(
        [sys.executable, "-m", "jaxrl.score", "--verifier", "math", "--cases", str(cases)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, timeout=60, check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    found = _read(tmp_path / "math500_answer_pairs.scores.jsonl")
    assert [line["reward"] for line in found] == [1.0] * 42


@pytest.mark.slow
def test_every_labelled_gsm8k_rollout_agrees_through_the_command(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    cases = shared_data / "gsm8k/gsm8k_labelled_rollouts.jsonl.gz"
    main(["--verifier", "math", "--cases", str(cases), "--out", str(tmp_path / "out.jsonl")])
    assert "5276 of 5276 (100.00 %)" in capsys.readouterr().out
