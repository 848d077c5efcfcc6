"""Prompts held once for all slots that sample them: the same samples as with a copy in every slot."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl.attention import Programs
from jaxrl.config import Config, MeshConfig, RolloutConfig
from jaxrl.errors import UserError
from jaxrl.observe import Observer
from jaxrl.rollout.engine import Request, RolloutEngine, SamplingParams
from jaxrl.rollout.prefix_rows import RowTable
from jaxrl.types import Completion, Snapshot
from models.decoder import Decoder
from models.rows import PrefixRows
from models.sharding import make_mesh

SAME_GRAPH_ATOL = 1e-5
"""float32 sums in two parts against one: the project's bound for two graphs of the same sums."""
STOP, PROMPT, NEW, GROUP = 1, 40, 12, 4
ROWS = PrefixRows(rows=2, lanes=3, tokens=PROMPT)
"""Fewer rows than prompts under way, fewer lanes than samples of a prompt."""
Found = dict[tuple[int, int], Completion]


def engine(
    policy: Decoder, prefixes: PrefixRows | None, devices: int = 1, **settings: object
) -> RolloutEngine:
    defaults = {
        "num_slots": 6, "max_prompt_tokens": PROMPT, "max_new_tokens": NEW, "chunk_steps": 3,
        "refill_cost_steps": 1.0, "num_stop_ids": 1, "dtype": jnp.float32, "seed": 0,
        "observer": Observer(), "prefixes": prefixes,
    }  # fmt: skip
    mesh = make_mesh(jax.devices()[:devices], data=devices)
    return RolloutEngine(policy.config, mesh, **(defaults | settings))


def prompts(count: int) -> list[tuple[int, ...]]:
    """Ragged: 1, 33 and PROMPT tokens among them."""
    rng = np.random.default_rng(0)
    lengths = [1, PROMPT, 33, *rng.integers(2, PROMPT, max(0, count - 3)).tolist()][:count]
    return [tuple(rng.integers(2, 14, length).tolist()) for length in lengths]


def sample(made: RolloutEngine, policies: list[Decoder], groups: int = 5, **params) -> Found:
    """All samples; the weights change after every second chunk as long as there are others."""
    settings = SamplingParams(**({"max_new_tokens": NEW, "stop_ids": (STOP,)} | params))
    for stream, prompt in enumerate(prompts(groups)):
        made.submit(
            Request(
                stream=stream, prompt=prompt, sample_indices=tuple(range(GROUP)), params=settings
            )
        )
    found, chunks = {}, 0
    while not made.is_idle:
        version = min(chunks // 2, len(policies) - 1)
        for request, done in made.run_chunk(Snapshot(version=version, policy=policies[version])):
            found[request.stream, done.sample_index] = done
        chunks += 1
    return found


def assert_same(ours: Found, plain: Found) -> None:
    assert ours.keys() == plain.keys()
    for key, expected in plain.items():
        np.testing.assert_array_equal(ours[key].tokens, expected.tokens)
        np.testing.assert_allclose(
            ours[key].sampler_logprobs, expected.sampler_logprobs, atol=SAME_GRAPH_ATOL
        )


@pytest.mark.parametrize(
    ("attention", "temperature"),
    [
        ("blocks", 1.0),
        ("xla", 0.0),
        pytest.param("blocks", 0.0, marks=pytest.mark.slow),
        pytest.param("xla", 1.0, marks=pytest.mark.slow),
    ],
)
def test_samples_and_logprobs_are_those_of_a_copy_per_slot(
    tiny_policy: Decoder, attention: str, temperature: float
) -> None:
    """Slots are refilled, prompts wait for rows, and more samples of a prompt than lanes open a second row."""
    programs = Programs(decode=attention)
    ours = engine(tiny_policy, ROWS, programs=programs)
    plain = engine(tiny_policy, None, programs=programs)
    drawn = sample(ours, [tiny_policy], temperature=temperature)
    assert_same(drawn, sample(plain, [tiny_policy], temperature=temperature))
    assert len(drawn) == 5 * GROUP


@pytest.mark.slow
@pytest.mark.parametrize("kv_on_swap", ["keep", "recompute"])
def test_weights_that_change_in_flight_change_both_alike(
    tiny_policy: Decoder, kv_on_swap: str
) -> None:
    """Six slots for six samples at once: both engines decode the same chunks under the same weights."""
    policies = [jax.tree.map(lambda x, i=i: x * (1 + 0.05 * i), tiny_policy) for i in range(3)]
    table = PrefixRows(rows=6, lanes=GROUP, tokens=PROMPT)
    settings = {"kv_on_swap": kv_on_swap, "num_slots": 3 * GROUP}
    ours = sample(engine(tiny_policy, table, **settings), policies, groups=3, stop_ids=())
    plain = sample(engine(tiny_policy, None, **settings), policies, groups=3, stop_ids=())
    assert_same(ours, plain)
    assert any(len(set(done.versions.tolist())) > 1 for done in plain.values())


@pytest.mark.slow
def test_a_cache_in_8_bits_is_shared_too(tiny_policy: Decoder) -> None:
    kind = {"cache_dtype": jnp.dtype("int8")}
    ours = sample(engine(tiny_policy, ROWS, **kind), [tiny_policy], temperature=0.0)
    assert_same(ours, sample(engine(tiny_policy, None, **kind), [tiny_policy], temperature=0.0))


@pytest.mark.slow
def test_devices_read_rows_of_their_own(tiny_policy: Decoder) -> None:
    table = PrefixRows(rows=8, lanes=2, tokens=PROMPT)
    mesh = make_mesh(jax.devices()[:4], data=4)
    everywhere = jax.device_put(tiny_policy, NamedSharding(mesh, PartitionSpec()))
    ours = sample(engine(tiny_policy, table, 4, num_slots=8), [everywhere])
    assert_same(ours, sample(engine(tiny_policy, None, num_slots=8), [tiny_policy]))


def test_a_cancelled_sample_leaves_its_row(tiny_policy: Decoder) -> None:
    made = engine(tiny_policy, PrefixRows(rows=1, lanes=3, tokens=PROMPT))
    params = SamplingParams(max_new_tokens=NEW, stop_ids=())
    for stream in (0, 1):
        made.submit(
            Request(stream=stream, prompt=(3, 4, 5), sample_indices=(0, 1, 2), params=params)
        )
    assert not made.run_chunk(Snapshot(version=0, policy=tiny_policy))
    assert made.cancel({0}) == (3, 9)
    finished = []
    while not made.is_idle:
        finished += made.run_chunk(Snapshot(version=0, policy=tiny_policy))
    assert [request.stream for request, _ in finished] == [1, 1, 1]


def test_a_completion_longer_than_a_slots_own_cache_is_refused(tiny_policy: Decoder) -> None:
    params = SamplingParams(max_new_tokens=NEW + 1, stop_ids=())
    request = Request(stream=0, prompt=(3,), sample_indices=(0,), params=params)
    with pytest.raises(ValueError, match=f"room for {NEW}"):
        engine(tiny_policy, ROWS).submit(request)


@pytest.mark.parametrize(
    ("rollout", "mesh", "said"),
    [
        ({"shared_prefix": 15}, {}, "a multiple of 1 from 16 on"),
        ({"shared_prefix": 18}, {"rollout_data": 4}, "a multiple of 4 from 16 on"),
        (
            {"shared_prefix": 32, "attention": "pallas"},
            {},
            "rollout.attention=pallas knows no shared",
        ),
    ],
)
def test_rows_that_cannot_serve_the_slots_are_refused(
    rollout: dict[str, Any], mesh: dict[str, int], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        Config(rollout=RolloutConfig(**rollout), mesh=MeshConfig(**mesh))


def test_the_settings_make_an_engine_with_a_lane_for_every_sample() -> None:
    config = Config(rollout=RolloutConfig(shared_prefix=32))
    assert config.rollout.prefixes(config.grpo.samples_per_prompt) == PrefixRows(
        rows=32, lanes=8, tokens=32
    )
    assert Config().rollout.prefixes(8) is None


def test_a_row_serves_its_prompt_until_the_weights_change_or_another_needs_it() -> None:
    table = RowTable(PrefixRows(rows=2, lanes=2, tokens=8), slots=4, devices=1)
    assert table.seat(7, 0) == (0, True)
    assert table.seat(7, 1) == (1, False)
    assert table.seat(7, 2) == (2, True)  # no lane left: a second row
    assert table.seat(8, 3) is None
    table.leave(0)
    assert table.seat(7, 0) == (0, False)
    table.leave(2)
    assert table.has_room
    assert table.seat(8, 2) == (2, True)
    table.leave(0)
    table.forget()
    assert table.seat(7, 0) is None  # its row holds old weights
    assert not table.has_lane(8)


def test_rows_are_those_of_the_slots_device() -> None:
    table = RowTable(PrefixRows(rows=4, lanes=2, tokens=8), slots=4, devices=2)
    assert table.seat(7, 0) == (0, True)
    assert table.seat(7, 2) == (4, True)
    assert table.seat(7, 3) == (5, False)
    np.testing.assert_array_equal(table.members, [[0, 4], [4, 4], [2, 3], [4, 4]])
