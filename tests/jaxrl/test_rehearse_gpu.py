"""The phases compiled for one and for eight H200, without one: `make test-rehearse`.

Qwen3-0.6B's own sizes with two of its layers; nothing runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Literal

import jax
import pytest

from jaxrl import build
from jaxrl.config import (
    Config,
    LoraConfig,
    MeshConfig,
    ModelOptions,
    RolloutConfig,
    TaskConfig,
    TrainConfig,
)
from jaxrl.devices import make_meshes
from jaxrl.programs import PHASES, Stage
from jaxrl.tasks import make_task
from jaxrl.tokenizer import CharTokenizer
from roofline.datasheets import datasheet
from roofline.model_zoo import find_model
from roofline.phases import Phase
from roofline.rehearse.compare import checks, lines, seconds
from roofline.rehearse.executable import Executable, compile_program
from roofline.rehearse.target import can_compile_for_gpus, target_devices, target_names

pytestmark = [
    pytest.mark.skipif(
        not can_compile_for_gpus(), reason="needs jax's CUDA plug-in: make test-rehearse"
    ),
    pytest.mark.slow,
]

LAYERS, ADAPTED_LAYERS = 2, 3
NO_ADAPTER, ADAPTER = LoraConfig(), LoraConfig(rank=16)
CONFIG = Config(
    model=ModelOptions(dtype="bfloat16"),
    train=TrainConfig(row_tokens=1024, rows_per_microbatch=16, logprob_chunk_tokens=4096),
    rollout=RolloutConfig(slots=256, chunk_steps=8, max_prompt_tokens=128, max_new_tokens=896),
)
PLANNED = 0.10
"""Peak memory as planned: the figure that the plan promises."""
GATHERED = 0.02
"""Gathered bytes: norm scales are left out of the prediction."""
PEELED = 0.01
"""Flops of three layers of an adapted model: of the one that is peeled off the loop, on several devices, the
input needs no gradient."""
KERNELS = 0.02
"""Kernels of a decode chunk: a few come once, and the compiler joins one now and then."""
FLAGS_BYTES = 64
"""Most that says whether all slots have stopped."""


@pytest.fixture(autouse=True)
def _promotion_as_in_a_run() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):  # optax mixes types
        yield


@cache
def stage(devices: int, hardware: str = "h200", lora: LoraConfig = NO_ADAPTER) -> Stage:
    mesh = MeshConfig(colocated=True, learner_fsdp=devices, rollout_data=devices)
    meshes = make_meshes(mesh, target_devices(hardware, devices))
    layers = ADAPTED_LAYERS if lora.rank else LAYERS
    subject = build.Subject(
        task=make_task(TaskConfig(), 0),
        model=replace(find_model("qwen3-0.6b").config, num_layers=layers, lora=lora.shape),
        tokenizer=CharTokenizer("0123456789"),
    )
    config = replace(CONFIG, mesh=mesh, lora=lora)
    return Stage(config=config, subject=subject, learner_mesh=meshes[0], rollout_mesh=meshes[1])


@cache
def compiled(phase: Phase, devices: int, lora: LoraConfig = NO_ADAPTER) -> Executable:
    return compile_program(stage(devices, lora=lora).program(phase))


def ratio(executable: Executable, name: str) -> float:
    found = next(line.ratio for line in lines(executable) if line.name == name)
    assert found is not None, name
    return found


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("phase", PHASES)
def test_what_must_hold_of_an_executable_holds(phase: Phase, devices: int) -> None:
    failed = [check for check in checks(compiled(phase, devices)) if not check.holds]
    assert not failed


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("phase", PHASES)
def test_peak_memory_is_as_planned(phase: Phase, devices: int) -> None:
    assert ratio(compiled(phase, devices), "peak memory") == pytest.approx(1, abs=PLANNED)


@pytest.mark.parametrize("remat", ["none", "block"])
def test_a_low_mlp_s_backward_needs_the_planned_memory(remat: Literal["none", "block"]) -> None:
    made = stage(1)
    model = replace(made.subject.model, ffw_size=1024, vocab_size=2048)
    config = replace(made.config, model=replace(made.config.model, remat=remat))
    low = replace(made, config=config, subject=replace(made.subject, model=model))
    executable = compile_program(low.program(Phase.TRAIN))
    assert ratio(executable, "peak memory") == pytest.approx(1, abs=PLANNED)


@pytest.mark.parametrize(("layers", "vocab"), [(28, 2048), (56, 2048), (28, 151936)])
def test_scoring_over_eight_devices_lays_deep_stacks_out_anew_as_planned(
    layers: int, vocab: int
) -> None:
    made = stage(8)
    model = replace(made.subject.model, num_layers=layers, vocab_size=vocab)
    deep = replace(made, subject=replace(made.subject, model=model))
    executable = compile_program(deep.program(Phase.SCORE))
    assert ratio(executable, "peak memory") == pytest.approx(1, abs=PLANNED)
    held = executable.program.resident
    planned = sum(executable.program.memory.values()) - held
    assert executable.extra == pytest.approx(planned, rel=2 * PLANNED)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.DECODE, Phase.SCORE, Phase.TRAIN])
def test_flops_are_as_predicted(phase: Phase, devices: int) -> None:
    assert ratio(compiled(phase, devices), "flops") == pytest.approx(1)


@pytest.mark.parametrize("phase", [Phase.SCORE, Phase.TRAIN])
def test_weights_are_gathered_in_the_compute_type_a_tied_matrix_for_each_of_its_uses(
    phase: Phase,
) -> None:
    found = ratio(compiled(phase, 8), "all-gather, arrays")
    assert found == pytest.approx(1, abs=GATHERED)


@pytest.mark.parametrize("lora", [NO_ADAPTER, ADAPTER])
@pytest.mark.parametrize("devices", [1, 8])
def test_a_publication_casts_gathers_and_lays_out_anew_as_predicted(
    devices: int, lora: LoraConfig
) -> None:
    executable = compiled(Phase.PUBLISH, devices, lora)
    exact = ["memory traffic", "kernels", *(["all-gather, arrays"] if devices > 1 else [])]
    assert [ratio(executable, name) for name in exact] == [1.0] * len(exact)


def test_gradients_are_scattered_but_the_heads_which_is_summed_whole() -> None:
    executable = compiled(Phase.TRAIN, 8)
    for name in ("reduce-scatter, arrays", "all-reduce, arrays"):
        assert ratio(executable, name) == pytest.approx(1, abs=GATHERED)


def test_devices_that_share_the_slots_exchange_flags_and_once_a_chunk_its_samples() -> None:
    executable = compiled(Phase.DECODE, 8)
    (gathered,) = [c for c in executable.collectives if c.array_bytes > FLAGS_BYTES]
    (counted,) = executable.program.traffic
    assert (gathered.kind, gathered.times) == (counted.kind, 1)
    assert gathered.whole_bytes == counted.array_bytes


@pytest.mark.parametrize("devices", [1, 8])
def test_a_decode_chunk_starts_the_kernels_that_are_counted(devices: int) -> None:
    assert ratio(compiled(Phase.DECODE, devices), "kernels") == pytest.approx(1, abs=KERNELS)


def test_without_norms_of_its_heads_a_layer_starts_the_kernels_that_are_counted() -> None:
    made = stage(1)
    plain = replace(made.subject, model=replace(made.subject.model, qk_norm=False))
    executable = compile_program(replace(made, subject=plain).program(Phase.DECODE))
    assert ratio(executable, "kernels") == pytest.approx(1, abs=KERNELS)


def test_one_device_exchanges_nothing() -> None:
    assert not [c for phase in PHASES for c in compiled(phase, 1).collectives]


@pytest.mark.parametrize("devices", [1, 8])
def test_every_program_has_a_time_above_the_books_bound(devices: int) -> None:
    for phase in PHASES:
        found = seconds(compiled(phase, devices), datasheet("h200"))
        assert found.operators.seconds > found.lower > 0


@pytest.mark.parametrize("hardware", target_names())
def test_every_target_compiles(hardware: str) -> None:
    executable = compile_program(stage(1, hardware).program(Phase.OPTIMIZER))
    assert all(check.holds for check in checks(executable))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("phase", PHASES)
def test_an_adapter_s_programs_need_the_planned_memory_and_hold_what_must(
    phase: Phase, devices: int
) -> None:
    executable = compiled(phase, devices, ADAPTER)
    assert ratio(executable, "peak memory") == pytest.approx(1, abs=PLANNED)
    assert all(check.holds for check in checks(executable))


@pytest.mark.parametrize("devices", [1, 8])
def test_an_adapter_s_training_does_the_predicted_work(devices: int) -> None:
    executable = compiled(Phase.TRAIN, devices, ADAPTER)
    assert ratio(executable, "flops") == pytest.approx(1, abs=PEELED)
    for kind in ("all-gather", "reduce-scatter", "all-reduce") if devices > 1 else ():
        assert ratio(executable, f"{kind}, arrays") == pytest.approx(1, abs=GATHERED), kind
