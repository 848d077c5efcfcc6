"""What any program meets on this machine: fixed times, bandwidths, rates of matrix products."""

from __future__ import annotations

import dataclasses
import datetime
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.compiler_options import decode_options
from models.config import ModelConfig
from models.sharding import make_mesh
from roofline.calibrate.timing import Device, Run, caller, replacer, seconds
from roofline.datasheets import datasheet_of_device
from roofline.hardware import Efficiency, Hardware
from roofline.machine import Workload, host_memory_bytes, processor

CHAIN_S = 4e-3
"""About what a timed chain of products takes [s], far above a dispatch, on any device."""
FIRST_PAIRS, MOST_PAIRS = 2, 64
"""Products there and back in the first chain, and in the longest, after which values drift; longer ones are
several calls."""

EXCHANGED = (16, 2**18)
"""Values of each device's part in a collective: one that only takes its fixed time, and one of 1 MiB."""


def versions(device: Device) -> dict[str, str]:
    """What a calibration holds for: software and kind of device."""
    return {
        "jax": jax.__version__,
        "platform": device.platform,
        "device_kind": device.device_kind,
    }


def measure_device(devices: Sequence[Device], model: ModelConfig, workload: Workload) -> Hardware:
    """Peaks (of a known GPU: its datasheet's), fixed times and general shares of devices[0]."""
    device = devices[0]
    with jax.default_device(device):
        dispatch_s, kernel_s = _dispatch_s(), _kernel_s()
    rates = measure_rates(device, model, workload)
    latency_s, link_bytes_per_s = _link(devices, rates.bytes_per_s)
    exchanged = _collectives(devices)
    exchanged_bytes_per_s, said = link_bytes_per_s, ()
    if exchanged:
        latency_s = statistics.median(fixed_s for fixed_s, _ in exchanged.values())
        exchanged_bytes_per_s = statistics.median(rate for _, rate in exchanged.values())
        each = (
            f"{kind} {fixed_s * 1e6:.0f} us and {rate / 1e9:.3g} GB/s"
            for kind, (fixed_s, rate) in exchanged.items()
        )
        said = (f"collectives over {len(devices)} devices, their medians: {'; '.join(each)}",)
    sheet = datasheet_of_device(device.device_kind)
    if sheet is None:
        sheet = Hardware(
            name=f"{device.device_kind}: {processor()}",
            peak_flops_per_s=dict.fromkeys(("float32", "bfloat16"), rates.best_flops_per_s),
            hbm_bytes=host_memory_bytes() / len(devices),
            hbm_bytes_per_s=rates.bytes_per_s,
            link_bytes_per_s=link_bytes_per_s,
            dispatch_s=dispatch_s,
            kernel_s=kernel_s,
            source=(
                f"peaks: best rates measured here in {workload.dtype}, assumed in other types",
            ),
        )
    reached = Efficiency(
        compute=min(1.0, rates.flops_per_s / sheet.peak(workload.dtype)),
        memory=min(1.0, rates.bytes_per_s / sheet.hbm_bytes_per_s),
        link=min(1.0, exchanged_bytes_per_s / sheet.link_bytes_per_s),
    )
    return dataclasses.replace(
        sheet,
        dispatch_s=dispatch_s,
        kernel_s=kernel_s,
        link_latency_s=latency_s,
        efficiency=reached,
        devices_share_cores=device.platform == "cpu",
        calibrated=True,
        source=(*sheet.source, "shares and fixed times: measured by roofline.calibrate", *said),
        date=datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        versions=versions(device),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """How fast the device computes and moves data at one moment."""

    flops_per_s: float
    """Median of products at the model's shapes."""
    best_flops_per_s: float
    """Of these and of a large product."""
    bytes_per_s: float
    """Read from and written to memory."""


def measure_rates(device: Device, model: ModelConfig, workload: Workload) -> Rates:
    """Rates of `device` now."""
    dtype = jnp.dtype(workload.dtype)
    with jax.default_device(device):
        bytes_per_s = _bytes_per_s(device.platform)
        rates = [
            product_rate(rows, model.width, model.ffw_size, dtype, device)
            for rows in (workload.slots, workload.rows * workload.row_tokens)
        ]
        best = max(*rates, product_rate(1024, 1024, 1024, dtype, device))
    return Rates(
        flops_per_s=statistics.median(rates), best_flops_per_s=best, bytes_per_s=bytes_per_s
    )


def with_better(hardware: Hardware, again: Rates, dtype: str) -> Hardware:
    """The hardware, whose peaks are measured ones, with the rates that are better in `again`: what a machine
    reached while it served others would be a peak that programs exceed at another moment."""
    peak, reached = max(hardware.peak(dtype), again.best_flops_per_s), hardware.efficiency
    flops_per_s = max(reached.compute * hardware.peak(dtype), again.flops_per_s)
    return dataclasses.replace(
        hardware,
        peak_flops_per_s=dict.fromkeys(hardware.peak_flops_per_s, peak),
        hbm_bytes_per_s=max(hardware.hbm_bytes_per_s, again.bytes_per_s),
        efficiency=dataclasses.replace(reached, compute=min(1.0, flops_per_s / peak)),
    )


def _dispatch_s() -> float:
    """Start of one program with a dozen arguments, and waiting for it [s]."""
    leaves = [jnp.full((8,), 1.0 + i) for i in range(12)]
    return seconds(caller(jax.jit(lambda xs: xs[0] + xs[-1]), leaves), rounds=200)


def _kernel_s() -> float:
    """One more small kernel in a program: slope over chains of products and maps [s]."""
    x = jnp.eye(32)

    def chain(length: int) -> Run:
        def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ x), None

        return caller(jax.jit(lambda x: jax.lax.scan(body, x, None, length=length)[0]), x)

    short, long = 64, 512
    return max((seconds(chain(long)) - seconds(chain(short))) / (2 * (long - short)), 1e-8)


def _bytes_per_s(platform: str) -> float:
    """In-place sum over a donated array far larger than any cache: read and written."""
    count = 2**24 if platform == "cpu" else 2**28
    add = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    return 2 * 4 * count / seconds(replacer(add, jnp.ones(count)))


def product_rate(rows: int, inner: int, columns: int, dtype: Any, device: Device) -> float:
    """FLOP/s of [rows, inner] x [inner, columns] and back, chained inside one program."""
    draw = np.random.default_rng(0)

    def matrix(*shape: int) -> jax.Array:
        return jnp.asarray(draw.standard_normal(shape, np.float32) * shape[0] ** -0.5, dtype)

    x, there, back = matrix(rows, inner), matrix(inner, columns), matrix(columns, inner)

    @partial(
        jax.jit,
        static_argnames="pairs",
        keep_unused=True,
        compiler_options=decode_options(device),
    )
    def chain(
        after: jax.Array, x: jax.Array, there: jax.Array, back: jax.Array, *, pairs: int
    ) -> jax.Array:
        del after  # what a call waits for: calls side by side would be timed as one
        return jax.lax.scan(lambda x, _: ((x @ there) @ back, None), x, None, length=pairs)[0]

    def run_s(pairs: int, calls: int) -> float:
        def run() -> None:
            last = x
            for _ in range(calls):
                last = chain(last, x, there, back, pairs=pairs)
            jax.block_until_ready(last)

        return seconds(run)

    pairs, took_s = long_enough(run_s)
    return 4.0 * rows * inner * columns * pairs / took_s


def long_enough(run_s: Callable[[int, int], float]) -> tuple[int, float]:
    """Pairs of products that take CHAIN_S or more, and their seconds.

    `run_s`: seconds of so many pairs in each of so many calls. A short chain says how many pairs one
    call needs; where MOST_PAIRS are not enough, as on a fast GPU, calls follow each other.
    """
    pairs, calls = FIRST_PAIRS, 1
    took_s = run_s(pairs, calls)
    if took_s < CHAIN_S:
        pairs = min(MOST_PAIRS, math.ceil(pairs * CHAIN_S / took_s))
        took_s = run_s(pairs, calls)
    if took_s < CHAIN_S / 2:
        calls = math.ceil(CHAIN_S / took_s)
        took_s = run_s(pairs, calls)
    return pairs * calls, took_s


def _link(devices: Sequence[Device], memory_bytes_per_s: float) -> tuple[float, float]:
    """Fixed time [s] and rate [bytes/s] of copies between two devices, or within the only one."""
    if len(devices) == 1:
        return 0.0, memory_bytes_per_s
    small, *larger = (jax.device_put(jnp.ones(n), devices[0]) for n in (16, 2**18, 2**20, 2**22))
    latency_s = seconds(caller(jax.device_put, small, devices[1]), rounds=50)
    rates = [
        array.nbytes / max(seconds(caller(jax.device_put, array, devices[1])) - latency_s, 1e-9)
        for array in larger
    ]
    return latency_s, max(rates)


def _collectives(devices: Sequence[Device]) -> dict[str, tuple[float, float]]:
    """By kind of collective over all devices: fixed time [s], and bytes per second that each device sends.

    Empty for fewer than three devices, which have no collective that copies between two would not show.
    """
    count = len(devices)
    if count < 3:
        return {}
    mesh = make_mesh(devices, data=count, fsdp=1, tensor=1)
    turns = (
        count if devices[0].platform == "cpu" else 1
    )  # simulated devices share cores: one's part
    found = {}
    for kind, (program, given, passes) in exchanges(mesh).items():
        taken = []
        for values in EXCHANGED:
            array = jax.device_put(jnp.ones(values * count), NamedSharding(mesh, given))
            taken.append(seconds(caller(program, array)) / turns)
        sent_bytes = 4.0 * passes * EXCHANGED[1] * (count - 1)
        found[kind] = taken[0], sent_bytes / max(taken[1] - taken[0], 1e-9)
    return found


def exchanges(mesh: Mesh) -> dict[str, tuple[Any, PartitionSpec, int]]:
    """Collectives over the data axis by kind: program, how its argument [D V] lies on the D devices, and how
    often each device sends its (D - 1) V values."""
    whole, parts = PartitionSpec(), PartitionSpec("data")
    kinds: dict[str, tuple[Callable[..., jax.Array], PartitionSpec, PartitionSpec, int]] = {
        "all-gather": (partial(jax.lax.all_gather, tiled=True), parts, whole, 1),
        "reduce-scatter": (partial(jax.lax.psum_scatter, tiled=True), whole, parts, 1),
        "all-reduce": (jax.lax.psum, whole, whole, 2),
    }

    def program(
        exchange: Callable[..., jax.Array], given: PartitionSpec, made: PartitionSpec
    ) -> Any:
        over_data = partial(exchange, axis_name="data")
        return jax.jit(
            jax.shard_map(over_data, mesh=mesh, in_specs=given, out_specs=made, check_vma=False)
        )

    return {
        kind: (program(exchange, given, made), given, passes)
        for kind, (exchange, given, made, passes) in kinds.items()
    }
