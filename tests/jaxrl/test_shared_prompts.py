"""Samples that share their prompt in a packed row train exactly as samples that each bring their own."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import Config, RolloutConfig, TrainConfig
from jaxrl.errors import UserError
from jaxrl.learner.steps import ForwardSettings, score, sft_loss
from jaxrl.packing import TrainSequence, pack, unpack
from models.config import ModelConfig
from models.decoder import Decoder
from models.rows import SharedPrompts, attended, samples_per_row

MODEL = ModelConfig(
    vocab_size=50, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8, ffw_size=48,
    no_rope_layers=(1,), qkv_bias=True,
)  # fmt: skip
ROW_TOKENS, SHARED = 8 + 3 * 12, SharedPrompts(prompt_tokens=8, parts=3)
ROUNDING = 2e-5
"""Float32 products summed in another order, through two layers and their gradients."""


def groups(seed: int = 0, count: int = 5, size: int = 4) -> list[TrainSequence]:
    """Ragged prompts (one of a single token, so with nothing to share) and completions."""
    draw, sequences = np.random.default_rng(seed), []
    for group in range(count):
        prompt = draw.integers(3, 50, 1 if group == 0 else draw.integers(2, 9))
        for _ in range(size):
            tokens = np.concatenate([prompt, draw.integers(3, 50, draw.integers(1, 10))])
            mask = np.arange(len(tokens)) >= len(prompt)
            weights = np.where(mask, draw.normal(size=len(tokens)), 0.0)
            sequences.append(
                TrainSequence(
                    tokens=tokens.astype(np.int32), loss_mask=mask, group=group,
                    sampler_logprobs=mask.astype(np.float32), advantages=mask.astype(np.float32),
                    token_weights=weights.astype(np.float32),
                )
            )  # fmt: skip
    return sequences


def settings(shared: SharedPrompts | None) -> ForwardSettings:
    return ForwardSettings(
        dtype=jnp.float32, temperature=0.7, chunk_tokens=40, remat=False, shared=shared
    )


def scores_and_gradient(
    sequences: list[TrainSequence], row_tokens: int, shared: SharedPrompts | None
):
    batches, _ = pack(sequences, row_tokens=row_tokens, rows_per_microbatch=2, shared=shared)
    policy = Decoder(MODEL, jax.random.key(0))

    @jax.jit
    def value(policy, batch):
        def loss(policy):
            logprobs = score(policy, batch, settings(shared))[0]
            return sft_loss(logprobs, batch), logprobs

        return jax.grad(loss, has_aux=True)(policy)

    found = [value(policy, batch) for batch in batches]
    logprobs = unpack(
        sequences, [np.asarray(lp) for _, lp in found], row_tokens=row_tokens, shared=shared
    )
    return logprobs, jax.tree.map(lambda *parts: sum(parts), *[gradient for gradient, _ in found])


def test_log_probabilities_and_gradients_equal_those_of_samples_with_their_own_prompts():
    sequences = groups()
    apart, gradient_apart = scores_and_gradient(sequences, 20, None)
    shared, gradient_shared = scores_and_gradient(sequences, ROW_TOKENS, SHARED)
    for one, other in zip(apart, shared, strict=True):
        np.testing.assert_allclose(one, other, atol=ROUNDING)
    for one, other in zip(
        jax.tree.leaves(gradient_apart), jax.tree.leaves(gradient_shared), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=ROUNDING)


def test_every_target_is_placed_once_with_its_own_values():
    sequences = groups(seed=1)
    batches, stats = pack(sequences, row_tokens=ROW_TOKENS, rows_per_microbatch=2, shared=SHARED)
    assert stats.loss_tokens == sum(int(s.loss_mask.sum()) for s in sequences)
    targets = [np.where(b.loss_mask, b.targets, 0).astype(np.float32) for b in batches]
    back = unpack(sequences, targets, row_tokens=ROW_TOKENS, shared=SHARED)
    for sequence, found in zip(sequences, back, strict=True):
        np.testing.assert_array_equal(found, np.where(sequence.loss_mask, sequence.tokens, 0))


def test_a_prompt_stands_once_in_a_row_and_no_sequence_crosses_a_part():
    batches, stats = pack(
        groups(seed=2), row_tokens=ROW_TOKENS, rows_per_microbatch=1, shared=SHARED
    )
    own = [len(s.tokens) - int(s.loss_mask.argmax()) for s in groups(seed=2)]
    assert stats.tokens < sum(len(s.tokens) for s in groups(seed=2)) - len(own)
    for batch in batches:
        assert not batch.loss_mask[:, :8].any()
        parts = batch.segment_ids[0, 8:].reshape(3, 12)
        for a in range(3):
            for b in range(a):
                assert not (set(parts[a]) & set(parts[b])) - {0}


def test_a_group_that_does_not_fit_one_row_brings_its_prompt_again():
    (first, *_), size = groups(count=2)[4:], 12
    tokens = np.concatenate([first.tokens[: int(first.loss_mask.argmax())], np.full(size, 7)])
    mask = np.arange(len(tokens)) >= len(tokens) - size
    ones = mask.astype(np.float32)
    long = TrainSequence(
        tokens=tokens.astype(np.int32), loss_mask=mask, sampler_logprobs=ones, advantages=ones,
        token_weights=ones,
    )  # fmt: skip
    batches, stats = pack([long] * 4, row_tokens=ROW_TOKENS, rows_per_microbatch=2, shared=SHARED)
    prompt = len(tokens) - size
    assert stats.rows == 2
    assert stats.tokens == 4 * size + 2 * (prompt - 1)
    assert (batches[0].positions[:, : prompt - 1] == np.arange(prompt - 1)).all()


def test_attention_is_over_the_prompts_and_one_part():
    assert attended(10, None) == (100, 10)
    assert attended(ROW_TOKENS, SHARED) == (8 * 8 + 3 * 12 * 20, 8 + 3 * 20)


def test_a_row_holds_as_many_samples_as_its_parts_and_prompts_allow():
    held = partial(samples_per_row, ROW_TOKENS, SHARED)
    assert held(prompt=9, completion=6, group=4) == 4
    assert held(prompt=5, completion=6, group=4) == 6
    assert samples_per_row(64, None, prompt=20, completion=12, group=4) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (TrainConfig(row_parts=2), "row_parts=2"),
        (TrainConfig(row_tokens=100, shared_prompt_tokens=8), "at least 31"),
        (
            TrainConfig(row_tokens=100, shared_prompt_tokens=31, row_parts=2),
            "31 \\+ a multiple of 2",
        ),
        (TrainConfig(row_tokens=91, shared_prompt_tokens=31, row_parts=2), "at least 95"),
    ],
)
def test_rows_that_cannot_hold_prompts_or_completions_are_refused(
    changed: TrainConfig, message: str
):
    with pytest.raises(UserError, match=message):
        Config(train=changed, rollout=RolloutConfig(max_prompt_tokens=32, max_new_tokens=32))
