"""A cache in 8 bits: the text stays the model's, and what is trained on is the model as it was sampled."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.attention import Programs, cache_dtype, choose_programs
from jaxrl.config import Config, ModelOptions, RolloutConfig, TrainConfig
from jaxrl.errors import UserError
from jaxrl.observe import Observer
from jaxrl.rollout.engine import Request, RolloutEngine, SamplingParams
from jaxrl.types import Snapshot
from models.config import ModelConfig
from models.decoder import hidden_states
from models.head import target_logprobs
from models.hf import load_policy
from models.sharding import make_mesh

TOKENS, SAMPLES = 200, 4
SHAPE = ModelConfig(
    vocab_size=8, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_size=16, ffw_size=8
)
MEAN_ERROR = {"int8": 0.05, "float8_e4m3fn": 0.1}
"""Of sampled tokens' log-probabilities, in nats: what rounding moves in a model with heads of 8 numbers, one of
them often much larger than the others; 0.029 was seen with int8."""


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_a_trained_model_in_8_bits_is_near_itself(dtype: str, shared_data: Path) -> None:
    """stories260K, 4 samples of 200 tokens: whatever is drawn, the sampler's log-probabilities are near those
    of the same tokens without a cache."""
    folder = shared_data / "weights" / "stories260K"
    policy = load_policy(folder)
    engine = RolloutEngine(
        policy.config, make_mesh(jax.devices()[:1]), num_slots=SAMPLES, max_prompt_tokens=1,
        max_new_tokens=TOKENS, chunk_steps=TOKENS, refill_cost_steps=1, num_stop_ids=1,
        dtype=jnp.dtype("float32"), seed=0, observer=Observer(), cache_dtype=jnp.dtype(dtype),
    )  # fmt: skip
    params = SamplingParams(max_new_tokens=TOKENS, stop_ids=())
    engine.submit(
        Request(stream=0, prompt=(1,), sample_indices=tuple(range(SAMPLES)), params=params)
    )
    done = []
    while not engine.is_idle:
        done += engine.run_chunk(Snapshot(version=0, policy=policy))
    drawn = [completion for _, completion in done]
    tokens = jnp.array([[1, *completion.tokens] for completion in drawn])
    positions = jnp.broadcast_to(jnp.arange(TOKENS + 1), tokens.shape)
    hidden = hidden_states(policy, tokens, positions, jnp.ones_like(tokens), dtype=jnp.float32)
    exact, _ = target_logprobs(
        policy, hidden, jnp.roll(tokens, -1, axis=1), temperature=1.0, chunk_tokens=512,
        dtype=jnp.float32,
    )  # fmt: skip
    sampled = np.stack([completion.sampler_logprobs for completion in drawn])
    error = np.abs(np.asarray(exact)[:, :-1] - sampled).mean()
    assert 0 < error < MEAN_ERROR[dtype], error


def config(model: dict[str, object], rollout: dict[str, object]) -> Config:
    return Config(model=ModelOptions(**model), rollout=RolloutConfig(**rollout))


def test_what_a_program_cannot_read_is_refused_before_anything_runs() -> None:
    half = {"dtype": "bfloat16"}
    with pytest.raises(UserError, match=r"model.attention=cudnn computes in bfloat16"):
        config({"attention": "cudnn"}, {})
    with pytest.raises(UserError, match=r"rollout.attention=cudnn computes in bfloat16"):
        config({}, {"attention": "cudnn"})
    with pytest.raises(UserError, match=r"not rollout.cache_dtype=int8"):
        config(half, {"attention": "pallas", "cache_dtype": "int8"})
    config(half, {"attention": "cudnn", "cache_dtype": "bfloat16"})


def test_without_measurements_a_cpu_multiplies_in_blocks() -> None:
    device = jax.devices()[0]
    assert choose_programs(config({}, {}), device, SHAPE) == Programs()
    asked = choose_programs(config({"attention": "pallas"}, {"attention": "xla"}), device, SHAPE)
    assert asked == Programs(train="pallas", prompts="pallas", decode="xla")


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size", "shared", "train", "prompts"),
    [
        ("9.0", "bfloat16", 128, False, "cudnn", "cudnn"),
        ("9.0", "bfloat16", 128, True, "xla", "cudnn"),
        ("8.0", "bfloat16", 128, False, "xla", "xla"),
        ("9.0", "float32", 128, False, "xla", "xla"),
        ("9.0", "bfloat16", 36, False, "xla", "xla"),
        (None, "bfloat16", 128, False, "xla", "xla"),
    ],
)  # fmt: skip
def test_without_measurements_a_gpu_takes_the_kernel_that_accepts_its_rows(
    capability: str | None, dtype: str, head_size: int, shared: bool, train: str, prompts: str
) -> None:
    said = {} if capability is None else {"compute_capability": capability}
    device = SimpleNamespace(platform="gpu", device_kind="a card", **said)
    asked = config({"dtype": dtype}, {})
    if shared:
        rows = TrainConfig(row_tokens=31 + 2 * 32, shared_prompt_tokens=31, row_parts=2)
        asked = replace(asked, train=rows)
    found = choose_programs(asked, device, replace(SHAPE, head_size=head_size), {})
    assert found == Programs(train=train, prompts=prompts, decode="xla")


def test_a_measured_table_decides_among_what_fits_the_cache() -> None:
    device = jax.devices()[0]
    seconds = {"xla": 3.0, "pallas": 2.0, "cudnn": 1.0}
    entries = [
        {"phase": p, "rows": 64, "tokens": 64, "seconds": seconds} for p in ("train", "decode")
    ]
    table = {device.device_kind: entries}
    half = {"dtype": "bfloat16"}
    assert choose_programs(config(half, {}), device, SHAPE, table) == Programs(
        train="cudnn", prompts="cudnn", decode="cudnn"
    )
    assert choose_programs(config({}, {}), device, SHAPE, table).decode == "pallas"
    assert (
        choose_programs(config(half, {"cache_dtype": "int8"}), device, SHAPE, table).decode == "xla"
    )


def test_auto_stores_the_cache_in_the_models_type() -> None:
    assert cache_dtype(config({"dtype": "bfloat16"}, {})) == jnp.bfloat16
    assert cache_dtype(config({}, {"cache_dtype": "float8_e4m3"})) == jnp.float8_e4m3fn
