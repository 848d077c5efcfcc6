"""Seconds of one collective between GPUs of a node, and across nodes. Standard library only.

NCCL moves a message with one of three protocols, each with its own fixed time and rate, and picks
the fastest (NVIDIA/nccl src/graph/tuning.cc): LL (flag beside each 4 bytes, lowest latency), LL128
(flag per 128 bytes) and Simple (large chunks behind a barrier, highest rate). With e the bytes one
device sends and Wl the link:

    LL     = a               + e / (ll Wl)
    LL128  = a + d1          + e / (ll128 Wl)
    Simple = a + d1 + d2     + e / (simple Wl)
    seconds = (LL^-s + LL128^-s + Simple^-s)^(-1/s)      a minimum without corners

An all-to-all is a group of sends and receives, whose protocol NCCL picks by size alone: LL where the
message to one peer has at most ll_bytes, else Simple; both spread larger messages over more channels,
and LL sends a flag of 4 bytes beside each 4 (addP2pToPlan in src/enqueue.cc):

    LL     = a + min(e / (ll Wl),  spread + e / (few simple Wl / 2))
    Simple = a + d1 + min(e / (few simple Wl),  d2 + e / (simple Wl))    min without corners, as above

One curve per collective and number of devices; in between, linear in the number of devices. Buffer
bytes follow nccl-tests: what one device ends with (all-gather), starts with (reduce-scatter,
all-to-all) or both (all-reduce). Egress: scaling book, gpus chapter.

Across nodes: max(in the node, network) + hops, the book's bound with a share and a latency.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

from roofline.hardware import Hardware

Collective = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
COLLECTIVES: tuple[Collective, ...] = (
    "all_gather", "reduce_scatter", "all_reduce", "all_to_all",
)  # fmt: skip

CORNER = 16
"""s: how sharply one protocol takes over from another."""
NETWORK_SHARE = 0.74
"""Share of the network that large rings across nodes reach: 382 of 517 GB/s on four B200 nodes
(stas00/ml-engineering@744d01e network/README.md)."""
NETWORK_HOP_S = 31e-6
"""Round trip between two nodes [s] (openxla/xla sol_gpu_cost_model.cc, H100 default)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProtocolCurve:
    """One collective over one number of devices; see the module's formula."""

    latency_s: float
    """a: smallest message [s]."""
    ll128_s: float
    """d1: what LL128 starts later [s]."""
    simple_s: float
    """d2: what Simple starts later still [s]."""
    ll: float
    """Rate of egress under LL, as share of the link."""
    ll128: float
    """Rate under LL128, as share of the link."""
    simple: float
    """Rate under Simple, as share of the link; near 1 for an all-reduce inside NVLink switches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SendCurve:
    """All-to-all over one number of devices; see the module's formula."""

    latency_s: float
    """a: smallest message [s]."""
    spread_s: float
    """What LL on several channels starts later [s]."""
    simple_s: float
    """d1: what Simple starts later than the smallest message [s]."""
    full_s: float
    """d2: what Simple on all channels starts later still [s]."""
    ll: float
    """Rate of egress under LL on one channel, as share of the link."""
    simple: float
    """Rate under Simple on all channels, as share of the link."""
    few: float
    """Rate under Simple on few channels, as share of that on all; LL on as many has half."""
    ll_bytes: float
    """Largest message to one peer that goes by LL."""


Curve = ProtocolCurve | SendCurve
Curves = Mapping[str, Mapping[int, Curve]]
"""Curves of one library version by collective and number of devices."""


def egress_bytes(kind: Collective, buffer_bytes: float, devices: int) -> float:
    """Bytes that one of `devices` devices sends: A (n-1)/n, twice that for an all-reduce."""
    if kind not in COLLECTIVES:
        raise ValueError(f"unknown collective {kind!r}; use one of {', '.join(COLLECTIVES)}")
    if devices < 1:
        raise ValueError(f"devices={devices} must be at least 1")
    return (2 if kind == "all_reduce" else 1) * buffer_bytes * (devices - 1) / devices


def collective_bound_s(
    hardware: Hardware, kind: Collective, buffer_bytes: float, devices: int
) -> float:
    """The book's lower bound: egress over the link; across nodes, the slower of the two levels.

    An all-reduce of more than two devices behind NVLink switches is given the switches' own
    reduction: each device then sends the array once.
    """
    inside = min(devices, hardware.node_devices)
    sent = egress_bytes(kind, buffer_bytes, inside)
    if kind == "all_reduce" and hardware.topology == "switch" and inside > 2:
        sent = min(sent, buffer_bytes)
    seconds = sent / hardware.link_bytes_per_s
    if devices <= hardware.node_devices:
        return seconds
    return max(seconds, _network_bytes(kind, buffer_bytes, devices, hardware) / _network(hardware))


def collective_s(
    curves: Curves,
    hardware: Hardware,
    kind: Collective,
    buffer_bytes: float,
    devices: int,
    *,
    latency_scale: float = 1.0,
) -> float:
    """Seconds of one collective of `buffer_bytes` over `devices` devices; 0 for one device.

    Raises:
        ValueError: unknown collective; more devices than a node that do not fill nodes; or a card
            without a network.
    """
    if egress_bytes(kind, buffer_bytes, devices) == 0 and devices == 1:
        return 0.0
    inside = min(devices, hardware.node_devices)
    inner_bytes = buffer_bytes
    if kind == "all_to_all":
        inner_bytes *= inside / devices
    in_node_s = _in_node_s(curves[kind], hardware, kind, inner_bytes, inside, latency_scale)
    if devices <= hardware.node_devices:
        return in_node_s
    sent = _network_bytes(kind, buffer_bytes, devices, hardware)
    network_s = sent / (NETWORK_SHARE * _network(hardware))
    hops = math.ceil(math.log2(devices / hardware.node_devices))
    return max(in_node_s, network_s) + hops * NETWORK_HOP_S


def curve_s(curve: Curve, egress: float, link_bytes_per_s: float, devices: int) -> float:
    """Seconds in which each of `devices` sends `egress` bytes."""
    if isinstance(curve, SendCurve):
        return _send_s(curve, egress, link_bytes_per_s, devices)
    ll128_s = curve.latency_s + curve.ll128_s
    return _fastest_s(
        curve.latency_s + egress / (curve.ll * link_bytes_per_s),
        ll128_s + egress / (curve.ll128 * link_bytes_per_s),
        ll128_s + curve.simple_s + egress / (curve.simple * link_bytes_per_s),
    )


def _send_s(curve: SendCurve, egress: float, link_bytes_per_s: float, devices: int) -> float:
    """Seconds of an all-to-all.

    A message just above `ll_bytes` takes no less than one of that size: measured times do fall
    there now and then, but a prediction must not.
    """
    full = curve.simple * link_bytes_per_s
    by_ll = min(egress, curve.ll_bytes * (devices - 1))
    ll_s = _fastest_s(
        curve.latency_s + by_ll / (curve.ll * link_bytes_per_s),
        curve.latency_s + curve.spread_s + 2 * by_ll / (curve.few * full),
    )
    if egress == by_ll:
        return ll_s
    simple_s = curve.latency_s + curve.simple_s
    few_s = simple_s + egress / (curve.few * full)
    return max(ll_s, _fastest_s(few_s, simple_s + curve.full_s + egress / full))


def _fastest_s(*seconds: float) -> float:
    """The smallest, without corners."""
    fastest = min(seconds)
    return fastest * sum((fastest / t) ** CORNER for t in seconds) ** (-1 / CORNER)


def _in_node_s(
    curves: Mapping[int, Curve],
    hardware: Hardware,
    kind: Collective,
    buffer_bytes: float,
    devices: int,
    latency_scale: float,
) -> float:
    """Curve of this number of devices, or the line between the two nearest ones."""

    def at(count: int) -> float:
        c = curves[count]
        times = {f.name: getattr(c, f.name) for f in fields(c) if f.name.endswith("_s")}
        scaled = replace(c, **{name: latency_scale * s for name, s in times.items()})
        sent = egress_bytes(kind, buffer_bytes, count)
        return curve_s(scaled, sent, hardware.link_bytes_per_s, count)

    below = max((n for n in curves if n <= devices), default=min(curves))
    above = min((n for n in curves if n >= devices), default=max(curves))
    if below == above:
        return at(below)
    weight = (devices - below) / (above - below)
    return (1 - weight) * at(below) + weight * at(above)


def _network(hardware: Hardware) -> float:
    """Egress of one device to other nodes [bytes/s]."""
    if hardware.network_bytes_per_s <= 0:
        raise ValueError(
            f"hardware {hardware.name!r} names no network between nodes; "
            f"use at most {hardware.node_devices} devices, or set network_bytes_per_s"
        )
    return hardware.network_bytes_per_s


def _network_bytes(
    kind: Collective, buffer_bytes: float, devices: int, hardware: Hardware
) -> float:
    """Bytes that one device sends to other nodes; all devices of a node send side by side."""
    if devices % hardware.node_devices:
        raise ValueError(
            f"devices={devices} must be a multiple of the {hardware.node_devices} of a node"
        )
    if kind == "all_to_all":
        return buffer_bytes * (devices - hardware.node_devices) / devices
    nodes = devices // hardware.node_devices
    return egress_bytes(kind, buffer_bytes, nodes) / hardware.node_devices
