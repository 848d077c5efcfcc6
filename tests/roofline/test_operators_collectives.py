"""Collectives: physics of the curves, not their errors (tests/roofline/test_validate.py)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roofline.datasheets import DATASHEETS, datasheet
from roofline.operators.collectives import (
    COLLECTIVES,
    ProtocolCurve,
    SendCurve,
    collective_bound_s,
    curve_s,
    egress_bytes,
)
from roofline.operators.model import operator_model

H100 = operator_model(datasheet("h100-80gb-sxm"))
MIB = 2**20
kinds = st.sampled_from(COLLECTIVES)
gpus = st.sampled_from([operator_model(hardware) for hardware in DATASHEETS.values()])


@settings(max_examples=80, deadline=None)
@given(
    model=gpus, kind=kinds, devices=st.integers(2, 8),
    buffer_bytes=st.integers(1, 2**33), more=st.integers(1, 2**30),
)  # fmt: skip
def test_a_collective_grows_with_its_bytes_and_stays_above_the_book(
    model, kind, devices, buffer_bytes, more
):
    seconds = model.collective(kind, buffer_bytes, devices)
    assert seconds > collective_bound_s(model.hardware, kind, buffer_bytes, devices)
    assert model.collective(kind, buffer_bytes + more, devices) >= seconds


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_one_device_waits_for_nobody(kind):
    assert H100.collective(kind, 2**30, 1) == 0.0


def test_egress_is_the_book_s():
    assert egress_bytes("all_gather", 800.0, 8) == 700.0
    assert egress_bytes("all_reduce", 800.0, 8) == 1400.0
    assert egress_bytes("all_to_all", 800.0, 4) == 600.0


def test_a_large_gather_takes_what_the_book_measured():
    seconds = H100.collective("all_gather", 536e6, 8)
    assert seconds == pytest.approx(1.5e-3, rel=0.1)  # "about 1.5 ms", gpus chapter


def test_the_fastest_protocol_is_taken_for_each_size():
    curve = ProtocolCurve(
        latency_s=10e-6, ll128_s=3e-6, simple_s=20e-6, ll=0.01, ll128=0.4, simple=0.8
    )
    link = 450e9
    for egress, expected in (
        (1e2, 10e-6 + 1e2 / (0.01 * link)),
        (5e5, 13e-6 + 5e5 / (0.4 * link)),
        (1e9, 33e-6 + 1e9 / (0.8 * link)),
    ):
        assert curve_s(curve, egress, link, devices=8) == pytest.approx(expected, rel=0.01)


def test_sends_and_receives_take_the_protocol_of_their_size():
    curve = SendCurve(
        latency_s=10e-6, spread_s=3e-6, simple_s=6e-6, full_s=40e-6,
        ll=0.01, simple=0.8, few=0.5, ll_bytes=2**19,
    )  # fmt: skip
    link, peers = 450e9, 7
    few = 0.5 * 0.8 * link
    for egress, expected in (
        (1e2, 10e-6 + 1e2 / (0.01 * link)),
        (2**19 * peers, 13e-6 + 2 * 2**19 * peers / few),  # a flag beside each 4 bytes
        (2**20 * peers, 16e-6 + 2**20 * peers / few),
        (1e9, 56e-6 + 1e9 / (0.8 * link)),
    ):
        assert curve_s(curve, egress, link, devices=8) == pytest.approx(expected, rel=0.01)
    at_limit = curve_s(curve, 2**19 * peers, link, devices=8)
    assert curve_s(curve, 2**19 * peers + 1, link, devices=8) >= at_limit


def test_a_number_of_devices_that_was_not_measured_lies_between_its_neighbours():
    around = [H100.collective("reduce_scatter", 16 * MIB, n) for n in (4, 6, 8)]
    assert around == sorted(around)


@pytest.mark.parametrize("kind", COLLECTIVES)
@pytest.mark.parametrize("buffer_bytes", [1024, 64 * MIB, 2**30])
def test_more_nodes_take_longer(kind, buffer_bytes):
    seconds = [H100.collective(kind, buffer_bytes, n) for n in (8, 16, 64)]
    assert seconds == sorted(seconds)
    assert seconds[1] > collective_bound_s(H100.hardware, kind, buffer_bytes, 16)


def test_the_network_of_large_all_reduces_is_the_book_s_over_its_share():
    seconds = H100.collective("all_reduce", 8e9, 128)
    book = 2 * 8e9 * (15 / 16) / 400e9  # 400 GB/s per node of eight
    assert seconds == pytest.approx(book / 0.74, rel=0.02)


def test_impossible_collectives_are_refused():
    with pytest.raises(ValueError, match="unknown collective 'gossip'"):
        egress_bytes("gossip", 1.0, 2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="devices=0"):
        H100.collective("all_gather", 1.0, 0)
    with pytest.raises(ValueError, match="multiple of the 8"):
        H100.collective("all_gather", 1.0, 12)
    card = operator_model(datasheet("rtx-4090"))
    with pytest.raises(ValueError, match="names no network"):
        card.collective("all_gather", 1.0, 16)


def test_curves_of_another_library_are_used_when_asked_for():
    older = H100.collective("all_gather", 1024, 8, library="nccl-tests")
    assert older != H100.collective("all_gather", 1024, 8)
    with pytest.raises(ValueError, match="no collective curves for library 'mpi'"):
        H100.collective("all_gather", 1024, 8, library="mpi")
