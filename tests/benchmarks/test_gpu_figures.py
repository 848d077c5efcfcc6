"""What the GPU suite counts: bounds, predictions, shares, MFU, and which figures are wanted of which shapes."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from benchmarks.gpu import measure, worker
from benchmarks.gpu.cases import GPU, TINY, WARM_UPS, Case
from benchmarks.gpu.floors import model_flops, rows_floor
from benchmarks.gpu.grpo import Step, _needed
from benchmarks.gpu.measure import Prepared, Span, compared
from benchmarks.gpu.phases import Bench, prepare
from benchmarks.gpu.report import SHARES, targets
from benchmarks.gpu.worker import make, run_case
from roofline import cost
from roofline.datasheets import datasheet
from roofline.kernels import Layout
from roofline.phases import Phase, PhaseCost

HARDWARE = datasheet("h200")
PEAK, BYTES_PER_S = 989.4e12, 4.8e12
"""Dense bfloat16 and HBM of an H200 by its datasheet."""
BENCH = Bench(scale=TINY, name="tiny")
MODEL = BENCH.model
TOKEN_BYTES = 2 * MODEL.num_layers * MODEL.num_kv_heads * MODEL.head_size * 4
"""Of one token's keys and values in float32."""


@pytest.fixture(autouse=True)
def usual_promotion():
    """As in a run: optax raises floats to integer counts, which the tests' strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def work(phase: Phase, *, flops: float = 0.0, hbm_bytes: float = 0.0) -> PhaseCost:
    return PhaseCost(phase=phase, flops=flops, hbm_bytes=hbm_bytes, dtype="bfloat16")


def prepared(*useful: PhaseCost, overlapped: bool = False, flops: float = 0.0) -> Prepared:
    return Prepared(
        once=lambda: [0.25], useful=lambda: useful, executed=lambda: useful, tokens=512,
        model_flops=flops, overlapped=overlapped,
    )  # fmt: skip


def test_training_is_three_times_the_forward_pass_and_writes_float32_gradients() -> None:
    forward, both = (
        model_flops(MODEL, 64, 8.5, headed=64, backward=backward) for backward in (False, True)
    )
    assert both == 3 * forward
    train = rows_floor(MODEL, Layout(param_dtype="bfloat16"), Phase.TRAIN, both)
    score = rows_floor(MODEL, Layout(param_dtype="bfloat16"), Phase.SCORE, forward)
    assert (score.hbm_bytes, score.flops) == (2 * MODEL.num_parameters, forward)
    assert (train.hbm_bytes, train.flops) == ((2 + 4) * MODEL.num_parameters, both)


def test_share_ratio_mfu_and_rate_are_of_the_measured_time_and_the_datasheets_peaks() -> None:
    half_a_second = work(Phase.TRAIN, flops=0.5 * PEAK)
    found = compared(prepared(half_a_second, flops=0.2 * PEAK), HARDWARE, 2.0)
    assert found["bound_s"] == pytest.approx(0.5)
    assert found["share_of_bound"] == pytest.approx(0.25)
    assert found["mfu"] == pytest.approx(0.1)
    assert found["ratio"] == pytest.approx(2.0 / found["expected_s"])
    assert found["tokens_per_s"] == 256
    assert "mfu" not in compared(prepared(half_a_second), HARDWARE, 2.0)


def test_phases_in_turn_are_bounded_by_their_sum_and_side_by_side_by_what_all_need_most() -> None:
    phases = (
        work(Phase.TRAIN, flops=0.5 * PEAK, hbm_bytes=0.1 * BYTES_PER_S),
        work(Phase.DECODE, flops=0.1 * PEAK, hbm_bytes=0.3 * BYTES_PER_S),
    )
    in_turn, overlapped = (
        compared(prepared(*phases, overlapped=side_by_side), HARDWARE, 1.0)["bound_s"]
        for side_by_side in (False, True)
    )
    assert in_turn == pytest.approx(0.5 + 0.3)
    assert overlapped == pytest.approx(0.6)


@pytest.mark.parametrize(("peaks", "own"), [((5, 5), False), ((5, 7), True)])
def test_a_peak_is_a_cases_own_only_if_it_rose_while_it_ran(
    monkeypatch: pytest.MonkeyPatch, peaks: tuple[int, int], own: bool
) -> None:
    told = iter(peaks)
    monkeypatch.setattr(measure, "peak_bytes", lambda: next(told))
    found = measure.measure(prepared(work(Phase.TRAIN, flops=PEAK)), HARDWARE, 0.0)
    assert (found["peak_bytes"], found["peak_is_this_cases"]) == (peaks[1], own)


def test_decode_is_bounded_by_the_keys_that_its_timed_chunks_see() -> None:
    case = Case(kind="decode", model="tiny", rows=4, tokens=32)
    steps, keys = TINY.chunk_steps, case.tokens - TINY.chunk_steps
    weights = 4 * MODEL.num_parameters
    made = prepare(BENCH, case)
    assert made.tokens == 4 * steps
    (floor,) = made.useful()
    assert floor.hbm_bytes == steps * (weights + TOKEN_BYTES * 4 * (keys + 1))
    (shared,) = prepare(BENCH, dataclasses.replace(case, shares=True)).useful()
    prompt = case.tokens - 3 * steps  # once for all four slots
    held = 4 * (keys - prompt) + prompt
    assert shared.hbm_bytes == steps * (weights + TOKEN_BYTES * (held + 4))
    assert shared.flops == floor.flops


@pytest.mark.parametrize(("program", "keys"), [("xla", 36), ("pallas", 32)])
def test_decode_is_predicted_for_the_keys_that_its_program_reads(program: str, keys: int) -> None:
    case = Case(kind="decode", model="tiny", rows=4, tokens=36, attention=program)
    of = {n: cost.decode(MODEL, BENCH.cache_layout(""), 4, n, TINY.chunk_steps) for n in (32, 36)}
    assert of[32] != of[36]
    assert prepare(BENCH, case).executed() == [of[keys]]


def test_prefill_makes_no_logits() -> None:
    case = Case(kind="prefill", model="tiny", rows=2, tokens=16)
    wanted = model_flops(MODEL, 32, 8.5, headed=0, backward=False)
    assert prepare(BENCH, case).model_flops == wanted


def test_a_publication_and_the_copy_beside_it_are_both_waited_for(monkeypatch) -> None:
    made, waited = prepare(BENCH, Case(kind="publish", model="tiny")), []
    wait = jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: waited.append(tree) or wait(tree))
    made.once()
    assert len(waited) == 2


def test_a_rollout_needs_each_prompt_once_and_each_step_the_keys_there_by_then() -> None:
    shape = TINY.rollout
    prefill, decode = _needed(BENCH)
    assert prefill.flops == model_flops(
        MODEL, shape.prompts * shape.prompt_tokens, (shape.prompt_tokens + 1) / 2, headed=0,
        backward=False,
    )  # fmt: skip
    seen = [shape.prompt_tokens + step for step in range(shape.new_tokens)]  # and the token itself
    weights = 4 * MODEL.num_parameters * shape.new_tokens
    assert decode.hbm_bytes == weights + TOKEN_BYTES * shape.samples * sum(n + 1 for n in seen)


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_whole_step_counts_all_its_phases_and_overlaps_if_asynchronous(staleness: int) -> None:
    made = make(BENCH, Case(kind="grpo", model="tiny", max_staleness=staleness))
    try:
        assert made.overlapped == bool(staleness)
        assert [c.phase for c in made.useful()] == [
            Phase.PREFILL, Phase.DECODE, Phase.TRAIN, Phase.OPTIMIZER, Phase.PUBLISH,
        ]  # fmt: skip
    finally:
        made.close()


def test_a_step_reports_its_phases_without_the_steps_that_warmed_up() -> None:
    spans = [[Span(phase=Phase.TRAIN, seconds=s)] for s in (*[100.0] * WARM_UPS, 1.0, 3.0)]
    step = SimpleNamespace(spans=spans, bench=BENCH, microbatches=1)
    assert Step.facts(step)["phase_s"] == {"train": 2.0}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "status"),
    [(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "no room"),
     (MemoryError("host"), "no room"), (jax.errors.JaxRuntimeError("INTERNAL: ?"), None)],
)  # fmt: skip
def test_a_case_without_room_says_so_and_another_error_is_one(
    monkeypatch: pytest.MonkeyPatch, error: Exception, status: str | None
) -> None:
    def fail(*_: object) -> Prepared:
        raise error

    monkeypatch.setattr(worker, "make", fail)
    case = Case(kind="publish", model="tiny")
    if status is None:
        with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
            run_case(TINY, case, HARDWARE)
    else:
        assert run_case(TINY, case, HARDWARE)["status"] == status


def test_profiled_programs_are_not_taken_from_the_cache_of_compiled_ones(monkeypatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(worker, "serve", lambda *_: None)
    monkeypatch.setattr(worker, "remember_programs", lambda: kept.append(True))
    for profiled in (True, False):
        monkeypatch.setattr(worker, "connect", lambda p=profiled: ({"profile": p}, print))
        worker.main()
    assert len(kept) == 1


def test_the_shapes_are_those_that_were_asked_for() -> None:
    cases = GPU.cases()
    for model in GPU.models:
        of = [case for case in cases if case.model == model]
        plain = {(c.rows, c.tokens) for c in of if c.kind == "decode" and not c.attention}
        assert plain == {(b, s) for b in (1, 64, 256, 512) for s in (512, 2048)}
        trained = {
            (c.rows * c.tokens, c.remat) for c in of if c.kind == "train" and not c.attention
        }
        assert trained == {(n, remat) for n in (4096, 16384) for remat in ("none", "block")}
        assert {c.peer for c in of} >= {"generate", "generate-static", "train", "train-compiled"}
        assert {c.max_staleness for c in of if c.kind == "grpo"} == {0, 1}
    assert {case.cache_dtype for case in cases} == {"", "int8", "float8_e4m3"}
    assert {case.attention for case in cases} == {"", "xla", "pallas", "cudnn"}


def test_the_figures_to_reach_are_those_that_were_set() -> None:
    name = "qwen3-0.6b publish"
    found = {t.name: (t.wanted, t.most) for t in targets({name: {"status": "failed"}})}
    wanted = {
        "error of predictions, median": (0.10, True), "error of predictions, worst": (0.15, True)
    }  # fmt: skip
    for model, (wide, single, train) in {
        "qwen3-0.6b": (0.65, 0.35, 0.35), "qwen3-1.7b": (0.70, 0.50, 0.45),
    }.items():  # fmt: skip
        wanted |= {
            f"{model} decode 256x512: share of bound": (wide, False),
            f"{model} decode 1x512: share of bound": (single, False),
            f"{model} prefill 8x2048: MFU": (0.45, False),
            f"{model} prefill 32x512: MFU": (0.45, False),
            f"{model} score 8x2048: MFU": (0.45, False),
            f"{model} train 8x2048: MFU": (train, False),
            f"{model} publication over a bare copy": (2, True),
            f"{model} rollout over PyTorch": (5.0, False),
            f"{model} train step with optimizer over PyTorch": (1.3, False),
        }
    assert found == wanted
    assert SHARES.keys() == GPU.models.keys()


def test_the_error_of_predictions_is_of_calibrated_ones() -> None:
    results = {
        f"qwen3-0.6b {name}": {
            "status": "done", "ratio": ratio, "calibrated": calibrated, "tokens_per_s": 1.0
        }
        for name, ratio, calibrated in (
            ("decode 64x512", 1.25, True), ("optimizer", 5.0, False), ("rollout", 9.0, True),
            ("decode 256x512 pallas", 9.0, True),
        )
    }  # fmt: skip
    found = {t.name: t.reached for t in targets(results)}
    assert found["error of predictions, median"] == pytest.approx(0.2)
    assert found["error of predictions, worst"] == pytest.approx(0.2)
