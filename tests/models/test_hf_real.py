"""Two real trained checkpoints: what they write and what they expect is what their publishers report."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import build
from jaxrl.config import Config, RolloutConfig, TrainConfig
from jaxrl.observe import Observer
from jaxrl.rollout.engine import Request, SamplingParams
from jaxrl.tokenizer import load_tokenizer
from jaxrl.types import Snapshot
from models.decoder import hidden_states
from models.head import target_logprobs
from models.hf import load_policy
from models.sharding import make_mesh

REPORTED_LOSS = 0.7366
"""babyllama's validation loss on TinyStories, in nats per character (its publisher)."""
LOSS_ATOL = 0.1
"""The text here is sampled by stories260K at temperature 1: like TinyStories, but with misspellings."""
SAMPLES = 15
ROW = 256
"""Characters that babyllama was trained on at once."""


@pytest.fixture(scope="module")
def written(shared_data: Path):
    """(ids expected, ids generated greedily, texts sampled at temperature 1), all in one batch of slots."""
    folder = shared_data / "weights" / "stories260K"
    expected = json.loads((folder / "expected_greedy.json").read_text())
    policy, tokenizer = load_policy(folder), load_tokenizer(folder)
    length = len(expected["token_ids"]) - 1
    config = Config(
        rollout=RolloutConfig(
            slots=1 + SAMPLES, chunk_steps=50, max_prompt_tokens=1, max_new_tokens=length
        ),
        train=TrainConfig(row_tokens=length + 1),
    )
    subject = SimpleNamespace(model=policy.config, tokenizer=tokenizer)
    engine = build.make_engine(config, subject, make_mesh(jax.devices()[:1]), Observer())
    for stream, temperature in ((0, 0.0), (1, 1.0)):
        params = SamplingParams(
            temperature=temperature, max_new_tokens=length, stop_ids=tokenizer.stop_ids
        )
        samples = tuple(range(SAMPLES if temperature else 1))
        engine.submit(Request(stream=stream, prompt=(1,), sample_indices=samples, params=params))
    done = []
    while not engine.is_idle:
        done += engine.run_chunk(Snapshot(version=0, policy=policy))
    greedy = next(completion.tokens for request, completion in done if request.stream == 0)
    texts = [tokenizer.decode(completion.tokens) for request, completion in done if request.stream]
    return expected, greedy.tolist(), texts, tokenizer


def test_stories260k_writes_greedily_the_published_text_among_other_samples(written):
    expected, greedy, texts, tokenizer = written
    assert [1, *greedy] == expected["token_ids"]
    assert tokenizer.decode([1, *greedy]) == expected["text"]
    assert len(set(texts)) == SAMPLES


def test_babyllamas_loss_on_such_stories_is_near_the_reported_one(written, shared_data: Path):
    folder = shared_data / "weights" / "babyllama_tok105"
    policy, tokenizer = load_policy(folder), load_tokenizer(folder)

    @jax.jit
    def loss(policy, tokens):
        positions = jnp.broadcast_to(jnp.arange(ROW), (tokens.shape[0], ROW))
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        hidden = hidden_states(policy, inputs, positions, jnp.ones_like(inputs), dtype=jnp.float32)
        return -target_logprobs(
            policy, hidden, targets, temperature=1.0, chunk_tokens=4096, dtype=jnp.float32
        )[0].mean()

    def rows(texts):
        ids = np.array([i for text in texts for i in (1, *tokenizer.encode(text))], np.int32)
        starts = range(0, len(ids) - ROW, ROW)
        return np.stack([ids[start : start + ROW + 1] for start in starts])

    tokens = rows(written[2])
    assert len(tokens) >= 20
    assert abs(float(loss(policy, tokens)) - REPORTED_LOSS) < LOSS_ATOL
    shuffled = np.random.default_rng(0).permuted(tokens, axis=1)
    assert float(loss(policy, shuffled)) > 3 * REPORTED_LOSS
