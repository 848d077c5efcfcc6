"""Planned peak memory against the compiler's own plan, for the run's own programs on the host's devices.

float32, the CPU's own type: in bfloat16 XLA's CPU backend computes on float32 copies. For GPUs:
test_rehearse_gpu.py. The shapes are not those that the plan's counts were taken from (width 224, ffw 832).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from jaxrl.config import (
    Config,
    LoraConfig,
    MeshConfig,
    ModelOptions,
    RolloutConfig,
    TrainConfig,
)
from jaxrl.programs import PHASES, Stage
from jaxrl.rehearse import make_stage
from roofline.memory import HELD
from roofline.phases import Phase
from roofline.rehearse.executable import Executable, compile_program
from roofline.rehearse.target import HOST

PLANNED = 0.10
"""Planned over compiled peak memory: the figure that the plan promises."""
ARGUMENTS = 0.03
"""Batches, counters and slot tables are not planned."""
NEXT_TO_NOTHING = 0.01
"""Of the arguments: sums and counters, but no copy of gradients, weights or moments."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run's sizes."""

    width: int = 192
    layers: int = 3
    heads: tuple[int, int, int] = (6, 2, 32)
    ffw: int = 640
    rows: int = 16
    tokens: int = 160
    chunk: int = 640
    slots: int = 48
    remat: str = "none"
    mesh: tuple[int, int, int] = (1, 1, 1)
    """Learner's data, fsdp and tensor; the rollout has their devices as data and tensor."""
    vocab: int = 0
    """0: the tokenizer's 14."""
    lora: int = 0

    def stage(self) -> Stage:
        model = ModelOptions(
            width=self.width, num_layers=self.layers, num_heads=self.heads[0],
            num_kv_heads=self.heads[1], head_size=self.heads[2], ffw_size=self.ffw,
            remat="block" if self.remat == "block" else "none",
        )  # fmt: skip
        data, fsdp, tensor = self.mesh
        config = Config(
            model=model,
            train=TrainConfig(
                row_tokens=self.tokens, rows_per_microbatch=self.rows, logprob_chunk_tokens=self.chunk
            ),
            rollout=RolloutConfig(
                slots=self.slots, chunk_steps=4, max_prompt_tokens=32,
                max_new_tokens=self.tokens - 32,
            ),
            mesh=MeshConfig(
                colocated=True, learner_data=data, learner_fsdp=fsdp, learner_tensor=tensor,
                rollout_data=data * fsdp, rollout_tensor=tensor,
            ),
            lora=LoraConfig(rank=self.lora),
        )  # fmt: skip
        made = make_stage(config, HOST, data * fsdp * tensor)
        if not self.vocab:
            return made
        grown = replace(made.subject.model, vocab_size=self.vocab)
        return replace(made, subject=replace(made.subject, model=grown))


DENSE = Case()
DEEP_NARROW = Case(width=96, layers=8, heads=(4, 4, 24), ffw=320, rows=8, tokens=96)
WIDE_HEADS = Case(width=128, layers=4, heads=(12, 6, 32), ffw=512, rows=8)
REMADE = Case(layers=6, remat="block", rows=12)
SHARDED = Case(mesh=(1, 8, 1), rows=32)
ADAPTED = Case(lora=8)
LARGE_VOCAB = Case(vocab=8192, layers=2, rows=8)
LOW_MLP = Case(ffw=160, heads=(8, 4, 24), rows=8)
CASES = [DENSE, DEEP_NARROW, WIDE_HEADS, REMADE, SHARDED, ADAPTED, LARGE_VOCAB, LOW_MLP]

TENSOR_SHARDED = Case(mesh=(1, 4, 2), width=128, layers=2, heads=(8, 4, 32), ffw=448, tokens=96)
MESHES = [
    replace(TENSOR_SHARDED, mesh=mesh, rows=32)
    for mesh in [(8, 1, 1), (2, 4, 1), (1, 1, 2), (4, 1, 2), (2, 2, 2), (1, 2, 1), (1, 1, 4)]
]
ON_MESHES = [
    *MESHES,
    *(replace(case, remat="block") for case in [*MESHES[:3], TENSOR_SHARDED]),
    *(replace(case, vocab=8192) for case in [*MESHES[:3], TENSOR_SHARDED]),
    *(replace(case, lora=8) for case in MESHES[:3]),
]
ONE_KV_HEAD = replace(TENSOR_SHARDED, rows=32, mesh=(1, 1, 2), heads=(12, 2, 64))


@pytest.fixture(autouse=True)
def _promotion_as_in_a_run(optax_promotes: None) -> None:
    """The optimizer's program is compiled too."""


def compiled(case: Case, phase: Phase) -> Executable:
    return compile_program(case.stage().program(phase))


def assert_planned(executable: Executable) -> None:
    planned = executable.program.memory
    held = sum(size for name, size in planned.items() if name in HELD)
    assert executable.memory.arguments == pytest.approx(held, rel=ARGUMENTS)
    assert_peak_planned(executable)


def assert_peak_planned(executable: Executable) -> None:
    planned = executable.program.memory
    assert sum(planned.values()) == pytest.approx(executable.memory.peak, rel=PLANNED), planned


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_needs_the_planned_memory(case: Case) -> None:
    assert_planned(compiled(case, Phase.TRAIN))


@pytest.mark.parametrize("case", CASES)
def test_scoring_needs_the_planned_memory(case: Case) -> None:
    assert_planned(compiled(case, Phase.SCORE))


@pytest.mark.slow
@pytest.mark.parametrize("case", [DENSE, WIDE_HEADS, SHARDED, ADAPTED])
def test_decoding_needs_the_planned_memory(case: Case) -> None:
    assert_planned(compiled(case, Phase.DECODE))


@pytest.mark.parametrize("phase", [Phase.TRAIN, Phase.SCORE, Phase.OPTIMIZER, Phase.PUBLISH])
def test_fsdp_and_tensor_parallel_devices_need_the_planned_memory(phase: Phase) -> None:
    assert_peak_planned(compiled(TENSOR_SHARDED, phase))


@pytest.mark.parametrize(
    "case", [ONE_KV_HEAD, replace(ONE_KV_HEAD, mesh=(1, 2, 2), heads=(8, 2, 32))]
)
def test_scoring_with_one_key_value_head_a_device_needs_the_planned_memory(case: Case) -> None:
    assert_peak_planned(compiled(case, Phase.SCORE))


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_MESHES)
@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_on_every_mesh_needs_the_planned_memory(case: Case, phase: Phase) -> None:
    assert_peak_planned(compiled(case, phase))


def test_an_optimizer_step_holds_nothing_beside_its_arguments() -> None:
    memory = compiled(replace(DENSE, layers=1), Phase.OPTIMIZER).memory
    assert memory.temporaries < NEXT_TO_NOTHING * memory.arguments


def test_a_training_step_and_its_decode_need_the_planned_memory() -> None:
    small = replace(DENSE, layers=2, rows=8)
    for phase in (Phase.TRAIN, Phase.DECODE):
        assert_planned(compiled(small, phase))
