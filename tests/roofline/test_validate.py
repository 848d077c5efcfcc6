"""Scores: what is left out, what calibration may do, and the errors on measured tables."""

import json
import math
import random
import sys
from pathlib import Path

import pytest

from roofline.validate import __main__ as command
from roofline.validate.kernels import (
    ATTENTION_DECODE,
    ATTENTION_PREFILL,
    COLLECTIVE,
    GEMM,
)
from roofline.validate.kinds import Kind
from roofline.validate.score import (
    calibration_rows,
    errors_of,
    pooled,
    rank_correlation,
    score_kind,
)

KERNELS = (GEMM, ATTENTION_PREFILL, ATTENTION_DECODE, COLLECTIVE)
EXACT = 1e-12


def rows_of(kind: str, times: list[float], **more: object) -> list[dict[str, object]]:
    return [
        {
            "id": f"{kind}-{i:03d}", "kind": kind, "hardware": "h100-80gb-sxm", "stack": "s",
            "guess": time, "measured_s": time, **more,
        }
        for i, time in enumerate(times)
    ]  # fmt: skip


def guessing(factor: float = 1.0, **more: object) -> Kind:
    """A kind whose predictor knows the time up to a factor."""
    return Kind(
        name="guess",
        predict=lambda row: factor * row["guess"],
        bound=lambda row: 0.1 * row["guess"],
        math=lambda row: 0.1 * row["guess"],
        **more,  # pyright: ignore[reportArgumentType]
    )


TIMES = [1e-3 * 1.3**i for i in range(30)]


# -- what is scored --------------------------------------------------------------------------------


def test_calibration_and_fitted_rows_are_never_scored():
    rows = rows_of("guess", TIMES)
    fitted = {row["id"] for row in rows[:5]}
    kind = guessing(fitted=lambda row: row["id"] in fitted)
    (score,) = score_kind(kind, rows, calibrate_rows=8)
    assert score.fitted == 5
    assert len(score.calibration) == 8
    left_out = fitted | set(score.calibration)
    assert score.errors["ours"].n == len(rows) - len(left_out)
    assert all(e.n == score.errors["ours"].n for e in score.errors.values())


def test_calibration_rows_are_the_same_each_time_and_at_most_half_a_stack():
    rows = rows_of("guess", TIMES)
    drawn = [row["id"] for row in calibration_rows(guessing(), "s", rows, 8)]
    shuffled = random.Random(0).sample(rows, len(rows))
    assert drawn == [row["id"] for row in calibration_rows(guessing(), "s", shuffled, 8)]
    assert drawn != [row["id"] for row in calibration_rows(guessing(), "t", rows, 8)]
    assert len(calibration_rows(guessing(), "s", rows[:7], 8)) == 3


def test_rows_already_fitted_calibrate_first():
    rows = rows_of("guess", TIMES)
    kind = guessing(fitted=lambda row: row["id"] < "guess-010")
    assert {r["id"] for r in calibration_rows(kind, "s", rows, 8)} <= {r["id"] for r in rows[:10]}


def test_without_calibration_rows_nothing_is_calibrated():
    (score,) = score_kind(guessing(), rows_of("guess", TIMES), calibrate_rows=0)
    assert set(score.errors) == {"bound", "ours"}
    assert score.errors["ours"].n == len(TIMES)
    with pytest.raises(ValueError, match="calibrate_rows=-1"):
        score_kind(guessing(), rows_of("guess", TIMES), calibrate_rows=-1)


def test_a_row_without_prediction_is_counted_and_not_scored():
    kind = guessing()
    silent = Kind(
        name="guess",
        predict=lambda row: None if row["id"] == "guess-000" else row["guess"],
        bound=kind.bound,
        math=kind.math,
    )
    (score,) = score_kind(silent, rows_of("guess", TIMES), calibrate_rows=0)
    assert score.unpredicted == 1
    assert score.errors["ours"].n == len(TIMES) - 1


def test_peers_are_scored_where_they_spoke():
    rows = rows_of("guess", TIMES)
    rows[3]["peer_prediction_s"] = 1.5 * TIMES[3]
    (score,) = score_kind(guessing(), rows, calibrate_rows=0)
    assert score.errors["peer"].n == 1
    assert score.errors["peer"].bias == pytest.approx(0.5)


# -- calibration -----------------------------------------------------------------------------------


def test_a_stack_s_scale_is_found():
    (score,) = score_kind(guessing(0.6), rows_of("guess", TIMES), calibrate_rows=8)
    assert score.errors["ours"].mean == pytest.approx(0.4)
    assert score.errors["calibrated"].mean < 0.01  # the prior keeps 0.3 % of log(0.6)


def test_a_fixed_time_that_no_scale_explains_is_not_made_worse():
    rows = rows_of("guess", TIMES)
    for row, time in zip(rows, TIMES, strict=True):
        row["measured_s"] = time + 5e-3
    (score,) = score_kind(guessing(), rows, calibrate_rows=8)
    assert score.errors["calibrated"].mean <= score.errors["ours"].mean


def test_noise_alone_changes_nothing_much():
    draw = random.Random(1)
    rows = rows_of("guess", TIMES)
    for row, time in zip(rows, TIMES, strict=True):
        row["measured_s"] = time * math.exp(draw.gauss(0, 0.1))
    (score,) = score_kind(guessing(), rows, calibrate_rows=8)
    assert score.errors["calibrated"].mean < 1.3 * score.errors["ours"].mean


def test_constant_mfu_is_the_best_single_share():
    rows = rows_of("guess", TIMES)
    (score,) = score_kind(guessing(), rows, calibrate_rows=8)
    assert score.errors["constant_mfu"].mean < EXACT  # here the share is the same in all rows


# -- numbers ---------------------------------------------------------------------------------------


def test_errors_are_shares_of_the_measured_time():
    errors = errors_of([(1.1, 1.0), (1.6, 2.0), (3.0, 3.0)])
    assert errors.mean == pytest.approx(0.1)
    assert errors.median == pytest.approx(0.1)
    assert errors.p90 == pytest.approx(0.2)
    assert errors.bias == pytest.approx(-0.1 / 3)
    with pytest.raises(ValueError, match="at least one pair"):
        errors_of([])


def test_rank_correlation_counts_order_and_shares_ties():
    assert rank_correlation([1, 2, 3], [10, 20, 1000]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # ranks 0.5 0.5 2 3 against 0 1 2 3: 4.5 / sqrt(4.5 * 5)
    assert rank_correlation([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(math.sqrt(0.9))
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


# -- the command -----------------------------------------------------------------------------------


def product(i: int, **change: object) -> dict[str, object]:
    row = {
        "id": f"gemm-new{i}", "kind": "gemm", "hardware": "h100-80gb-sxm", "dtype": "bf16",
        "stack": "vllm", "m": 64 * (i + 1), "n": 4096, "k": 4096, "measured_s": 3e-5,
    }  # fmt: skip
    return {**row, **change}


def write(folder: Path, *rows: object) -> Path:
    (folder / "gemm.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["validate", *map(str, arguments)])
    command.main()


def test_the_command_scores_a_folder_and_says_what_it_left_aside(tmp_path, monkeypatch, capsys):
    odd = (product(20, hardware="tpu-v9"), product(21, kind="haircut"))
    folder = write(tmp_path, *(product(i) for i in range(20)), *odd)
    run(monkeypatch, "--cases", folder, "--json")
    report = json.loads(capsys.readouterr().out)
    stack = report["kinds"]["gemm"]["stacks"]["h100-80gb-sxm / vllm"]
    assert len(stack["calibration"]) == 8
    assert stack["errors"]["ours"]["n"] == 12
    assert set(stack["errors"]) == {"bound", "constant_mfu", "ours", "calibrated"}
    assert sum(report["left_aside"].values()) == 2
    assert any("tpu-v9" in reason for reason in report["left_aside"])
    run(monkeypatch, "--cases", folder, "--calibrate-rows", "0")
    text = capsys.readouterr().out
    assert "book bound" in text
    assert "left aside, 1 rows: kind 'haircut' is not scored" in text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "a"}, "gemm.jsonl:1 lacks kind, hardware, stack, measured_s"),
        (product(0, measured_s=0), "measured_s=0 must be a time above 0"),
        ({k: v for k, v in product(0).items() if k != "n"}, "gemm-new0 of kind gemm lacks field"),
        ([1], "gemm.jsonl:1 lacks id"),
    ],
)
def test_a_bad_case_is_named(tmp_path, monkeypatch, capsys, row, message):
    assert message in refusal(monkeypatch, capsys, write(tmp_path, row))


def test_a_folder_without_cases_and_a_line_that_is_no_json_are_named(tmp_path, monkeypatch, capsys):
    assert "holds no *.jsonl file" in refusal(monkeypatch, capsys, tmp_path)
    (tmp_path / "x.jsonl").write_text("{\n")
    assert "x.jsonl:1 is not JSON" in refusal(monkeypatch, capsys, tmp_path)


def refusal(monkeypatch, capsys, folder: Path) -> str:
    """What the command says of a folder that it ends with exit code 2 for."""
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--cases", folder)
    assert ended.value.code == 2
    return capsys.readouterr().err


# -- measured tables -------------------------------------------------------------------------------

BARS = {  # mean error on rows never fitted, by kind and start of the stack's name
    ("gemm", "h100"): 0.08,
    ("gemm", "a100"): 0.10,
    ("attention_prefill", ""): 0.14,
    ("attention_decode", ""): 0.12,
}
COLLECTIVE_BARS = {"all_gather": 0.06, "reduce_scatter": 0.06, "all_reduce": 0.06, "alltoall": 0.12}


@pytest.fixture(scope="module")
def scores(shared_data: Path):
    rows = command.read_cases(shared_data / "measured")
    names = {kind.name for kind in KERNELS}
    own = [row for row in rows if row["kind"] in names]
    found, left_aside = command.score_cases(own, KERNELS, calibrate_rows=8)
    assert not left_aside
    return found


@pytest.mark.parametrize(("kind", "hardware"), BARS)
def test_operators_meet_their_bars_on_rows_never_fitted(scores, kind, hardware):
    own = [score for score in scores[kind] if score.stack.startswith(hardware)]
    assert pooled(own)["ours"].mean <= BARS[kind, hardware]
    assert sum(score.errors["ours"].n for score in own) > 250


@pytest.mark.parametrize("operation", COLLECTIVE_BARS)
def test_collectives_of_eight_h100_meet_their_bars(scores, operation):
    stack = f"h100-80gb-sxm / nccl-tests 2.29.2 / {operation} / 8 GPUs"
    (own,) = [score for score in scores["collective"] if score.stack == stack]
    assert own.errors["ours"].mean <= COLLECTIVE_BARS[operation]


@pytest.mark.parametrize("kind", [kind.name for kind in KERNELS])
def test_operators_beat_both_baselines_and_calibration_does_not_spoil_them(scores, kind):
    errors = pooled(scores[kind])
    assert errors["ours"].mean < 0.5 * min(errors["bound"].mean, errors["constant_mfu"].mean)
    assert errors["calibrated"].mean < 1.25 * errors["ours"].mean


@pytest.mark.parametrize("kind", ["gemm", "attention_prefill", "attention_decode"])
def test_operators_rank_the_shapes_of_one_stack(scores, kind):
    assert all(score.errors["ours"].rank >= 0.95 for score in scores[kind])


def test_intervals_hold_most_measurements(scores):
    for own in scores.values():
        hits = sum(score.inside * score.errors["ours"].n for score in own)
        assert hits / sum(score.errors["ours"].n for score in own) > 0.8  # stated: 0.9
