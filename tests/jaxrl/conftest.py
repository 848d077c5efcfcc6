"""A decoder small enough to compile in a second, and what runs on it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import (
    CheckpointConfig,
    Config,
    EvalConfig,
    GrpoConfig,
    ModelOptions,
    RolloutConfig,
    RunConfig,
    SftConfig,
    TaskConfig,
    TrainConfig,
)
from models.config import ModelConfig
from models.decoder import Decoder
from models.sharding import init_sharded, make_mesh


@pytest.fixture
def optax_promotes() -> Iterator[None]:
    """optax raises floats to integer counts, which strict promotion forbids; the sampler stays strict."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def golden_cases(shared_data: Path) -> list[dict[str, Any]]:
    """Published values with their sources."""
    return json.loads((shared_data / "goldens" / "losses.json").read_text())


@pytest.fixture(scope="session")
def assert_golden() -> Callable[[dict[str, Any], Any], None]:
    """`assert_golden(case, got)`: each of the case's expected values, to its own tolerance."""
    float32_rtol = 2e-6  # a few roundings of float32, where a case asks for more digits than that

    def numbers(value: Any) -> Any:
        if isinstance(value, list):
            return [numbers(v) for v in value]
        return float("nan") if value == "NaN" else value

    def check(case: dict[str, Any], got: Any) -> None:
        expected = case["expected"]
        if not isinstance(expected, dict):
            got, expected = {"value": got}, {"value": expected}
        assert set(got) == set(expected)
        for name, value in got.items():
            np.testing.assert_allclose(
                np.asarray(value, float).reshape(np.shape(expected[name])),
                np.array(numbers(expected[name]), float),
                rtol=max(case["rtol"], float32_rtol),
                atol=case["atol"],
                err_msg=f"case {case['id']} {name}: {case['source']}",
            )

    return check


@pytest.fixture(scope="session")
def tiny_model() -> ModelConfig:
    return ModelConfig(
        vocab_size=14, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8,
        ffw_size=64, qk_norm=True, max_positions=32,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_policy(tiny_model: ModelConfig) -> Decoder:
    mesh = make_mesh(jax.devices()[:1])
    return init_sharded(tiny_model, jax.random.key(0), mesh, jnp.float32)


@pytest.fixture
def tiny_config(tmp_path: Path) -> Callable[..., Config]:
    """A complete run of single-digit sums: `tiny_config(steps=4, max_staleness=1, dir=...)`."""

    def make(
        *, steps: int = 4, max_staleness: int = 0, dir: Path | None = None, seed: int = 0,
        checkpoint_every: int = 0, sft_steps: int = 4, eval_every: int = 2, **grpo: object,
    ) -> Config:  # fmt: skip
        return Config(
            run=RunConfig(dir=dir or tmp_path / "run", seed=seed),
            model=ModelOptions(
                width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8, ffw_size=64
            ),
            task=TaskConfig(digits=1, num_eval=8, reward_workers=0),
            sft=SftConfig(steps=sft_steps, check_every=4, sequences_per_step=32, learning_rate=3e-3),
            train=TrainConfig(
                steps=steps, learning_rate=1e-3, warmup_steps=2, row_tokens=16, rows_per_microbatch=8
            ),
            rollout=RolloutConfig(
                slots=12, chunk_steps=2, max_prompt_tokens=4, max_new_tokens=4,
                max_staleness=max_staleness,
            ),
            grpo=GrpoConfig(prompts_per_step=4, group_size=4, drop_zero_advantage=False, **grpo),
            eval=EvalConfig(every_steps=eval_every, problems=8, final_samples=2),
            checkpoint=CheckpointConfig(every_steps=checkpoint_every),
        )  # fmt: skip

    return make
