"""Measures this machine: peaks, fixed times, and the shares of the peaks that each phase reaches.

    python -m roofline.calibrate [--model FOLDER_CONFIG.json] [--out FILE]

Two layers. Micro-benchmarks give what any program meets: dispatch, the fixed time of a kernel,
memory bandwidth, matrix products at the model's shapes, copies between devices. Then programs like
the trainer's run at a few shapes, and `roofline.fit` turns their times into shares of the peaks per
phase. A datasheet gives the peaks of a known GPU; elsewhere the best measured rate is the peak.

Rules: all is compiled before anything is timed; the programs run in turn, round after round, so
that a disturbance hits each of them; the median of the rounds counts; chains run inside one program;
what a program replaces is donated (fresh buffers cost page faults on a CPU). Models deeper than two
layers are measured at two: the layers are scanned, so their time is linear in their number. The only
module of `roofline` that imports jax.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from models.cache import init_cache
from models.config import ModelConfig
from models.decoder import Decoder, decode_step, hidden_states, prefill
from models.head import head_logits, target_logprobs
from roofline import cost
from roofline.datasheets import datasheet_of_device
from roofline.fit import Sample, fit_all, held_out_ratios
from roofline.hardware import DTYPE_BYTES, Efficiency, Hardware
from roofline.kernels import Layout
from roofline.machine import Workload, cache_file, host_memory_bytes, processor
from roofline.phases import Phase, PhaseCost

QUICKSTART = ModelConfig(
    vocab_size=20, width=128, num_layers=2, num_heads=4, num_kv_heads=2, head_size=32,
    ffw_size=384, qk_norm=True,
)  # fmt: skip
"""What `python -m roofline.calibrate` measures without --model."""
PROBE_LAYERS = 2
WARM_UPS, ROUNDS, MIN_ROUNDS = 2, 9, 3
COMPILE_SHARE = 0.6
"""Share of the budget after which no further program is compiled."""
CONTENTION_S = 0.4
"""How long two lanes run side by side to see how they disturb each other."""

Run = Callable[[], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Probe:
    """A program at one shape: how to make it, what it costs, whether it is fitted or held out."""

    name: str
    cost: PhaseCost
    make: Callable[[], Run]
    """Compiles; the result runs the program once and waits for it."""
    held_out: bool = False


def cached_or_calibrate(
    model: ModelConfig | None = None,
    *,
    workload: Workload | None = None,
    devices: Sequence[jax.Device] | None = None,
    budget_s: float = 30.0,
) -> Hardware:
    """The stored calibration of this machine, software, model and workload; measured if there is none."""
    workload = workload or Workload()
    devices = list(devices or jax.devices())
    path = cache_file(model, workload, _versions(devices[0]), len(devices))
    if path.is_file():
        return Hardware.load(path)
    hardware = calibrate(model, workload=workload, devices=devices, budget_s=budget_s)
    hardware.save(path)
    return hardware


def calibrate(
    model: ModelConfig | None = None,
    *,
    workload: Workload | None = None,
    devices: Sequence[jax.Device] | None = None,
    budget_s: float = 30.0,
    verify: bool = False,
) -> Hardware:
    """Measure `devices[0]` and its links; with a model also its phases, at the workload's shapes.

    `budget_s` bounds the time spent: programs that no longer fit are left out and named in `source`,
    and their phases keep the micro-benchmarks' shares. `verify` also runs shapes that are not
    fitted and stores predicted / measured in `held_out`.
    """
    begin, workload = time.perf_counter(), workload or Workload()
    devices = list(devices or jax.devices())
    hardware = _micro(devices, model or QUICKSTART, workload)
    if model is None:
        return hardware
    depth = min(model.num_layers, PROBE_LAYERS)
    shallow = tuple(i for i in model.no_rope_layers if i < depth)
    small = dataclasses.replace(model, num_layers=depth, no_rope_layers=shallow)
    probes = [p for p in _probes(small, workload, devices[0]) if verify or not p.held_out]
    runs, left_out = _compile(probes, begin + COMPILE_SHARE * budget_s)
    times = _medians(list(runs.values()), begin + budget_s)
    samples = [
        Sample(name=probe.name, cost=probe.cost, measured_s=seconds)
        for probe, seconds in zip(runs, times, strict=True)
    ]
    fitted = [s for s, probe in zip(samples, runs, strict=True) if not probe.held_out]
    hardware = dataclasses.replace(hardware, phase_efficiency=fit_all(fitted, hardware))
    checked = [s for s, probe in zip(samples, runs, strict=True) if probe.held_out]
    contention = 1.0
    if devices[0].platform == "cpu" or len(devices) == 1:
        contention = _contention(small, workload, devices)
    skipped = (f"left out for lack of time: {', '.join(left_out)}",) if left_out else ()
    return dataclasses.replace(
        hardware,
        contention=contention,
        held_out=held_out_ratios(checked, hardware),
        source=hardware.source + skipped,
    )


# -- micro-benchmarks ------------------------------------------------------------------------------


def _micro(devices: Sequence[jax.Device], model: ModelConfig, workload: Workload) -> Hardware:
    """Peaks, fixed times and general shares of devices[0]."""
    device, dtype = devices[0], jnp.dtype(workload.dtype)
    with jax.default_device(device):
        dispatch_s, kernel_s = _dispatch_s(), _kernel_s()
        bytes_per_s = _bytes_per_s(device.platform)
        shapes = [(workload.slots, model.width), (workload.rows * workload.row_tokens, model.width)]
        rates = [_product_rate(m, d, model.ffw_size, dtype) for m, d in shapes]
        best = max(*rates, _product_rate(1024, 1024, 1024, dtype))
    latency_s, link_bytes_per_s = _link(devices, bytes_per_s)
    sheet = datasheet_of_device(device.device_kind)
    if sheet is None:
        sheet = Hardware(
            name=f"{device.device_kind} ({processor()})",
            peak_flops_per_s=dict.fromkeys(DTYPE_BYTES, best),
            hbm_bytes=host_memory_bytes() / len(devices),
            hbm_bytes_per_s=bytes_per_s,
            link_bytes_per_s=link_bytes_per_s,
            dispatch_s=dispatch_s,
            kernel_s=kernel_s,
            source=("peaks: best rates measured on this machine",),
        )
    share = Efficiency(
        compute=_share(statistics.median(rates), sheet.peak(workload.dtype)),
        memory=_share(bytes_per_s, sheet.hbm_bytes_per_s),
        link=_share(link_bytes_per_s, sheet.link_bytes_per_s),
    )
    return dataclasses.replace(
        sheet,
        dispatch_s=dispatch_s,
        kernel_s=kernel_s,
        link_latency_s=latency_s,
        efficiency=share,
        devices_share_cores=device.platform == "cpu",
        calibrated=True,
        source=(*sheet.source, "shares and fixed times: measured by roofline.calibrate"),
        date=datetime.date.today().isoformat(),
        versions=_versions(device),
    )


def _share(reached: float, peak: float) -> float:
    return min(1.0, reached / peak)


def _versions(device: jax.Device) -> dict[str, str]:
    return {
        "jax": jax.__version__,
        "platform": device.platform,
        "device_kind": device.device_kind,
    }


def _seconds(run: Run, rounds: int = ROUNDS) -> float:
    """Median time of a call, after warm-up."""
    for _ in range(WARM_UPS):
        run()
    return statistics.median(_timed(run) for _ in range(rounds))


def _timed(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _caller(function: Any, *arguments: Any) -> Run:
    """Runs the function on these arguments and waits."""
    return lambda: jax.block_until_ready(function(*arguments)) and None


def _replacer(function: Any, state: Any, *arguments: Any) -> Run:
    """Runs state = function(state, ...), with the state donated, and waits."""
    held = [state]

    def run() -> None:
        held[0] = jax.block_until_ready(function(held[0], *arguments))

    return run


def _dispatch_s() -> float:
    """Start of one program with a dozen arguments, and waiting for it [s]."""
    leaves = [jnp.full((8,), 1.0 + i) for i in range(12)]
    return _seconds(_caller(jax.jit(lambda xs: xs[0] + xs[-1]), leaves), rounds=200)


def _kernel_s() -> float:
    """One more small kernel in a program: slope over chains of products and elementwise maps [s]."""
    x = jnp.eye(32)

    def chain(length: int) -> Run:
        def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ x), None

        return _caller(jax.jit(lambda x: jax.lax.scan(body, x, None, length=length)[0]), x)

    short, long = 64, 512
    return max((_seconds(chain(long)) - _seconds(chain(short))) / (2 * (long - short)), 1e-8)


def _bytes_per_s(platform: str) -> float:
    """Donated in-place sum over an array far larger than any cache: read and write."""
    count = 2**24 if platform == "cpu" else 2**28
    add = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    return 2 * 4 * count / _seconds(_replacer(add, jnp.ones(count)))


def _product_rate(rows: int, inner: int, columns: int, dtype: Any) -> float:
    """FLOP/s of [rows, inner] x [inner, columns] and back, chained inside one program."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (rows, inner)).astype(dtype)
    there = (jax.random.normal(key, (inner, columns)) * inner**-0.5).astype(dtype)
    back = (jax.random.normal(key, (columns, inner)) * columns**-0.5).astype(dtype)
    flops = 4.0 * rows * inner * columns
    length = max(2, min(64, int(2e9 / flops)))

    @jax.jit
    def chain(x: jax.Array, there: jax.Array, back: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: ((x @ there) @ back, None), x, None, length=length)[0]

    return flops * length / _seconds(_caller(chain, x, there, back))


def _link(devices: Sequence[jax.Device], memory_bytes_per_s: float) -> tuple[float, float]:
    """Fixed time and rate of copies between two devices; one device copies within its memory."""
    if len(devices) == 1:
        return 0.0, memory_bytes_per_s
    small, large = (jax.device_put(jnp.ones(n), devices[0]) for n in (16, 2**22))
    latency_s = _seconds(_caller(jax.device_put, small, devices[1]), rounds=50)
    copy_s = _seconds(_caller(jax.device_put, large, devices[1]))
    return latency_s, large.nbytes / max(copy_s - latency_s, 1e-9)


# -- programs like the trainer's -------------------------------------------------------------------


def _decode_chunk(
    policy: Decoder, state: tuple[Any, ...], key: jax.Array, *, steps: int, kv_len: int, dtype: Any
) -> tuple[Any, ...]:
    """`steps` sampled tokens for every slot, with one uniform per slot and the inverse CDF."""
    slots = state[1].shape[0]

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        index, cache, tokens, positions, _ = carry
        hidden, cache = decode_step(
            policy, cache, tokens, positions, dtype=dtype, kv_limit=kv_len
        )
        logprobs = jax.nn.log_softmax(head_logits(policy, hidden, dtype=dtype), axis=-1)
        keys = jax.vmap(partial(jax.random.fold_in, key))(positions * slots + jnp.arange(slots))
        total = jnp.cumsum(jnp.exp(logprobs), axis=-1)
        drawn = jax.vmap(jax.random.uniform)(keys)[:, None] * total[:, -1:]
        tokens = jnp.minimum(jnp.sum(total <= drawn, axis=-1), logprobs.shape[1] - 1)
        chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
        return index + 1, cache, tokens, jnp.minimum(positions + 1, kv_len - 1), chosen

    start = (jnp.int32(0), *state, jnp.zeros(slots, jnp.float32))
    _, cache, tokens, positions, _ = jax.lax.while_loop(lambda c: c[0] < steps, step, start)
    return cache, tokens, positions


def _scores(policy: Decoder, rows: tuple[Any, ...], *, w: Workload) -> tuple[Any, Any]:
    tokens, positions, segments = rows
    dtype = jnp.dtype(w.dtype)
    hidden = hidden_states(
        policy, tokens, positions, segments, dtype=dtype, remat=w.remat == "block"
    )
    return target_logprobs(
        policy, hidden, tokens, temperature=1.0, chunk_tokens=w.chunk_tokens, dtype=dtype
    )


def _accumulate(
    gradients: Decoder, policy: Decoder, rows: tuple[Any, ...], weights: jax.Array, *, w: Workload
) -> Decoder:
    """One micro-batch of a clipped policy loss, added to the gradients."""

    def loss(policy: Decoder) -> jax.Array:
        logprobs, entropy = _scores(policy, rows, w=w)
        ratio = jnp.exp(logprobs - weights)
        clipped = jnp.clip(ratio, 0.8, 1.2)
        return -jnp.sum(jnp.minimum(ratio * weights, clipped * weights) + 0.0 * entropy)

    return jax.tree.map(jnp.add, gradients, jax.grad(loss)(policy))
