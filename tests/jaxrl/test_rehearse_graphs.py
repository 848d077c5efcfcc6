"""Decode chunks for one H200 as CUDA graphs, read from the kernels that XLA would launch; nothing runs.

Run where jax's CUDA plug-in is (`make test-rehearse`), skipped elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jaxrl import build
from jaxrl.config import Config, MeshConfig, ModelOptions, RolloutConfig, TaskConfig, TrainConfig
from jaxrl.devices import make_meshes
from jaxrl.programs import Stage
from jaxrl.tasks import make_task
from jaxrl.tokenizer import CharTokenizer
from models.attention_kernels import lowering_for
from models.cache import KVCache, init_cache
from models.decoder import abstract_decoder
from models.fused import split_layers
from roofline.calibrate.programs import decode_program
from roofline.model_zoo import find_model
from roofline.phases import Phase
from roofline.rehearse.target import can_compile_for_gpus, target_devices

pytestmark = pytest.mark.skipif(
    not can_compile_for_gpus(), reason="needs jax's CUDA plug-in: make test-rehearse"
)

ENTRY = re.compile(r"^(\s*)\d+: (k\w+)", re.MULTILINE)
"""One launch of XLA's dump; what belongs to a graph or a loop is indented below it."""
LAYER_KERNELS, OTHER_KERNELS = 20, 32
"""Most kernels of a decode step in each layer, and in embedding, head and sampling."""
GRAPH = "kCommandBuffer"


@pytest.fixture(autouse=True)
def _promotion_as_in_a_run() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):  # jax's kernels mix types
        yield


def launches(attention: Any, layers: int, folder: Path) -> list[tuple[int, str]]:
    """(indentation, kind) of all that a decode chunk of Qwen3-0.6B's sizes launches, in order."""
    mesh = MeshConfig(colocated=True)
    rollout = RolloutConfig(
        slots=256, chunk_steps=8, max_prompt_tokens=416, max_new_tokens=96, attention=attention
    )
    config = Config(
        model=ModelOptions(dtype="bfloat16"), mesh=mesh, rollout=rollout,
        train=TrainConfig(row_tokens=512),
    )  # fmt: skip
    subject = build.Subject(
        task=make_task(TaskConfig(), 0), tokenizer=CharTokenizer("0123456789"),
        model=replace(find_model("qwen3-0.6b").config, num_layers=layers),
    )  # fmt: skip
    learner, sampler = make_meshes(mesh, target_devices("h200", 1))
    stage = Stage(config=config, subject=subject, learner_mesh=learner, rollout_mesh=sampler)
    program = stage.program(Phase.DECODE)
    with jax.set_mesh(program.mesh), lowering_for(program.mesh.devices.flat[0]):
        lowered = program.function.lower(*program.arguments, **program.options)
        return compiled_launches(lowered, folder)


def compiled_launches(lowered: Any, folder: Path) -> list[tuple[int, str]]:
    """The same of a lowered program called decode_chunk."""
    lowered.compile(
        compiler_options={
            "xla_gpu_autotune_level": 0, "xla_dump_to": str(folder),
            "xla_dump_hlo_as_text": True,
        }
    )  # fmt: skip
    (dump,) = folder.glob("*decode_chunk*thunk_sequence_after_thunk_passes.txt")
    return [(len(space), kind) for space, kind in ENTRY.findall(dump.read_text())]


def in_the_loop(found: list[tuple[int, str]]) -> int:
    """Launches of one decode step: those that are listed below the loop."""
    return len(found) - 1 - [kind for _, kind in found].index("kWhile")


@pytest.mark.parametrize("attention", ["xla", "cudnn", "pallas"])
def test_a_decode_chunk_is_one_graph_with_its_loop_inside(attention: str, tmp_path: Path) -> None:
    found = launches(attention, 1, tmp_path)
    assert [kind for space, kind in found if space == 0] == [GRAPH]
    assert [kind for _, kind in found].count("kWhile") == 1


def test_the_decode_that_calibration_times_is_one_graph_with_its_loop_inside(
    tmp_path: Path,
) -> None:
    (device,) = target_devices("h200", 1)
    model = replace(find_model("qwen3-0.6b").config, num_layers=1)
    slots, kv_len, dtype = 256, 512, jnp.dtype("bfloat16")

    def cache() -> KVCache:
        return init_cache(model, slots, kv_len, dtype, "xla")

    zeros = jax.ShapeDtypeStruct((slots,), "int32")
    state = (jax.eval_shape(cache), zeros, zeros)
    policy = abstract_decoder(model, dtype)
    layers = jax.eval_shape(split_layers, policy)
    rest = (policy, layers, jax.eval_shape(lambda: jax.random.key(1)))
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)),
        (state, *rest),
    )
    program = decode_program(device, "xla", 8, kv_len, dtype)
    with lowering_for(device):
        found = compiled_launches(program.lower(*placed), tmp_path)
    assert [kind for space, kind in found if space == 0] == [GRAPH]
    assert [kind for _, kind in found].count("kWhile") == 1


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["xla", "cudnn", "pallas"])
def test_a_decode_step_is_few_kernels_a_layer(attention: str, tmp_path: Path) -> None:
    one, three = (in_the_loop(launches(attention, n, tmp_path / str(n))) for n in (1, 3))
    assert (three - one) / 2 <= LAYER_KERNELS
    assert one <= LAYER_KERNELS + OTHER_KERNELS
