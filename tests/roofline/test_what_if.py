"""The predict command: the same numbers as the library, clear refusals, a quick start."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roofline.answer import answer, cost_of
from roofline.choose import find_hardware, find_model
from roofline.datasheets import DATASHEETS, datasheet
from roofline.hardware import Hardware
from roofline.phases import Phase
from roofline.predict import predict
from roofline.question import PHASES, Question, parse_sweep, resized
from roofline.serving import UNCALIBRATED_SPREAD
from roofline.settings import model_of, read_settings, workload_of
from roofline.what_if import main

ROOT = Path(__file__).resolve().parents[2]
MAX_START_S = 0.5  # processor time of the interpreter with everything the command imports
ROUNDING = 1 + 1e-9  # sums of floats in another order
MODEL = find_model("qwen3-1.7b", 128)
DECODE = Question(
    model=MODEL, hardware=datasheet("h100-sxm"), phase=Phase.DECODE, batch=256, kv_len=2048,
    data=4, tensor=2,
)  # fmt: skip
ARGUMENTS = [
    "--model", "qwen3-1.7b", "--hardware", "h100-80gb-sxm", "--devices", "8", "--phase", "decode",
    "--batch", "256", "--kv-len", "2048", "--parallel.tensor", "2",
]  # fmt: skip


def test_the_command_says_what_the_library_predicts(capsys) -> None:
    main([*ARGUMENTS, "--json"])
    seen = json.loads(capsys.readouterr().out)
    expected = predict(cost_of(DECODE), DECODE.hardware)
    assert seen["prediction"]["expected_s"] == expected.expected_s
    assert seen["tokens_per_s"] == pytest.approx(256 / expected.expected_s)
    assert seen["question"]["data"] == 4


def test_the_table_holds_time_bound_intensity_utilisation_and_memory(capsys) -> None:
    main(ARGUMENTS)
    text = capsys.readouterr().out
    for words in ("expected", "bound by", "flop/B", "MFU, MBU", "GiB", "tensor 2"):
        assert words in text


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_is_answered_within_its_bounds(phase: Phase) -> None:
    question = dataclasses.replace(DECODE, phase=phase, batch=8, tokens=256, fsdp=1, data=1)
    seen = answer(dataclasses.replace(question, remat="block"))
    assert 0 < seen.prediction.lower_s <= seen.prediction.expected_s
    assert 0 <= seen.mfu <= 1
    assert 0 < seen.mbu <= 1
    assert 0 < sum(seen.memory_bytes.values()) <= question.hardware.hbm_bytes


@given(
    st.sampled_from([Phase.PREFILL, Phase.DECODE, Phase.SCORE, Phase.TRAIN]),
    st.sampled_from(list(DATASHEETS.values())), st.integers(1, 512), st.integers(1, 64),
    st.sampled_from([1, 2, 8]), st.sampled_from([1, 2]),
)  # fmt: skip
def test_a_larger_batch_never_takes_less_time(
    phase: Phase, hardware: Hardware, batch: int, more: int, tensor: int, data: int
) -> None:
    smaller = dataclasses.replace(
        DECODE, hardware=hardware, phase=phase, batch=batch, tensor=tensor, data=data
    )
    larger = dataclasses.replace(smaller, batch=batch + more)
    before, after = (predict(cost_of(one), hardware) for one in (smaller, larger))
    for name in ("lower_s", "upper_s", "expected_s"):
        assert getattr(before, name) <= getattr(after, name) * ROUNDING


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("batch=1..1024", [2**k for k in range(11)]),
        ("batch=1..4", [1, 2, 3, 4]),
        ("batch=100..1000", [100, 200, 400, 800, 1000]),
        ("kv-len=8,64", [8, 64]),
        ("parallel.tensor=1,2", [1, 2]),
    ],
)
def test_sweeps_go_up_one_by_one_or_in_doublings(text: str, values: list[int]) -> None:
    assert parse_sweep(text)[1] == values


@pytest.mark.parametrize(
    "text",
    ["width=1..2", "batch", "batch=0..3", "batch=9..3", "batch=x", "batch=0,1", "batch=-4,1"],
)
def test_what_cannot_be_swept_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"cannot sweep|must look like"):
        parse_sweep(text)


def test_a_sweep_prints_rows_a_plot_and_what_does_not_fit(capsys, tmp_path: Path) -> None:
    sweep = ["--sweep", "batch=1024..1048576"]
    main([*ARGUMENTS, *sweep, "--svg", str(tmp_path / "sweep.svg")])
    text = capsys.readouterr().out
    assert "###" in text
    assert "needs" in text
    assert ElementTree.parse(tmp_path / "sweep.svg").getroot().tag.endswith("svg")
    main([*ARGUMENTS, *sweep, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert ["error" in row for row in rows] == sorted("error" in row for row in rows)
    times = [row["prediction"]["expected_s"] for row in rows if "error" not in row]
    assert times == sorted(times)


def test_each_size_proposed_where_memory_runs_out_does_fit() -> None:
    question = dataclasses.replace(DECODE, batch=1 << 16)
    with pytest.raises(ValueError, match="GiB per device") as refused:
        answer(question)
    proposed = re.findall(r"--(?:parallel\.)?(\w+) (\d+)", str(refused.value))
    assert proposed
    for name, value in proposed:
        answer(dataclasses.replace(question, **{name: int(value)}))
    training = dataclasses.replace(
        DECODE, model=find_model("llama-3.1-70b", 128), phase=Phase.TRAIN, data=1, batch=64
    )
    with pytest.raises(ValueError, match=r"--parallel\.fsdp \d+"):
        answer(training)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--hardware", "h300"], "did you mean"),
        (["--model", "qwen3-1.8b"], "did you mean 'qwen3-1.7b'"),
        (["--devices", "9", "--parallel.tensor", "3"], "use one of [1, 2, 4, 8]"),
        (["--devices", "9"], "use 8 or 10"),
        (["--parallel.data", "3"], "data * fsdp * tensor = 6"),
        (["--parallel.fsdp", "2"], "use --parallel.data 2"),
        (["--batch", "0"], "--batch=0 must be >= 1"),
        (["--dtype", "bf16"], "did you mean 'bfloat16'"),
        (["--kv-len", "0"], "--kv-len=0 must be >= 1"),
        (["--devices", "0"], "--devices=0 must be >= 1"),
        (["--parallel.data", "0"], "--parallel.data=0 must be >= 1"),
        (["--vocab-size", "-3"], "--vocab-size=-3 must be >= 1"),
        (["--microbatches", "2"], "microbatches=2: decode has none"),
        (["--sweep", "fsdp=2,4"], "use --parallel.data 2"),
        (["--sweep", "data=1..4"], "leave out --devices"),
        (["--sweep", "batsh=1..4"], "did you mean 'batch'"),
        (["--sweep", "depth=1..2"], "cannot sweep 'depth'"),
        (["--svg", "sweep.svg"], "add --sweep"),
        (["--sweep", "batch=1,2", "--svg", "no/such/folder.svg"], "No such file or directory"),
        (["--hardware", "tests"], "tests holds no hardware.json"),
    ],
)
def test_what_cannot_be_is_refused_with_exit_code_2(changes: list[str], words: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*ARGUMENTS, *changes])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_models_and_hardware_are_found_by_name_file_and_run_folder(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {width: 64, num_layers: 3}\n")
    datasheet("l4").save(tmp_path / "hardware.json")
    seen = find_model(str(tmp_path), vocab_size=77)
    assert (seen.width, seen.num_layers, seen.vocab_size) == (64, 3, 77)
    assert find_hardware(str(tmp_path)) == datasheet("l4")
    assert find_hardware(str(tmp_path / "hardware.json")) == datasheet("l4")


def test_a_run_folder_brings_its_own_type_and_vocabulary(tmp_path: Path, capsys) -> None:
    (tmp_path / "config.yaml").write_text("model: {width: 64, dtype: float32}\n")
    settings = read_settings(str(tmp_path))
    measured_for = {
        "model": dataclasses.asdict(model_of(settings, 14)),
        "workload": dataclasses.asdict(workload_of(settings)),
    }
    run = dataclasses.replace(datasheet("l4"), measured_for=measured_for)
    run.save(tmp_path / "hardware.json")
    words = ["--model", str(tmp_path), "--hardware", str(tmp_path), "--json"]
    main(words)
    asked = json.loads(capsys.readouterr().out)["question"]
    assert (asked["model"]["vocab_size"], asked["dtype"]) == (14, "float32")
    main([*words, "--vocab-size", "99", "--dtype", "bfloat16"])
    asked = json.loads(capsys.readouterr().out)["question"]
    assert (asked["model"]["vocab_size"], asked["dtype"]) == (99, "bfloat16")


def test_without_a_calibration_this_machine_is_refused(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"python -m roofline\.calibrate"):
        find_hardware("this")
    datasheet("l4").save(tmp_path / "jaxrl" / "calibration" / "0.json")
    assert find_hardware("this") == datasheet("l4")


def test_the_command_starts_quickly_and_without_jax() -> None:
    program = (
        "import sys, time, roofline.predict, roofline.what_if\n"
        "assert 'jax' not in sys.modules\n"
        "print(time.process_time())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < MAX_START_S


def test_the_module_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "roofline.predict", "--help"], cwd=ROOT, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert "--kv-len" in done.stdout


@pytest.mark.parametrize("axis", ["tensor", "fsdp", "pipeline"])
def test_a_sweep_over_an_axis_keeps_the_number_of_devices(axis: str, capsys) -> None:
    words = ["--model", "qwen3-1.7b", "--hardware", "h200", "--devices", "8", "--phase", "train"]
    main([*words, "--batch", "8", "--remat", "block", "--sweep", f"{axis}=1,2,3,4", "--json"])
    rows = json.loads(capsys.readouterr().out)
    meshes = [row["placement"] for row in rows if "error" not in row]
    assert [(m[axis], m["data"]) for m in meshes] == [(1, 8), (2, 4), (4, 2)]
    refused = next(row["error"] for row in rows if row[axis] == 3)
    assert f"--devices=8 is not a multiple of {axis} = 3; use 6 or 9" in refused


def test_a_sweep_over_devices_gives_them_to_the_replicas(capsys) -> None:
    main([*ARGUMENTS, "--sweep", "devices=2,8,64", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["placement"]["data"] for row in rows] == [1, 4, 32]
    assert [row["placement"]["nodes"] for row in rows] == [1, 1, 8]


def test_what_is_proposed_for_so_many_devices_works_with_so_many(capsys) -> None:
    words = ["--model", "qwen3-8b", "--hardware", "h100-sxm", "--devices", "8", "--phase", "train"]
    words += ["--batch", "8", "--tokens", "4096"]
    with pytest.raises(SystemExit):
        main(words)
    said = capsys.readouterr().err
    remedies = re.findall(r"(--[\w.]+) (\w+)", said.partition("fits with")[2])
    assert {"--parallel.fsdp", "--parallel.tensor"} <= {option for option, _ in remedies}
    for remedy in remedies:
        main([*words, *remedy, "--json"])


def test_the_largest_batch_and_the_longest_cache_that_fit_are_proposed() -> None:
    for size, present in (("batch", 10**9), ("kv_len", 10**9)):
        question = dataclasses.replace(DECODE, **{size: present})
        with pytest.raises(ValueError, match="it fits with") as refused:
            answer(question)
        found = re.search(rf"--{size.replace('_', '-')} (\d+)", str(refused.value))
        assert found is not None
        answer(dataclasses.replace(question, **{size: int(found[1])}))
        with pytest.raises(ValueError, match="GiB per device"):
            answer(dataclasses.replace(question, **{size: int(found[1]) + 32}))


def test_a_remedy_is_found_where_smaller_batches_have_too_few_rows_for_the_microbatches() -> None:
    question = dataclasses.replace(
        DECODE, model=find_model("qwen3-8b", 128), phase=Phase.TRAIN, data=1, tensor=1, fsdp=4,
        batch=256, tokens=8192, microbatches=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="it fits with"):
        answer(question)


def test_scoring_under_the_reference_costs_what_scoring_does() -> None:
    score = dataclasses.replace(DECODE, phase=Phase.SCORE, batch=8, data=1)
    seen, reference = (
        answer(dataclasses.replace(score, phase=phase)) for phase in (Phase.SCORE, Phase.REFERENCE)
    )
    assert seen.prediction.expected_s == reference.prediction.expected_s
    assert seen.memory_bytes == reference.memory_bytes


def test_where_no_size_helps_more_devices_are_proposed(capsys) -> None:
    words = ["--model", "llama-3.1-70b", "--hardware", "h100", "--devices", "8", "--phase", "train"]
    words += ["--batch", "64", "--tokens", "2048"]
    with pytest.raises(SystemExit):
        main(words)
    said = capsys.readouterr().err
    assert "it fits with --devices 32 --parallel.fsdp 32 --remat block" in said
    main([*words, "--devices", "32", "--parallel.fsdp", "32", "--remat", "block"])
    assert "32 x h100-sxm on 4 nodes of 8" in capsys.readouterr().out


MIXTURE = Question(
    model=find_model("qwen3-30b-a3b", 128), hardware=datasheet("h200"), phase=Phase.DECODE, batch=64,
    data=8, devices=8,
)  # fmt: skip


def test_experts_dealt_out_take_less_memory_and_time_for_an_exchange_of_tokens(capsys) -> None:
    whole, dealt = (answer(resized(MIXTURE, {"expert": expert})) for expert in (1, 8))
    experts = 48 * 128 * 3 * 768 * 2048 * 2
    saved = whole.memory_bytes["snapshots"] - dealt.memory_bytes["snapshots"]
    assert saved == experts * 7 // 8
    assert dealt.prediction.expected_s < whole.prediction.expected_s
    assert dealt.cost.link_bytes > 1e6 > whole.cost.link_bytes
    words = ["--model", "qwen3-30b-a3b", "--hardware", "h200", "--batch", "64", "--devices", "8"]
    main([*words, "--parallel.expert", "8"])
    assert "experts over 8" in capsys.readouterr().out


def test_what_a_mixture_takes_with_a_server_s_kernels_is_not_said_from_tables_without_experts() -> (
    None
):
    assert answer(MIXTURE).tuned_s is None
    assert answer(dataclasses.replace(MIXTURE, phase=Phase.PREFILL)).tuned_s is None
    assert answer(DECODE).tuned_s is not None


@pytest.mark.parametrize("name", DATASHEETS)
def test_training_is_predicted_on_a_node_of_every_card(name: str) -> None:
    asked = Question(
        model=find_model("qwen2.5-0.5b", 128), hardware=datasheet(name), phase=Phase.TRAIN, batch=8,
        tokens=512, fsdp=4, pipeline=2,
    )  # fmt: skip
    seen = answer(asked)
    assert seen.tuned_s is not None
    assert 0 < seen.tuned_s[1] < seen.tuned_s[0] < seen.tuned_s[2]


def test_the_interval_of_tuned_kernels_is_said_to_hold_what_it_holds(capsys) -> None:
    """exp(1.645 s) on both sides: nine tenths of a lognormal."""
    seen = answer(DECODE).tuned_s
    assert seen is not None
    shares = [NormalDist(0, UNCALIBRATED_SPREAD).cdf(math.log(end / seen[0])) for end in seen[1:]]
    assert shares == pytest.approx([0.05, 0.95], abs=1e-3)
    main(ARGUMENTS)
    assert "90 % between" in capsys.readouterr().out
