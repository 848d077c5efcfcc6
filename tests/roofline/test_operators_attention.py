"""Attention: physics of the models, not their errors (tests/roofline/test_validate.py)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roofline.datasheets import DATASHEETS, datasheet
from roofline.operators.attention import decode_bound_s, prefill_bound_s
from roofline.operators.model import operator_model

gpus = st.sampled_from([operator_model(hardware) for hardware in DATASHEETS.values()])
heads = st.sampled_from([(8, 8), (16, 2), (32, 8), (32, 32), (64, 8), (16, 1)])
head_sizes = st.sampled_from([64, 128])
ROUNDING = 1e-9
A100, H100 = (operator_model(datasheet(name)) for name in ("a100-80gb-sxm", "h100-80gb-sxm"))
GQA = {"num_heads": 32, "num_kv_heads": 8, "head_size": 128}


@settings(max_examples=60, deadline=None)
@given(
    model=gpus, heads=heads, head_size=head_sizes,
    batch=st.integers(1, 128), tokens=st.integers(1, 16_384), more=st.integers(1, 2000),
)  # fmt: skip
def test_prefill_grows_with_its_work_and_stays_above_the_book(
    model, heads, head_size, batch, tokens, more
):
    shape = {"num_heads": heads[0], "num_kv_heads": heads[1], "head_size": head_size}
    seconds = model.prefill(batch=batch, tokens=tokens, **shape)
    assert seconds > prefill_bound_s(model.hardware, batch=batch, tokens=tokens, **shape)
    assert model.prefill(batch=batch + 1, tokens=tokens, **shape) > seconds
    assert model.prefill(batch=batch, tokens=tokens + more, **shape) > seconds


@settings(max_examples=60, deadline=None)
@given(
    model=gpus, heads=heads, head_size=head_sizes,
    batch=st.integers(1, 512), kv_len=st.integers(1, 32_768), more=st.integers(1, 2000),
)  # fmt: skip
def test_decode_grows_with_its_work_and_a_cold_cache_stays_above_the_book(
    model, heads, head_size, batch, kv_len, more
):
    shape = {"num_heads": heads[0], "num_kv_heads": heads[1], "head_size": head_size}
    seconds = model.decode(batch=batch, kv_len=kv_len, **shape)
    assert seconds > decode_bound_s(model.hardware, batch=batch, kv_len=kv_len, **shape)
    for larger in ((batch + 1, kv_len), (batch, kv_len + more)):
        after = model.decode(batch=larger[0], kv_len=larger[1], **shape)
        assert after >= seconds * (1 - ROUNDING)


def test_a_long_prefill_grows_with_the_square_of_its_length():
    short, long = (H100.prefill(batch=1, tokens=tokens, **GQA) for tokens in (16_384, 32_768))
    assert 3.7 < long / short < 4.0  # the terms linear in tokens keep it below 4


def test_only_a_cache_that_fits_in_l2_is_read_faster_when_warm():
    def gain(kv_len: int) -> float:
        cold, warm = (H100.decode(batch=16, kv_len=kv_len, warm_l2=w, **GQA) for w in (False, True))
        return cold / warm

    assert gain(512) > 1.2  # 34 MB of 50 MB
    assert gain(16_384) == pytest.approx(1.0, abs=0.01)  # 1.1 GB


def test_ampere_kernels_do_not_split_the_keys_of_full_heads():
    full = {"num_heads": 8, "num_kv_heads": 8, "head_size": 128}
    grouped = {**full, "num_heads": 16}
    slow = A100.decode(batch=1, kv_len=32_768, **full)
    fast = A100.decode(batch=1, kv_len=32_768, **grouped)
    assert slow > 4 * fast  # measured: 764 us and 105 us
    assert H100.decode(batch=1, kv_len=32_768, **full) < 1.1 * H100.decode(
        batch=1, kv_len=32_768, **grouped
    )


def test_an_eight_bit_cache_saves_nearly_half_of_a_long_decode():
    wide = H100.decode(batch=128, kv_len=8192, **GQA)
    narrow = H100.decode(batch=128, kv_len=8192, kv_dtype="float8", **GQA)
    assert 0.5 * wide < narrow < 0.6 * wide  # the time per key of a block stays
