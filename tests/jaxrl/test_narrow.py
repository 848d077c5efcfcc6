"""The last samples on fewer slots: the same samples, when it pays, on every device its own."""

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl.attention import Programs
from jaxrl.cli import load_config, resolve_config
from jaxrl.config import Config
from jaxrl.observe import Observer, Shapes
from jaxrl.rollout import narrow
from jaxrl.rollout.engine import Request, RolloutEngine, SamplingParams
from jaxrl.rollout.narrow import LEAST_STEPS, Tail, fitting_width, new_slots, take_rows, widths_of
from jaxrl.rollout.prefix_rows import RowTable
from jaxrl.telemetry.spans import SpanRecorder
from jaxrl.types import Completion, Snapshot
from models.decoder import Decoder
from models.rows import PrefixRows
from models.sharding import make_mesh
from roofline import cost
from roofline.kernels import Layout

SAME_GRAPH_ATOL = 1e-5
"""float32 products of fewer rows sum in another order: the project's bound for two graphs of the same sums."""
SLOTS, PROMPT, NEW, GROUP, STOP = 16, 8, 72, 4, 1
LIMITS = (*range(3, 19), 30, 34, 38, NEW)
"""Of five groups of four: sixteen end early, one is left for long."""
Found = dict[tuple[int, int], Completion]
"""By stream and sample."""


def engine(policy: Decoder, devices: int = 1, **settings: Any) -> RolloutEngine:
    defaults = {
        "num_slots": SLOTS, "max_prompt_tokens": PROMPT, "max_new_tokens": NEW, "chunk_steps": 4,
        "refill_cost_steps": 1.0, "num_stop_ids": 1, "dtype": jnp.float32, "seed": 0,
        "observer": Observer(),
    }  # fmt: skip
    mesh = make_mesh(jax.devices()[:devices], data=devices)
    return RolloutEngine(policy.config, mesh, **(defaults | settings))


def submit(
    made: RolloutEngine, first: int = 0, limits: tuple[int, ...] = LIMITS, **params: Any
) -> None:
    """Groups of GROUP samples, each sample with a limit of its own."""
    rng = np.random.default_rng(first)
    for group in range(len(limits) // GROUP):
        prompt = tuple(rng.integers(2, 14, rng.integers(1, PROMPT + 1)).tolist())
        for index in range(GROUP):
            drawn: dict[str, Any] = {"stop_ids": ()} | params
            settings = SamplingParams(max_new_tokens=limits[group * GROUP + index], **drawn)
            made.submit(
                Request(
                    stream=first + group, prompt=prompt, sample_indices=(index,), params=settings
                )
            )


def finish(made: RolloutEngine, policies: list[Decoder]) -> tuple[Found, list[int]]:
    """All that is under way, and the slots of each chunk; the weights change every six chunks."""
    found, widths = {}, []
    while not made.is_idle:
        version = min(len(widths) // 6, len(policies) - 1)
        for request, done in made.run_chunk(Snapshot(version=version, policy=policies[version])):
            found[request.stream, done.sample_index] = done
        widths.append(made.slots.positions.shape[0])
    return found, widths


def assert_same(ours: Found, plain: Found) -> None:
    assert ours.keys() == plain.keys()
    for key, expected in plain.items():
        np.testing.assert_array_equal(ours[key].tokens, expected.tokens)
        np.testing.assert_array_equal(ours[key].versions, expected.versions)
        assert ours[key].finish == expected.finish
        np.testing.assert_allclose(
            ours[key].sampler_logprobs, expected.sampler_logprobs, atol=SAME_GRAPH_ATOL
        )


# -- the rule --------------------------------------------------------------------------------------

WIDTHS = widths_of(64)


def tail(**values: Any) -> Tail:
    """Of 64 slots that are all decoded, ten live, long ago, with much to come."""
    defaults = {"width": 64, "live": 10, "steps": 200, "read": 0.5, "wasted": 1000.0}
    return Tail(**(defaults | values))


def test_a_quarter_and_a_sixteenth_of_the_slots_may_be_decoded_alone() -> None:
    assert widths_of(64) == (64, 16, 4)
    assert widths_of(6) == (6, 2, 1)
    assert widths_of(1) == (1,)


def test_live_samples_go_to_the_fewest_slots_that_hold_them() -> None:
    assert fitting_width(WIDTHS, tail()) == 16
    assert fitting_width(WIDTHS, tail(live=3)) == 4
    assert fitting_width(WIDTHS, tail(live=17)) == 64
    assert fitting_width(WIDTHS, tail(width=16, live=4)) == 4


def test_a_move_waits_until_idle_slots_have_wasted_its_price() -> None:
    """Two passes for each of 16 slots that stay, and 64 + 16 to make all slots again."""
    price = 2 * 16 + 64 + 16
    assert fitting_width(WIDTHS, tail(wasted=price - 1)) == 64
    assert fitting_width(WIDTHS, tail(wasted=price)) == 16
    assert fitting_width(WIDTHS, tail(width=16, live=4, wasted=7)) == 16  # 2 * 4
    assert fitting_width(WIDTHS, tail(width=16, live=4, wasted=8)) == 4


def test_a_move_must_be_paid_back_by_the_steps_that_can_follow() -> None:
    """48 slots fewer read a hundredth of their caches in a step: 112 passes take 234 steps."""
    assert fitting_width(WIDTHS, tail(read=0.01, steps=233)) == 64
    assert fitting_width(WIDTHS, tail(read=0.01, steps=234)) == 16


@pytest.mark.parametrize("name", ["quickstart", "countdown"])
def test_short_completions_never_move(name: str) -> None:
    rollout = load_config(resolve_config(name)).rollout
    widths = widths_of(rollout.slots)
    left = tail(width=rollout.slots, live=1, steps=rollout.max_new_tokens - 1, read=1, wasted=1e9)
    assert fitting_width(widths, left) == rollout.slots
    assert Config().rollout.max_new_tokens - 1 < LEAST_STEPS


@given(
    slots=st.integers(1, 300), at=st.integers(0, 2), steps=st.integers(1, 4096),
    live=st.integers(1, 300), read=st.floats(0.01, 1), wasted=st.floats(0, 1e5),
)  # fmt: skip
def test_the_rule_holds_what_lives_and_never_widens(
    slots: int, at: int, steps: int, live: int, read: float, wasted: float
) -> None:
    widths = widths_of(slots)
    width = widths[min(at, len(widths) - 1)]
    live = min(live, width)
    left = Tail(width=width, live=live, steps=steps, read=read, wasted=wasted)
    chosen = fitting_width(widths, left)
    assert chosen in widths
    assert live <= chosen <= width
    if chosen < width:
        assert min(wasted, (width - chosen) * read * steps) >= 2 * chosen


# -- who goes where --------------------------------------------------------------------------------


def test_a_live_slot_stays_on_its_device() -> None:
    names, sources = new_slots([9, 1, 6], width=4, other=2, devices=3)
    assert names == {1: 0, 6: 2, 9: 4}
    np.testing.assert_array_equal(sources, [1, -1, 6, -1, 9, -1])
    back, sources = new_slots(names.values(), width=2, other=4, devices=3)
    assert back == {0: 0, 2: 4, 4: 8}
    np.testing.assert_array_equal(np.flatnonzero(sources >= 0), [0, 4, 8])


def test_rows_move_with_their_readers_and_come_back() -> None:
    """Two devices of four slots and three rows go to one slot, and one row, each."""
    table = RowTable(PrefixRows(rows=6, lanes=2, tokens=8), slots=8, devices=2)
    for stream, slot in ((7, 0), (8, 1), (9, 2), (8, 3), (8, 5), (9, 6)):
        table.seat(stream, slot)
    for slot in (0, 1, 2, 5):
        table.leave(slot)
    fewer, moved = table.moved({3: 0, 6: 1}, 2)
    np.testing.assert_array_equal(moved.sources, [1, 4])
    np.testing.assert_array_equal(moved.members, [[2, 0], [1, 2]])
    np.testing.assert_array_equal(moved.lanes, [1, 2])
    again, moved = fewer.moved({0: 0, 1: 4}, 8)
    np.testing.assert_array_equal(moved.sources, [0, -1, -1, 1, -1, -1])
    np.testing.assert_array_equal(moved.lanes, [1, 0, 0, 0, 6, 0, 0, 0])
    assert again.seat(8, 1) == (0, False)  # the lane that sample 1 left
    assert again.seat(7, 2) == (2, True)  # its row was not read, and is forgotten
    again.forget()
    assert again.seat(9, 5) == (8, True)


# -- samples ---------------------------------------------------------------------------------------

MODES = {
    "plain": {},
    "recompute": {"kv_on_swap": "recompute"},
    "shared": {"prefixes": PrefixRows(rows=6, lanes=3, tokens=PROMPT)},
    "int8": {"cache_dtype": jnp.dtype("int8")},
    "float8": {"cache_dtype": jnp.dtype("float8_e4m3fn")},
    "xla": {"programs": Programs(decode="xla")},
    "shared, recompute": {
        "prefixes": PrefixRows(rows=6, lanes=3, tokens=PROMPT), "kv_on_swap": "recompute",
    },
    "shared, int8": {
        "prefixes": PrefixRows(rows=6, lanes=3, tokens=PROMPT), "cache_dtype": jnp.dtype("int8"),
    },
}  # fmt: skip
FEW = ("plain", "recompute", "shared", "int8")


@pytest.mark.parametrize(
    "mode", [m if m in FEW else pytest.param(m, marks=pytest.mark.slow) for m in MODES]
)
def test_samples_are_those_of_all_slots(tiny_policy: Decoder, mode: str) -> None:
    """Slots are refilled, then emptied; the weights change while four slots are decoded and one."""
    policies = [jax.tree.map(lambda x, i=i: x * (1 + 0.05 * i), tiny_policy) for i in range(3)]
    ours, plain = (engine(tiny_policy, narrow_tail=on, **MODES[mode]) for on in (True, False))
    submit(ours)
    submit(plain)
    narrowed, widths = finish(ours, policies)
    whole, all_slots = finish(plain, policies)
    assert list(dict.fromkeys(widths)) == [SLOTS, 4, 1]
    assert set(all_slots) == {SLOTS}
    assert len(widths) == len(all_slots)
    assert_same(narrowed, whole)
    assert len(set(narrowed[4, 3].versions.tolist())) == 3


def test_filtered_and_stopped_samples_are_those_of_all_slots(tiny_policy: Decoder) -> None:
    found = []
    for on in (True, False):
        made = engine(tiny_policy, narrow_tail=on)
        submit(made, stop_ids=(STOP,), top_k=5, temperature=1.3, limits=(NEW,) * len(LIMITS))
        found.append(finish(made, [tiny_policy]))
    (ours, widths), (plain, _) = found
    assert min(widths) < SLOTS
    assert_same(ours, plain)


@pytest.mark.parametrize("mode", ["plain", pytest.param("shared", marks=pytest.mark.slow)])
def test_all_slots_are_back_when_samples_enter(tiny_policy: Decoder, mode: str) -> None:
    """A second batch comes while one sample is left on a slot of its own, and part of it is cancelled."""
    found = []
    for on in (True, False):
        made = engine(tiny_policy, narrow_tail=on, **MODES[mode])
        submit(made)
        snapshot, first = Snapshot(version=0, policy=tiny_policy), {}
        for _ in range(14):
            first |= {(r.stream, c.sample_index): c for r, c in made.run_chunk(snapshot)}
        before = made.slots.positions.shape[0]
        submit(made, first=10)
        made.run_chunk(snapshot)
        assert made.slots.positions.shape[0] == SLOTS
        made.cancel({12})
        rest, widths = finish(made, [tiny_policy])
        found.append((first | rest, before, widths))
    (ours, before, widths), (plain, *_) = found
    assert (before, min(widths)) == (1, 1)
    assert_same(ours, plain)
    assert not [key for key in ours if key[0] == 12]


def test_a_sample_that_is_cancelled_on_few_slots_ends(tiny_policy: Decoder) -> None:
    made = engine(tiny_policy)
    submit(made)
    snapshot = Snapshot(version=0, policy=tiny_policy)
    while made.slots.positions.shape[0] == SLOTS:
        made.run_chunk(snapshot)
    samples, tokens = made.cancel({4})
    assert samples == 4
    assert tokens > 0
    assert made.is_idle
    assert not np.asarray(made.slots.remaining).any()


def test_slots_stay_as_long_as_more_could_enter(tiny_policy: Decoder) -> None:
    made = engine(tiny_policy)
    submit(made)
    while not made.is_idle:
        made.run_chunk(Snapshot(version=0, policy=tiny_policy), more_waits=True)
        assert made.slots.positions.shape[0] == SLOTS


def test_an_engine_used_before_samples_the_same_bits(tiny_policy: Decoder) -> None:
    """The widths follow from the requests alone; and once all slots came back, no program is traced again."""
    made = engine(tiny_policy)
    submit(made)
    first, widths = finish(made, [tiny_policy])
    submit(made)
    finish(made, [tiny_policy])
    traced = made.trace_count
    submit(made)
    second, again = finish(made, [tiny_policy])
    assert again == widths
    assert made.trace_count == traced
    for key, completion in first.items():
        np.testing.assert_array_equal(completion.tokens, second[key].tokens)
        np.testing.assert_array_equal(completion.sampler_logprobs, second[key].sampler_logprobs)


# -- devices, memory, spans ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shares", [False, True])
def test_devices_gather_their_own_samples(tiny_policy: Decoder, shares: bool) -> None:
    """Eight devices of eight slots; sixteen samples of each length, dealt to all of them."""
    table = PrefixRows(rows=64, lanes=2, tokens=PROMPT) if shares else None
    mesh = make_mesh(jax.devices()[:8], data=8)
    everywhere = jax.device_put(tiny_policy, NamedSharding(mesh, PartitionSpec()))
    limits = tuple(NEW if i % 8 == 3 else 10 + i % 8 for i in range(64))
    ours = engine(tiny_policy, 8, num_slots=64, prefixes=table)
    plain = engine(tiny_policy, num_slots=64, narrow_tail=False)
    submit(ours, limits=limits)
    submit(plain, limits=limits)
    narrowed, widths = finish(ours, [everywhere])
    assert min(widths) == 8
    assert_same(narrowed, finish(plain, [tiny_policy])[0])


@pytest.mark.parametrize("data", [8, 2])
def test_a_move_sends_nothing_between_devices(data: int) -> None:
    """Slots over data and fsdp, as caches are, kv heads over nothing: eight devices take of their own."""
    mesh = make_mesh(jax.devices()[:8], data=data, fsdp=8 // data)
    place = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    cache = jax.device_put(np.arange(32 * 3, dtype=np.float32).reshape(32, 3), place)
    take = jax.jit(take_rows, static_argnames=("place",))
    sources = np.arange(8, dtype=np.int32) * 4 + 3
    sources[5] = -1
    text = str(take.lower(cache, sources, place).compile().as_text())
    for collective in ("all-", "reduce-scatter", "collective-", "ragged", "send", "recv"):
        assert f" {collective}" not in text, text
    expected = np.where(sources[:, None] < 0, 0, np.asarray(cache)[sources])
    made = take(cache, sources, place)
    np.testing.assert_array_equal(made, expected)
    assert made.sharding == place


def test_all_slots_and_fewer_never_stand_side_by_side(
    tiny_policy: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While slots move, at most one array is there twice, and as many bytes as a decode program needs besides
    all slots are more than that array."""
    before = {id(x) for x in jax.live_arrays()}
    made = engine(tiny_policy)
    all_slots, seen = sum(x.nbytes for x in jax.tree.leaves(made.slots)), []
    moved_slots = narrow.moved_slots

    def watched(slots: Any, sources: Any, rows: Any, take: Any) -> Any:
        largest = max(x.nbytes for x in jax.tree.leaves(slots))

        def noting(x: jax.Array, at: Any, place: Any) -> jax.Array:
            result = take(x, at, place)
            weights = {id(y) for y in jax.tree.leaves(made.weights.layers)}
            others = before | weights
            live = [y for y in jax.live_arrays() if id(y) not in others and y.shape]
            seen.append(sum(y.nbytes for y in live) - all_slots - largest)
            return result

        return moved_slots(slots, sources, rows, noting)

    monkeypatch.setattr("jaxrl.rollout.engine.moved_slots", watched)
    submit(made)
    finish(made, [tiny_policy])
    submit(made, first=10)
    made.run_chunk(Snapshot(version=0, policy=tiny_policy))
    assert len(seen) == 3 * len(jax.tree.leaves(made.slots))
    assert max(seen) <= 0


@pytest.mark.parametrize("mode", ["plain", "shared"])
def test_a_span_costs_the_slots_that_it_decoded(
    tiny_policy: Decoder, tmp_path: Path, mode: str
) -> None:
    prefixes = MODES[mode].get("prefixes")
    shapes = Shapes(
        model=tiny_policy.config, learner=Layout(), rollout=Layout(), num_slots=SLOTS,
        prefixes=prefixes, row_tokens=16, rows_per_microbatch=1, chunk_tokens=16, remat="none",
        colocated=False,
    )  # fmt: skip
    recorder = SpanRecorder(tmp_path / "spans.jsonl")
    made = engine(tiny_policy, observer=Observer(recorder, shapes), **MODES[mode])
    for _ in range(2):  # the first time they compile
        submit(made)
        finish(made, [tiny_policy])
    recorder.close_step(1)
    recorder.close()
    lines = map(json.loads, (tmp_path / "spans.jsonl").read_text().splitlines())
    spans = [line for line in lines if line["phase"] == "decode"]
    assert {span["work"]["slots"] for span in spans} == {SLOTS, 4, 1}
    for span in spans:
        work, rows = span["work"], None
        if prefixes is not None:
            held = min(prefixes.rows, work["slots"])
            assert work["prefix_rows"] == held
            rows = PrefixRows(rows=held, lanes=prefixes.lanes, tokens=work["prefix_len"])
        expected = cost.decode(
            tiny_policy.config, Layout(), work["slots"], work["kv_len"], work["steps"], rows
        )
        assert span["cost"]["flops"] == expected.flops
        assert span["cost"]["hbm_bytes"] == expected.hbm_bytes
