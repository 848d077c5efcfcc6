"""The GPU suite at tiny shapes on the CPU: every case runs, results survive, the tables say what is there."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import pytest

from benchmarks import gpu_table, record
from benchmarks.gpu import suite
from benchmarks.gpu.card import Watch, watching
from benchmarks.gpu.cases import GPU, KINDS, TINY, Case, Scale
from benchmarks.gpu.floors import decode_floor, model_flops
from benchmarks.gpu.phases import Bench, prepare
from benchmarks.gpu.profile import Event, most_expensive, own_times, ranked, sources
from benchmarks.gpu.report import Target, attention_table, report, targets
from benchmarks.gpu.store import CUT_OFF, MORE_TIME, Store, load_results
from benchmarks.gpu.suite import Call
from benchmarks.gpu.worker import run_case, serve
from jaxrl.attention import fastest
from roofline import cost
from roofline.datasheets import datasheet
from roofline.kernels import Layout
from roofline.machine import MEMORY_SHARE
from roofline.predict import predict

PARAMETERS = {"qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976}
"""Of the published checkpoints (Hugging Face Qwen/Qwen3-0.6B and -1.7B), a tied head counted once."""
HARDWARE = datasheet("h200")  # a stand-in: nothing here depends on what the CPU can do
CALIBRATION = {"status": "done", "hardware": HARDWARE.to_json(), "wall_s": 0.0}
MISSING_ON_THE_GPU_IMAGE = (
    "grain", "tensorboardX", "tyro", "sentencepiece", "safetensors", "tokenizers", "jinja2",
    "huggingface_hub", "math_verify", "py3langid", "datasets", "pyarrow",
)  # fmt: skip
WITHOUT = """
import importlib, runpy, sys
for name in sys.argv[1:]:
    sys.modules[name] = None  # its import fails
for name in ("benchmarks.gpu.suite", "benchmarks.gpu_table"):
    importlib.import_module(name)
runpy.run_module("benchmarks.gpu.worker", run_name="__main__")
"""
STUB = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu.cases import Case
from benchmarks.gpu.protocol import connect, told
folder = Path(__file__).parent
def run(name):
    with (folder / "begun").open("a") as log:
        print(name, os.getpid(), file=log)
    if name == "tiny publish" and not (folder / "go on").exists():
        time.sleep(60)
    return {"status": "done"}
job, answer = connect()
answer({"ready": {}})
for fields in job["cases"]:
    name = Case(**fields).name
    told(name, lambda: run(name), answer)
"""
"""A worker whose publication hangs until a file lets it go on; it notes what it begins."""
WITH_STUB = """
import sys
from benchmarks.gpu import suite
suite.WORKER = (sys.argv[1],)
suite.main(sys.argv[2:])
"""


@pytest.fixture(autouse=True)
def usual_promotion():
    """As in a run: optax raises floats to integer counts, which the tests' strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


COMPILED = """
import dataclasses
from benchmarks.gpu.cases import TINY, Case
from benchmarks.gpu.peers_torch import run_case
half = dataclasses.replace(TINY, dtype="bfloat16")
for more in ({"peer": "generate-static"}, {"peer": "train-compiled", "rows": 2, "tokens": 32}):
    result = run_case(half, Case(kind="peers", model="tiny", **more), "cpu")
    assert result["status"] == "done", result
"""
"""What tiny shapes leave out: PyTorch's compiler takes most of a minute."""


ANSWERS = """
import json, os, sys, time
def say(**content):
    print(json.dumps(content), flush=True)
def end(case, status):
    name = "tiny " + case["kind"]
    say(begun=name)
    say(ended=name, result={"status": status, "why": str(os.getpid()), "wall_s": 0.0})
cases = json.loads(sys.stdin.readline())["cases"]
say(ready={})
"""
"""The beginning of a process that answers as a worker does."""


def case_of(kind: str) -> Case:
    """The largest tiny case of a kind: the asynchronous one, the one with recomputation."""
    cases = [case for case in TINY.cases() if case.kind == kind]
    return max(cases, key=lambda case: (case.rows, case.remat == "block", case.max_staleness))


def call(kinds: tuple[str, ...] = KINDS, *, seconds: float = 300.0, profile: bool = False) -> Call:
    return Call(
        scale=TINY, device="cpu", kinds=kinds, deadline_s=time.monotonic() + seconds,
        profile=profile, models=list(TINY.models),
    )  # fmt: skip


def open_store(folder: Path) -> Store:
    return Store.open(folder, TINY, "a device", "0" * 40, more=())


@pytest.mark.parametrize("scale", [GPU, TINY], ids=lambda scale: scale.name)
def test_cases_have_names_of_their_own_and_cover_every_kind(scale) -> None:
    names = [case.name for case in scale.cases()]
    assert len(set(names)) == len(names)
    assert {case.kind for case in scale.cases()} == set(KINDS)
    assert all(tokens % scale.sequence == 0 for _, tokens in scale.packed)


def test_what_the_figures_ask_of_every_model_comes_before_what_is_set_beside_it() -> None:
    cases = GPU.cases()
    phases = {"calibrate", "decode", "train", "optimizer", "publish", "prefill", "score"}
    beside = next(i for i, case in enumerate(cases) if case.attention or case.kind not in phases)
    first = [(case.model, case.kind) for case in cases[:beside]]
    assert set(first) == {(model, kind) for model in GPU.models for kind in phases}
    decoded = {(case.rows, case.tokens) for case in cases[:beside] if case.kind == "decode"}
    assert decoded == set(GPU.decode_first)
    whole = [i for i, case in enumerate(cases) if case.kind == "grpo"]
    peers = [i for i, c in enumerate(cases) if c.kind == "peers" and c.peer != "generate-static"]
    assert max(peers) < min(whole)


def test_the_shapes_are_those_of_the_published_models() -> None:
    assert {name: model.num_parameters for name, model in GPU.models.items()} == PARAMETERS


def test_model_flops_agree_with_the_cost_of_scoring_when_every_key_is_seen() -> None:
    model, rows, tokens = TINY.models["tiny"], 2, 32
    work = cost.score(model, Layout(), tokens, rows, chunk_tokens=TINY.chunk_tokens)
    total = rows * tokens
    assert model_flops(model, total, tokens, headed=total, backward=False) == work.flops


@pytest.mark.parametrize("kind", ["decode", "prefill", "score", "train", "grpo"])
def test_a_case_is_measured_beside_its_bound_and_prediction(kind: str) -> None:
    result = run_case(TINY, case_of(kind), HARDWARE)
    assert result["status"] == "done"
    assert result["measured_s"]["min"] > 0
    assert 0 < result["bound_s"] <= result["expected_s"]
    assert result["ratio"] == result["measured_s"]["median"] / result["expected_s"]
    assert result["peak_bytes"] > 0
    if kind == "grpo":
        assert {"decode", "train", "optimizer", "publish"} <= result["phase_s"].keys()


@pytest.mark.parametrize(
    ("kind", "program"),
    [
        ("prefill", "jit_prefill"),
        ("optimizer", "jit_apply_gradients"),
        ("publish", "jit__fused_cast"),
    ],
)
def test_a_profile_names_the_kernels_of_its_phase_that_took_the_time(kind, program) -> None:
    kernels = run_case(TINY, case_of(kind), None, profiled=True)["kernels"]
    shares = [kernel["share"] for kernel in kernels]
    assert 0 < len(kernels) <= 10
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 1 + 1e-9  # sums of floats
    assert {kernel["program"] for kernel in kernels} == {program}


def test_a_trace_without_kernels_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="holds no kernel: it cannot see"):
        most_expensive(lambda: None)
    twice = jax.jit(lambda x: 2 * x)
    with pytest.raises(RuntimeError, match=r"no kernel of jit_other, but of .*jit__lambda"):
        most_expensive(lambda: twice(jax.numpy.ones(8)).block_until_ready(), None, ["jit_other"])


def test_time_inside_a_loop_is_counted_once() -> None:
    def event(name: str, start: float, duration: float) -> Event:
        return Event(
            kernel=name, operation=name, program="jit_f", start_ns=start, duration_ns=duration
        )

    line = [event("while.1", 0, 100), event("dot.7", 10, 30)]
    line += [event("dot.8", 50, 40), event("add", 100, 20)]
    assert {e.kernel: ns for e, ns in own_times(line)} == {
        "while.1": 30, "dot.7": 30, "dot.8": 40, "add": 20,
    }  # fmt: skip
    first = ranked([line], {("jit_f", "dot.7"): "mlp", ("jit_f", "dot.8"): "mlp"})[0]
    assert (first["kernel"], first["source"], first["calls"]) == ("dot", "mlp", 2)
    assert first["share"] == pytest.approx(70 / 120)
    assert ranked([line], {}, ["jit_g"]) == []


def test_the_source_of_a_kernel_is_read_from_the_program_it_belongs_to(tmp_path: Path) -> None:
    for program, source in (("jit_f", "jit(f)/mlp/dot"), ("jit_g", "jit(g)/head/dot")):
        text = f'HloModule {program}, x=1\n  %dot.3 = f32[2]{{0}} dot(a), metadata={{op_name="{source}" l=1}}\n'
        (tmp_path / f"module_1.{program}.after_optimizations.txt").write_text(text)
    assert sources(tmp_path) == {
        ("jit_f", "dot.3"): "jit(f)/mlp/dot", ("jit_g", "dot.3"): "jit(g)/head/dot",
    }  # fmt: skip


def test_the_command_runs_what_is_left_without_what_a_gpu_image_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "WORKER", ("-c", WITHOUT, *MISSING_ON_THE_GPU_IMAGE))
    arguments = ["--device", "cpu", "--only", "publish", "--out", str(tmp_path), "--minutes", "4"]
    store = Store.open(tmp_path, TINY, suite.device_name("cpu"), None, more=())
    store.put(Case(kind="calibrate", model="tiny").name, CALIBRATION)
    with pytest.raises(SystemExit) as ended:
        suite.main(arguments)
    assert ended.value.code == 0
    results = json.loads(store.path.read_text())["results"]
    assert results["tiny publish"]["measured_s"]["rounds"] >= 5
    assert "| publish |" in store.path.with_suffix(".md").read_text()
    monkeypatch.setattr(suite, "_run_process", lambda *_: pytest.fail("a finished case ran again"))
    with pytest.raises(SystemExit):
        suite.main(arguments)
    assert json.loads(store.path.read_text())["results"] == results


def test_a_finished_case_survives_and_other_sources_start_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("decode")
    store = open_store(tmp_path)
    store.put(case.name, {"status": "done"})
    again = open_store(tmp_path)
    assert again.is_finished(case)
    assert again.path == store.path
    monkeypatch.setattr("benchmarks.gpu.store.digest_of_sources", lambda: "changed")
    changed = open_store(tmp_path)
    assert not changed.is_finished(case)
    assert changed.path != store.path


def test_results_of_other_sources_are_gone_on_with_when_asked_and_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, publish = case_of("decode"), case_of("publish")
    open_store(tmp_path).put(decode.name, {"status": "done"})
    monkeypatch.setattr("benchmarks.gpu.store.digest_of_sources", lambda: "changed")
    again = partial(Store.open, tmp_path, TINY, more=(), commit=None, mixed=True)
    store = again(device="a device")
    assert store.is_finished(decode)
    store.put(publish.name, {"status": "done"})
    text = report(again(device="a device").content)
    assert "sources changed" in text
    assert "1 OF THE RESULTS ARE OF OTHER SOURCES" in text
    monkeypatch.setattr("benchmarks.gpu.store.versions", lambda: {"jax": "another"})
    assert not again(device="a device").is_finished(decode)


def test_results_brought_from_another_machine_are_gone_on_with(tmp_path: Path) -> None:
    brought, out, case = tmp_path / "brought", tmp_path / "out", case_of("decode")
    open_store(brought).put(case.name, {"status": "done"})
    store = Store.open(out, TINY, "a device", None, more=(brought,))
    assert store.is_finished(case)
    store.save()
    assert store.path.parent == out


def test_a_failed_case_is_tried_again_and_one_without_room_is_not(tmp_path: Path) -> None:
    case, store = case_of("decode"), open_store(tmp_path)
    store.put(case.name, {"status": "failed", "why": "?"})
    assert not store.is_finished(case)
    store.put(case.name, {"status": "no room", "why": "?"})
    assert store.is_finished(case)


def test_no_folder_of_this_machine_gets_into_the_results(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put("a", {"status": "failed", "why": f"in {record.ROOT}/x.py"})
    assert store.content["results"]["a"]["why"] == "in ./x.py"
    store.content["results"]["a"]["log"] = str(record.ROOT)
    with pytest.raises(ValueError, match="name the path"):
        store.save()


def test_nothing_starts_after_the_time_is_over(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert suite.run(call(seconds=-1.0), store) == len(TINY.cases())
    assert store.content["results"] == {}


def test_a_case_is_cut_off_when_the_time_is_over(tmp_path: Path, capsys) -> None:
    case, store = case_of("decode"), open_store(tmp_path)
    program = f'import time; print(\'{{"begun": "{case.name}"}}\', flush=True); time.sleep(60)'
    began = time.monotonic()
    suite._run_process(call(seconds=0.5), store, Watch(), [case], [sys.executable, "-c", program])
    assert time.monotonic() - began < 30
    assert store.content["results"][case.name]["status"] == CUT_OFF
    assert "more --minutes" in capsys.readouterr().out
    assert not store.is_finished(case)
    had_s = store.outcomes[case.name]["wall_s"]
    assert store.expected_s(case, TINY) == MORE_TIME * had_s > 0


def test_a_process_that_dies_fails_its_case_with_a_reason(tmp_path: Path, capsys) -> None:
    case, store = case_of("decode"), open_store(tmp_path)
    program = f'import sys; print(\'{{"begun": "{case.name}"}}\', flush=True); sys.exit("the end")'
    suite._run_process(call(), store, Watch(), [case], [sys.executable, "-c", program])
    result = store.content["results"][case.name]
    assert (result["status"], "code 1" in result["why"]) == ("failed", True)
    assert "the end" in capsys.readouterr().err


def test_what_keeps_processes_from_starting_is_said_and_not_tried_with_every_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    starts = tmp_path / "starts"
    program = f"open({str(starts)!r}, 'a').write('x'); import absent_here"
    monkeypatch.setattr(suite, "WORKER", ("-c", program))
    monkeypatch.setattr(suite, "PEERS_PYTHON", ())
    store = open_store(tmp_path)
    left = suite.run(call(), store)
    assert starts.read_text() == suite.START_TRIES * "x"
    assert "No module named 'absent_here'" in capsys.readouterr().err
    found = {name: r["status"] for name, r in store.content["results"].items()}
    peers = [case.name for case in TINY.cases() if case.kind == "peers"]
    assert found == {"tiny calibrate": "failed", **dict.fromkeys(peers, "skipped")}
    assert left == len(TINY.cases()) - len(peers)


@pytest.mark.parametrize("fate", ["sys.exit(1)", "time.sleep(60)"])
def test_a_process_that_ends_badly_after_its_last_case_costs_nothing(
    tmp_path: Path, fate: str
) -> None:
    cases, store = [case_of("publish"), case_of("optimizer")], open_store(tmp_path)
    program = f"{ANSWERS}\nfor case in cases:\n    end(case, 'done')\n{fate}"
    began = time.monotonic()
    left = suite._run_process(call(), store, Watch(), cases, [sys.executable, "-c", program])
    assert time.monotonic() - began < 30
    assert left == []
    assert [r["status"] for r in store.content["results"].values()] == ["done", "done"]


def test_a_worker_ends_after_a_case_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> dict[str, object]:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr("benchmarks.gpu.worker.run_case", fail)
    answers: list[dict[str, object]] = []
    cases = [case for case in TINY.cases() if case.kind == "prefill"] * 2
    job = {
        "scale": "tiny", "hardware": None, "dump": None, "profile": False, "attention": {},
        "cases": [dataclasses.asdict(case) for case in cases], "left_s": 60.0,
        "expected_s": [0.0, 0.0],
    }  # fmt: skip
    serve(job, answers.append)
    assert [next(iter(answer)) for answer in answers] == ["ready", "begun", "ended"]
    assert "the device is lost" in str(answers[-1]["result"])


@pytest.mark.parametrize("status", ["failed", "no room"])
def test_a_case_that_did_not_succeed_is_the_last_of_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    program = f"{ANSWERS}\nfor case in cases:\n    end(case, {status!r})"
    monkeypatch.setattr(suite, "WORKER", ("-c", program))
    store = open_store(tmp_path)
    store.put(Case(kind="calibrate", model="tiny").name, CALIBRATION)
    suite.run(call(("optimizer", "publish")), store)
    first, second = (store.content["results"][f"tiny {name}"] for name in ("optimizer", "publish"))
    assert first["status"] == second["status"] == status
    assert first["why"] != second["why"]  # numbers of processes


def test_packages_on_the_python_path_are_there_for_the_processes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(suite, "WORKER", ("-c", f"import only_here, models\n{ANSWERS}"))
    command = [sys.executable, *suite.WORKER]
    assert (
        suite._run_process(call(), open_store(tmp_path), Watch(), [case_of("publish")], command)
        == []
    )


@pytest.mark.parametrize("own", [None, "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
@pytest.mark.parametrize(("device", "platform"), [("cpu", "cpu"), ("gpu", "cuda")])
def test_a_process_gets_its_platform_and_most_of_the_memory_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, own: str | None, device: str, platform: str
) -> None:
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv(own, "0.5")
    show = "import json, os; print(json.dumps(dict(os.environ)), flush=True)"
    of = dataclasses.replace(call(), device=device)
    with suite._started(of, [sys.executable, "-c", show], "dump") as (process, _):
        told = json.loads(process.communicate()[0])
    assert told["JAX_PLATFORMS"] == platform
    given = {name: told[name] for name in names if name in told}
    # jaxlib refuses both at once
    assert given == ({own: "0.5"} if own else {"XLA_CLIENT_MEM_FRACTION": MEMORY_SHARE})


@pytest.mark.parametrize(("status", "code"), [("failed", 1), ("no room", 0)])
def test_the_command_ends_by_its_minutes_and_tells_of_failed_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, status: str, code: int
) -> None:
    left_s: list[float] = []

    def run(call: Call, store: Store) -> int:
        left_s.append(call.deadline_s - time.monotonic())
        store.put("tiny publish", {"status": status, "why": "?"})
        return 3

    monkeypatch.setattr(suite, "run", run)
    with pytest.raises(SystemExit) as ended:
        suite.main(["--device", "cpu", "--minutes", "7", "--out", str(tmp_path)])
    assert ended.value.code == code
    assert 0 < 7 * 60 - suite.TO_STOP_S - left_s[0] < 60  # some seconds are gone before it
    assert "3 left to do" in capsys.readouterr().out


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.provenance(timed=False)["commit"] == "unknown"


PROGRAM = """
import json, sys, time
cases = json.loads(sys.stdin.readline())["cases"]
for case in cases:
    name = f"{case['model']} decode {case['rows']}x{case['tokens']}"
    print(json.dumps({"begun": name}), flush=True)
    %s
    print(json.dumps({"ended": name, "result": {"status": "no room", "why": "?"}}), flush=True)
"""
"""A process that answers as a worker does, but for what a test puts into it."""


@pytest.mark.parametrize(
    "fate", ["case['rows'] == 2 and sys.exit(1)", "case['rows'] == 2 and time.sleep(60)"]
)
def test_a_case_that_kills_its_process_or_never_ends_costs_no_other_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fate: str
) -> None:
    short = dataclasses.replace(TINY, decode_programs=(), longest_s=2.0)
    monkeypatch.setattr(suite, "WORKER", ("-c", PROGRAM % fate))
    monkeypatch.setattr(Scale, "_decode_variants_of", lambda *_: [])
    store = open_store(tmp_path)
    store.put(Case(kind="calibrate", model="tiny").name, CALIBRATION)
    suite.run(dataclasses.replace(call(("decode",)), scale=short), store)
    found = {name: r["status"] for name, r in store.content["results"].items()}
    assert found["tiny decode 2x32"] == "failed"
    assert found["tiny decode 4x32"] == "no room"


def test_a_case_of_a_call_that_was_killed_comes_again_after_the_others(tmp_path: Path) -> None:
    first, second = (
        case for case in TINY.cases() if case.name in ("tiny optimizer", "tiny publish")
    )
    store = open_store(tmp_path)
    store.begin(first.name)  # and nobody lives to say how it ended
    again = open_store(tmp_path)
    assert again.content["results"][first.name]["status"] == CUT_OFF
    left = [
        c for c in suite._wanted(call(("optimizer", "publish")), again) if c.kind != "calibrate"
    ]
    assert left == [second, first]
    assert not open_store(tmp_path).content.get("begun")


def ended(process: int) -> bool:
    """It is gone, or nobody has asked yet how it ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_for(there) -> None:
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="asks proc(5) what still runs")
def test_a_kill_leaves_no_process_and_the_next_call_does_the_rest(tmp_path: Path) -> None:
    stub, log = tmp_path / "stub.py", tmp_path / "begun"
    stub.write_text(STUB)
    log.touch()
    store = Store.open(tmp_path, TINY, suite.device_name("cpu"), None, more=())
    store.put(Case(kind="calibrate", model="tiny").name, CALIBRATION)
    words = [sys.executable, "-c", WITH_STUB, str(stub), "--device", "cpu", "--minutes", "4"]
    words += ["--only", "optimizer,publish,prefill", "--out", str(tmp_path)]

    def begun() -> list[list[str]]:
        return [line.rsplit(" ", 1) for line in log.read_text().splitlines()]

    with subprocess.Popen(words, cwd=record.ROOT, stdout=subprocess.DEVNULL) as call:
        wait_for(lambda: len(begun()) == 2 and '"tiny publish"' in store.path.read_text())
        call.send_signal(signal.SIGKILL)
    killed = json.loads(store.path.read_text())
    wait_for(lambda: ended(int(begun()[1][1])))
    (tmp_path / "go on").touch()
    subprocess.run(words, cwd=record.ROOT, stdout=subprocess.DEVNULL, check=True)
    names = [name for name, _ in begun()]
    assert names == ["tiny optimizer", "tiny publish", "tiny prefill 2x16", "tiny publish"]
    after = json.loads(store.path.read_text())
    assert "begun" not in after
    assert {name: r["status"] for name, r in after["results"].items()} == {
        "tiny calibrate": "done", **dict.fromkeys(names, "done"),
    }  # fmt: skip
    for name in ("tiny calibrate", "tiny optimizer"):
        assert after["results"][name] == killed["results"][name]


def test_a_profile_that_was_killed_or_failed_comes_last_and_leaves_the_times_alone(
    tmp_path: Path,
) -> None:
    kinds = ("optimizer", "publish", "prefill")
    first, second, third = (case for case in TINY.cases() if case.kind in kinds)
    open_store(tmp_path).put(second.name, {"status": "done"})
    again = partial(Store.open, tmp_path, TINY, "a device", None, more=(), profiled=True)
    again().put(first.name, {"status": "failed", "why": "?", "wall_s": 70.0})
    again().begin(second.name)  # and nobody lives to say how it ended
    store = again()
    assert suite._wanted(call(kinds, profile=True), store) == [third, first, second]
    assert store.outcomes[second.name]["status"] == CUT_OFF
    assert store.expected_s(first, TINY) == 70
    assert open_store(tmp_path).is_finished(second)
    assert f"Kernels of {first.name}: failed, ?" in report(store.content)


def test_a_case_that_would_not_fit_the_time_left_is_not_begun(tmp_path: Path) -> None:
    answers: list[dict[str, object]] = []
    cases = [case for case in TINY.cases() if case.kind == "prefill"] * 2
    job = {
        "scale": "tiny", "hardware": HARDWARE.to_json(), "dump": None, "profile": False, "attention": {},
        "cases": [dataclasses.asdict(case) for case in cases], "left_s": 60.0,
        "expected_s": [100.0, 0.0],
    }  # fmt: skip
    serve(job, answers.append)
    assert [next(iter(answer)) for answer in answers] == ["ready", "begun", "ended"]
    store = open_store(tmp_path)
    store.put(cases[0].name, {"status": "no room", "why": "?", "wall_s": 50.0})
    assert store.expected_s(cases[0], TINY) == 50
    assert store.expected_s(case_of("decode"), dataclasses.replace(TINY, first_s=60.0)) == 60
    assert (
        store.expected_s(cases[0], dataclasses.replace(TINY, longest_s=40.0)) == 40
    )  # ends by then


def test_without_a_calibration_a_case_is_predicted_from_the_datasheet_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.gpu.worker.datasheet_of_device", lambda _: HARDWARE)
    assert run_case(TINY, case_of("publish"), None)["calibrated"] is False
    monkeypatch.setattr("benchmarks.gpu.worker.datasheet_of_device", lambda _: None)
    with pytest.raises(ValueError, match="--only calibrate first"):
        run_case(TINY, case_of("publish"), None)


def test_the_bound_of_decode_is_the_books_weights_and_cache_once_per_step() -> None:
    model, layout = GPU.models["qwen3-0.6b"], Layout(
        compute_dtype="bfloat16", param_dtype="bfloat16", kv_dtype="bfloat16"
    )  # fmt: skip
    step = decode_floor(model, layout, 256, 511, 1)
    weights, a_token = 2 * PARAMETERS["qwen3-0.6b"], 114_688  # bytes per token of the cache
    assert step.hbm_bytes == weights + 256 * 512 * a_token
    seconds = predict(step, HARDWARE).lower_s
    assert seconds == pytest.approx(3.44e-3, rel=0.02)  # the reference table's book roof
    half = decode_floor(model, layout, 256, 511, 1, held=256 * 511 / 2)
    assert half.hbm_bytes == pytest.approx(weights + 256 * 256.5 * a_token)


def test_no_bound_counts_what_a_program_of_attention_moves() -> None:
    bench = Bench(scale=TINY, name="tiny")
    case = dataclasses.replace(case_of("score"), attention="xla")
    prepared = prepare(bench, case)
    (floor,) = prepared.useful()
    assert floor.flops == prepared.model_flops
    assert floor.hbm_bytes == 4 * bench.model.num_parameters
    assert prepared.executed()[0].hbm_bytes > floor.hbm_bytes


def test_whole_steps_decode_with_the_fastest_program_measured_so_far() -> None:
    kind = jax.local_devices()[0].device_kind
    seconds = {"blocks": 2.0, "xla": 1.0}
    table = {kind: [{"phase": "decode", "rows": 4, "tokens": 32, "seconds": seconds}]}
    assert Bench(scale=TINY, name="tiny").decode_program(4, 32) == "blocks"
    assert Bench(scale=TINY, name="tiny", table=table).decode_program(4, 32) == "xla"


def test_the_card_is_read_while_a_case_runs_and_what_it_does_not_tell_is_left_out() -> None:
    lines = "print('1980, 2619, [N/A], 40'); print('No devices'); print('1200, 2619, [N/A], 60')"
    with watching([sys.executable, "-c", f"{lines}; import sys; sys.stdout.flush()"]) as card:
        deadline = time.monotonic() + 30
        while len(card.readings) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        found = card.between(0.0, time.monotonic())
    assert found["clocks.sm"] == {"min": 1200, "median": 1590, "max": 1980}
    assert found.keys() == {"clocks.sm", "clocks.mem", "temperature.gpu"}
    assert Watch().between(0.0, 1.0) == {}


def test_peers_that_are_not_installed_are_skipped_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(suite, "PEERS_PYTHON", (str(tmp_path / "absent"),))
    store = open_store(tmp_path)
    assert suite.run(call(("peers",)), store) == 0
    assert {r["status"] for r in store.content["results"].values()} == {"skipped"}
    assert "not installed" in capsys.readouterr().out


def test_an_unknown_kind_is_refused_with_the_known_ones(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        suite.main(["--only", "decoed"])
    assert ended.value.code == 2
    assert "decode" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reached", "most", "verdict"),
    [(0.7, False, "reached"), (0.5, False, "missed by 1.30x"), (0.5, True, "reached"),
     (1.3, True, "missed by 2.00x"), (None, False, "not measured")],
)  # fmt: skip
def test_a_missed_figure_says_by_how_much(reached, most: bool, verdict: str) -> None:
    assert Target(name="x", wanted=0.65, reached=reached, most=most).verdict == verdict


def made_up(seconds: float) -> dict[str, object]:
    spread = {"median": seconds, "min": seconds, "max": seconds, "rounds": 5}
    return {
        "status": "done", "measured_s": spread, "bound_s": 0.5, "expected_s": 0.8, "binds": "memory",
        "share_of_bound": 0.5 / seconds, "ratio": seconds / 0.8, "tokens_per_s": 100 / seconds,
        "calibrated": True, "attention": "xla", "mfu": 0.4,
        "peak_bytes": 2**30, "peak_is_this_cases": True, "wall_s": 1.0,
    }  # fmt: skip


def made_up_results(folder: Path) -> Store:
    model, peer = "qwen3-0.6b", {"status": "done", "wall_s": 1.0}
    spread = made_up(10.0)["measured_s"]
    store = Store.open(folder, GPU, "Device X", "0" * 40, more=())
    for name, result in {
        "decode 256x512": made_up(1.0), "decode 256x512 shared": made_up(0.6),
        "decode 256x512 int8": made_up(0.6), "decode 1x512": made_up(1.0), "rollout": made_up(1.0),
        "train 8x2048 remat": made_up(2.0), "train 8x2048": made_up(1.0),
        "optimizer": {**made_up(1.0), "tokens_per_s": 0.0},
        "publish": {**made_up(1.0), "copy_s": 0.5},
        "peers generate": {**peer, "measured_s": spread, "tokens_per_s": 10.0},
        "peers train 8x2048": {**peer, "measured_s": spread, "tokens_per_s": 50.0},
        "grpo synchronous": {"status": "no room", "why": "too large"},
    }.items():  # fmt: skip
        store.put(f"{model} {name}", result)
    return store


def test_the_figures_to_reach_use_the_best_variant_of_each_side(tmp_path: Path) -> None:
    found = {t.name: t for t in targets(made_up_results(tmp_path).content["results"])}
    assert found["qwen3-0.6b decode 256x512: share of bound"].verdict == "missed by 1.30x"
    assert found["qwen3-0.6b publication over a bare copy"].reached == 2
    # predicted 0.8 s, measured 1 s and (train with recomputation) 2 s
    assert found["error of predictions, median"].reached == pytest.approx(0.2)
    assert found["error of predictions, worst"].reached == pytest.approx(0.6)
    assert found["qwen3-0.6b rollout over PyTorch"].reached == 10
    # 100 tokens in 1 s of training and 1 s of optimizer against 50 tokens/s
    assert found["qwen3-0.6b train step with optimizer over PyTorch"].reached == 1
    assert found["qwen3-0.6b score 8x2048: MFU"].verdict == "not measured"
    assert found["qwen3-1.7b train 8x2048: MFU"].verdict == "not measured"
    assert targets({"tiny decode 2x32": made_up(1.0)}) == []


def test_the_report_names_what_was_not_measured(tmp_path: Path) -> None:
    text = report(made_up_results(tmp_path).content)
    assert "grpo synchronous: no room, too large" in text
    assert "OTHER SOURCES" not in text
    assert "While cases ran" not in text
    assert "| decode 256x512 | 500.00 | 800.00 | 1,000.00 (1,000.00 to 1,000.00) | 50.0% |" in text
    assert "| train 8x2048 | 10,000.00 (10,000.00 to 10,000.00) | 50 |  |" in text


def test_the_readme_table_holds_the_newest_results_of_each_device(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{gpu_table.START}old\n{gpu_table.END}\nafter\n")
    old = made_up_results(tmp_path)
    old.content["provenance"]["date"] = "2020-01-01 00:00 UTC"
    old.content["key"]["sources"] = "older"
    old.save()
    newer = made_up_results(tmp_path)
    assert newer.path != old.path
    assert next(r["key"]["sources"] for r in load_results(tmp_path)) == "older"
    programs = tmp_path / "programs" / "attention.json"
    programs.parent.mkdir()
    options = ["--results", str(tmp_path), "--readme", str(readme), "--attention", str(programs)]
    gpu_table.main(options)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old\n" not in text
    assert text.count("Device X:") == 1
    assert newer.content["key"]["sources"] in text
    assert "| qwen3-0.6b | decode 256x512 | 500.00 | 800.00 | 1000.00 | 50% |" in text


def test_the_report_says_how_the_card_ran_as_far_as_it_told(tmp_path: Path) -> None:
    store, name = made_up_results(tmp_path), "qwen3-0.6b decode 1x512"
    clocks = {"min": 345.0, "median": 1400.0, "max": 1980.0}
    store.put(name, {**made_up(1.0), "card": {"clocks.sm": clocks}})
    assert "While cases ran: SM clock 1400 to 1400 MHz (medians)." in report(store.content)
    watts, celsius = {**clocks, "max": 690.0}, {**clocks, "max": 61.0}
    card = {
        "clocks.sm": {**clocks, "median": 1900.0},
        "power.draw": watts,
        "temperature.gpu": celsius,
    }
    store.put("qwen3-0.6b rollout", {**made_up(1.0), "card": card})
    words = "SM clock 1400 to 1900 MHz (medians), at most 690 W, at most 61 degrees Celsius"
    assert words in report(store.content)


@pytest.mark.parametrize("outcome", [None, {"status": CUT_OFF, "why": "?"}, made_up(1.0)])
def test_the_readme_table_says_how_much_of_the_suite_was_measured(tmp_path: Path, outcome) -> None:
    store = Store.open(tmp_path, GPU, "Device X", "0" * 40, more=())
    if outcome is not None:
        store.put("qwen3-0.6b decode 256x512", outcome)
    text = gpu_table.block(store.content)
    measured = outcome is not None and outcome["status"] == "done"
    assert f"{int(measured)} of {len(GPU.cases())} cases measured so far" in text
    assert ("missed by 1.30x" in text) == measured
    assert "0 of " in text


def test_programs_of_attention_are_chosen_from_the_results(tmp_path: Path) -> None:
    store = made_up_results(tmp_path)
    faster = {
        **store.content["results"]["qwen3-0.6b decode 256x512"],
        "measured_s": {"median": 0.5},
        "attention": "pallas",
    }
    store.content["results"]["qwen3-0.6b decode 256x512 pallas"] = faster
    store.content["results"]["qwen3-0.6b decode 256x2048 int8"] = faster
    table = attention_table([store.content])
    (device,) = table
    assert table[device] == [
        {"phase": "decode", "rows": 256, "tokens": 512, "seconds": {"xla": 1.0, "pallas": 0.5}}
    ]
    newer = json.loads(json.dumps(store.content))
    newer["results"]["qwen3-0.6b decode 256x512"]["measured_s"]["median"] = 3.0
    del newer["results"]["qwen3-0.6b decode 256x512 pallas"]  # nothing compared, nothing decided
    other = {**newer, "results": store.content["results"], "provenance": {"device": "Device Y"}}
    assert attention_table([store.content, newer, other]) == table | {"Device Y": table[device]}
    chosen = partial(fastest, table, device, "decode", 200, 700)
    assert chosen(["xla", "pallas", "cudnn"]) == "pallas"
    assert chosen(["xla"]) == "xla"
    assert fastest(table, device, "train", 200, 700, ["xla"]) is None
    assert fastest(table, "another device", "decode", 200, 700, ["xla"]) is None


def test_without_gpu_results_the_readme_stays_as_it_is(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{gpu_table.START}kept\n{gpu_table.END}")
    open_store(tmp_path).save()  # tiny shapes on a CPU are no GPU results
    with pytest.raises(SystemExit, match="run it on a GPU first"):
        gpu_table.main(["--results", str(tmp_path), "--readme", str(readme)])
    assert "kept" in readme.read_text()


@pytest.fixture
def torch_is_there() -> None:
    if not any(map(suite._has_torch, suite.PEERS_PYTHON)):
        pytest.skip("no torch and transformers here or in .venv-peers; make peers installs them")


@pytest.mark.usefixtures("torch_is_there")
def test_pytorch_runs_the_same_shapes(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert suite.run(call(("peers",)), store) == 0
    assert len(store.content["results"]) == 3
    for name, result in store.content["results"].items():
        assert result["status"] == "done", (name, result)
        assert result["tokens_per_s"] > 0
    assert "| generate | " in report(store.content)


@pytest.mark.slow
@pytest.mark.usefixtures("torch_is_there")
def test_pytorch_compiles_its_cache_and_its_step_in_bfloat16() -> None:
    python = next(filter(suite._has_torch, suite.PEERS_PYTHON))
    subprocess.run(
        [python, "-c", COMPILED], env={**os.environ, "PYTHONPATH": str(record.ROOT)}, check=True
    )


@pytest.mark.slow
def test_the_whole_suite_runs_by_its_command(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu_suite.py", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=record.ROOT, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True,
        text=True, timeout=290, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())["results"]
    assert results.keys() == {case.name for case in TINY.cases()}


@pytest.mark.gpu
def test_the_suite_measures_on_a_gpu(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "benchmarks/gpu_suite.py",
        "--only",
        "publish",
        "--out",
        str(tmp_path),
    ]
    subprocess.run([*command, "--models", "qwen3-0.6b"], cwd=record.ROOT, check=True)


def test_a_case_can_be_sent_to_a_process() -> None:
    for case in GPU.cases():
        assert Case(**json.loads(json.dumps(dataclasses.asdict(case)))) == case
