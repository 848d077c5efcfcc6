"""Packing: alignment, layout, and that no split of a batch changes its gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.algorithms.loss import policy_loss
from jaxrl.batch import Batch
from jaxrl.config import GrpoConfig
from jaxrl.errors import UserError
from jaxrl.packing import TrainSequence, pack, solutions_to_sequences
from models.rows import MAX_SEGMENTS

VOCAB, ROW = 11, 24
GRADIENT_RTOL = 2e-5  # float32 sums of some 100 terms in another order
GRADIENT_ATOL = 1e-7

sequence_lengths = st.lists(
    st.tuples(st.integers(1, 8), st.integers(1, 16)), min_size=1, max_size=14
)
deterministic = settings(deadline=None, derandomize=True, max_examples=40)


def _given(batch: Batch) -> list[str]:
    """Fields that hold something: scores are absent where nothing needed them."""
    return [name for name in batch.__dataclass_fields__ if getattr(batch, name) is not None]


def _sequences(lengths: list[tuple[int, int]], seed: int = 0) -> list[TrainSequence]:
    """Sequences of (prompt, completion) tokens whose every value is recognisable."""
    rng = np.random.default_rng(seed)
    sequences = []
    for prompt, completion in lengths:
        mask = np.arange(prompt + completion) >= prompt
        sequences.append(
            TrainSequence(
                tokens=rng.integers(1, VOCAB, len(mask)).astype(np.int32),
                loss_mask=mask,
                sampler_logprobs=np.where(mask, -2 * rng.random(len(mask)), 0).astype(np.float32),
                advantages=np.where(mask, rng.normal(), 0).astype(np.float32),
                token_weights=np.where(mask, rng.random(), 0).astype(np.float32),
            )
        )
    return sequences


LENGTHS = [(3, 9), (1, 1), (8, 16), (2, 2), (4, 7), (1, 12), (5, 5), (2, 13), (1, 3)]


def _unpacked(batches) -> list[dict[str, np.ndarray]]:
    """Every packed sequence with its fields."""
    found = []
    for batch in batches:
        for row in range(batch.tokens.shape[0]):
            for segment in range(1, batch.segment_ids[row].max(initial=0) + 1):
                where = np.flatnonzero(batch.segment_ids[row] == segment)
                assert (np.diff(where) == 1).all()
                fields = _given(batch)
                found.append({name: getattr(batch, name)[row, where] for name in fields})
    return found


@deterministic
@given(lengths=sequence_lengths, rows=st.integers(1, 4))
def test_each_sequence_is_packed_once_with_every_field_at_the_position_that_predicts_it(
    lengths, rows
):
    sequences = _sequences(lengths)
    batches, stats = pack(sequences, row_tokens=ROW, rows_per_microbatch=rows)
    unpacked = _unpacked(batches)
    assert len(unpacked) == len(sequences)
    found = {s["token_weights"].max(): s for s in unpacked}  # a weight of its own each
    for sequence in sequences:
        got = found[sequence.token_weights.max()]
        np.testing.assert_array_equal(got["tokens"], sequence.tokens)
        np.testing.assert_array_equal(got["positions"], np.arange(len(sequence.tokens)))
        np.testing.assert_array_equal(got["targets"], np.append(sequence.tokens[1:], 0))
        for name in ("loss_mask", "sampler_logprobs", "advantages", "token_weights"):
            expected = np.append(getattr(sequence, name)[1:], 0)
            np.testing.assert_array_equal(got[name], expected, err_msg=name)
    assert stats.tokens == sum(p + c for p, c in lengths)
    assert stats.loss_tokens == sum(c for _, c in lengths)


def test_padding_is_zero_in_every_field():
    batches, _ = pack(_sequences(LENGTHS), row_tokens=ROW, rows_per_microbatch=4)
    for batch in batches:
        padding = batch.segment_ids == 0
        assert padding.any()
        for name in _given(batch):
            assert not getattr(batch, name)[padding].any(), name


def test_microbatches_have_the_declared_shape_and_dtypes():
    batches, _ = pack(_sequences(LENGTHS), row_tokens=ROW, rows_per_microbatch=4)
    for batch in batches:
        got = {n: getattr(batch, n).dtype.name for n in _given(batch)}
        assert {getattr(batch, n).shape for n in got} == {(4, ROW)}
        assert got == {
            "tokens": "int32",
            "segment_ids": "int32",
            "positions": "int32",
            "targets": "int32",
            "loss_mask": "bool",
            "token_weights": "float32",
            "advantages": "float32",
            "sampler_logprobs": "float32",
        }


def test_rows_are_filled_first_fit_decreasing():
    batches, stats = pack(
        _sequences([(1, 2), (1, 5), (1, 6), (1, 3), (1, 1)]), row_tokens=10, rows_per_microbatch=2
    )
    lengths = [
        [int((row == s).sum()) for s in range(1, row.max(initial=0) + 1)]
        for batch in batches
        for row in batch.segment_ids
    ]
    assert lengths == [[7, 3], [6, 4], [2], []]
    assert (stats.rows, stats.microbatches, stats.tokens, stats.loss_tokens) == (3, 2, 22, 17)
    assert stats.padding_ratio == pytest.approx(1 - 22 / 40)


def test_a_row_holds_no_more_segments_than_attention_keeps_apart():
    batches, _ = pack(_sequences([(1, 1)] * 200), row_tokens=256, rows_per_microbatch=1)
    most = [int(batch.segment_ids.max()) for batch in batches]
    assert sum(most) == 200
    assert max(most) == MAX_SEGMENTS - 1  # padding is one


def test_packing_is_deterministic():
    first, _ = pack(_sequences(LENGTHS), row_tokens=ROW, rows_per_microbatch=4)
    again, _ = pack(_sequences(LENGTHS), row_tokens=ROW, rows_per_microbatch=4)
    for a, b in zip(first, again, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_no_sequences_make_no_microbatch():
    batches, stats = pack([], row_tokens=ROW, rows_per_microbatch=4)
    assert batches == []
    assert (stats.rows, stats.microbatches, stats.padding_ratio) == (0, 0, 0.0)


def test_a_sequence_longer_than_a_row_is_refused_with_the_remedy():
    with pytest.raises(UserError, match=r"25 tokens.*set train\.row_tokens to at least 25"):
        pack(_sequences([(9, 16)]), row_tokens=ROW, rows_per_microbatch=4)


def test_a_sequence_without_a_prompt_is_refused():
    with pytest.raises(UserError, match=r"sequences \[1\] have an empty prompt"):
        pack(_sequences([(2, 3), (0, 3)]), row_tokens=ROW, rows_per_microbatch=4)


THETA = {
    "token": jnp.asarray(np.random.default_rng(1).normal(0, 1, (VOCAB, VOCAB)), jnp.float32),
    "position": jnp.asarray(np.random.default_rng(2).normal(0, 1, (ROW, VOCAB)), jnp.float32),
}
CHOICES = {
    "ppo": GrpoConfig(dual_clip=3.0, entropy_weight=0.01),
    "cispo": GrpoConfig(ratio="cispo", clip_high=1.0),
    "gspo": GrpoConfig(ratio="gspo", aggregation="sequence_mean"),
}


@partial(jax.jit, static_argnums=2)
def _microbatch_gradient(theta, batch, grpo: GrpoConfig):
    """Of a model that sees the token and its position."""

    def loss(theta):
        logits = theta["token"][batch.tokens] + theta["position"][batch.positions]
        log_p = jax.nn.log_softmax(logits)
        logprobs = jnp.take_along_axis(log_p, batch.targets[..., None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
        return policy_loss(
            logprobs, entropy, batch, learner_logprobs=None, reference_logprobs=None, settings=grpo
        )[0]

    return jax.grad(loss)(theta)


def _gradient(batches, grpo: GrpoConfig):
    """Summed over micro-batches, as in an optimizer step."""
    gradients = [_microbatch_gradient(THETA, batch, grpo) for batch in batches]
    return jax.tree.map(lambda *x: sum(np.asarray(g) for g in x), *gradients)


def _one_per_row(sequences):
    """Each sequence alone in a micro-batch of one row."""
    return [
        batch
        for sequence in sequences
        for batch in pack([sequence], row_tokens=ROW, rows_per_microbatch=1)[0]
    ]


def _same(got, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=GRADIENT_RTOL, atol=GRADIENT_ATOL),
        got,
        expected,
    )
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected)) > 0.1


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_packing_and_splitting_do_not_change_the_gradient(choice, rows):
    sequences = _sequences(LENGTHS)
    packed, stats = pack(sequences, row_tokens=ROW, rows_per_microbatch=rows)
    assert stats.rows < len(sequences)
    _same(_gradient(packed, CHOICES[choice]), _gradient(_one_per_row(sequences), CHOICES[choice]))


def test_longer_rows_do_not_change_the_gradient():
    sequences = _sequences(LENGTHS)
    short, _ = pack(sequences, row_tokens=ROW, rows_per_microbatch=2)
    long, _ = pack(sequences, row_tokens=5 * ROW, rows_per_microbatch=2)
    _same(_gradient(long, CHOICES["gspo"]), _gradient(short, CHOICES["gspo"]))


def test_the_order_of_rows_and_of_sequences_does_not_change_the_gradient():
    sequences = _sequences(LENGTHS)
    batches, _ = pack(sequences, row_tokens=ROW, rows_per_microbatch=8)
    expected = _gradient(batches, CHOICES["ppo"])
    order = np.random.default_rng(5).permutation(8)
    _same(
        _gradient([jax.tree.map(lambda x: x[order], b) for b in batches], CHOICES["ppo"]), expected
    )
    turned, _ = pack(sequences[::-1], row_tokens=ROW, rows_per_microbatch=8)
    _same(_gradient(turned, CHOICES["ppo"]), expected)


def test_solutions_have_loss_on_the_solution_with_weights_that_sum_to_one():
    sequences = solutions_to_sequences([[1, 2, 3], [4]], [[5, 6], [7, 8, 9]])
    assert [s.tokens.tolist() for s in sequences] == [[1, 2, 3, 5, 6], [4, 7, 8, 9]]
    np.testing.assert_allclose(sequences[0].token_weights, [0, 0, 0, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(sequences[1].token_weights, [0, 0.2, 0.2, 0.2], rtol=1e-6)
    for s in sequences:
        np.testing.assert_array_equal(s.loss_mask, s.token_weights > 0)
