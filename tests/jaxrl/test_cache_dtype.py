"""A cache in 8 bits: the text stays the model's, and what is trained on is the model as it was sampled."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.attention import Programs, cache_dtype, choose_programs
from jaxrl.config import Config, ModelOptions, RolloutConfig
from jaxrl.errors import UserError
from jaxrl.observe import Observer
from jaxrl.rollout.engine import Request, RolloutEngine, SamplingParams
from jaxrl.types import Snapshot
from models.decoder import hidden_states
from models.head import target_logprobs
from models.hf import load_policy
from models.sharding import make_mesh

TOKENS = 200
MEAN_ERROR = {"int8": 0.01, "float8_e4m3fn": 0.1}
"""Of sampled tokens' log-probabilities, in nats. Rounding of keys and values by at most 1/254 and 1/16 of
the head's largest number; 0.0026 and 0.030 were seen."""


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_a_trained_model_writes_with_8_bits_what_it_means(dtype: str, shared_data: Path) -> None:
    """stories260K, 200 greedy tokens: int8 changes none of them. At temperature 1, whatever is drawn, the
    sampler's log-probabilities are near those without a cache."""
    folder = shared_data / "weights" / "stories260K"
    policy = load_policy(folder)
    engine = RolloutEngine(
        policy.config, make_mesh(jax.devices()[:1]), num_slots=5, max_prompt_tokens=1,
        max_new_tokens=TOKENS, chunk_steps=TOKENS, refill_cost_steps=1, num_stop_ids=1,
        dtype=jnp.dtype("float32"), seed=0, observer=Observer(), cache_dtype=jnp.dtype(dtype),
    )  # fmt: skip
    for stream, samples in ((0, 1), (1, 4)):
        params = SamplingParams(temperature=float(stream), max_new_tokens=TOKENS, stop_ids=())
        engine.submit(
            Request(stream=stream, prompt=(1,), sample_indices=tuple(range(samples)), params=params)
        )
    done = []
    while not engine.is_idle:
        done += engine.run_chunk(Snapshot(version=0, policy=policy))
    drawn = [completion for request, completion in done if request.stream == 1]
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
    if dtype == "int8":
        expected = json.loads((folder / "expected_greedy.json").read_text())["token_ids"]
        (greedy,) = [completion for request, completion in done if request.stream == 0]
        assert greedy.tokens.tolist()[: len(expected) - 1] == expected[1 : TOKENS + 1]


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
    assert choose_programs(config({}, {}), device) == Programs()
    asked = choose_programs(config({"attention": "pallas"}, {"attention": "xla"}), device)
    assert asked == Programs(train="pallas", prompts="pallas", decode="xla")


def test_a_measured_table_decides_among_what_fits_the_cache() -> None:
    device = jax.devices()[0]
    seconds = {"xla": 3.0, "pallas": 2.0, "cudnn": 1.0}
    entries = [
        {"phase": p, "rows": 64, "tokens": 64, "seconds": seconds} for p in ("train", "decode")
    ]
    table = {device.device_kind: entries}
    half = {"dtype": "bfloat16"}
    assert choose_programs(config(half, {}), device, table) == Programs(
        train="cudnn", prompts="cudnn", decode="cudnn"
    )
    assert choose_programs(config({}, {}), device, table).decode == "pallas"
    assert choose_programs(config(half, {"cache_dtype": "int8"}), device, table).decode == "xla"


def test_auto_stores_the_cache_in_the_models_type() -> None:
    assert cache_dtype(config({"dtype": "bfloat16"}, {})) == jnp.bfloat16
    assert cache_dtype(config({}, {"cache_dtype": "float8_e4m3"})) == jnp.float8_e4m3fn
