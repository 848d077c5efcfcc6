"""Seconds of one collective between GPUs of a node, and across nodes. Standard library only.

NCCL moves a message with one of three protocols, each with its own fixed time and rate, and picks
the fastest (NVIDIA/nccl src/graph/tuning.cc): LL (flag beside each 4 bytes, lowest latency), LL128
(flag per 128 bytes) and Simple (large chunks behind a barrier, highest rate). With e the bytes one
device sends and Wl the link:

    LL     = a               + e / (ll Wl)
    LL128  = a + d1          + e / (ll128 Wl)
    Simple = a + d1 + d2     + e / (simple Wl)
    seconds = (LL^-s + LL128^-s + Simple^-s)^(-1/s)      a minimum without corners

One curve per collective and number of devices; in between, linear in the number of devices. Buffer
bytes follow nccl-tests: what one device ends with (all-gather), starts with (reduce-scatter,
all-to-all) or both (all-reduce). Egress: scaling book, gpus chapter.

Across nodes: max(in the node, network) + hops, the book's bound with a share and a latency.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
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


Curves = Mapping[str, Mapping[int, ProtocolCurve]]
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


def curve_s(curve: ProtocolCurve, egress: float, link_bytes_per_s: float) -> float:
    """Seconds of the fastest protocol for `egress` bytes per device."""
    protocols = (
        curve.latency_s + egress / (curve.ll * link_bytes_per_s),
        curve.latency_s + curve.ll128_s + egress / (curve.ll128 * link_bytes_per_s),
        curve.latency_s
        + curve.ll128_s
        + curve.simple_s
        + egress / (curve.simple * link_bytes_per_s),
    )
    fastest = min(protocols)
    return fastest * sum((fastest / t) ** CORNER for t in protocols) ** (-1 / CORNER)


def _in_node_s(
    curves: Mapping[int, ProtocolCurve],
    hardware: Hardware,
    kind: Collective,
    buffer_bytes: float,
    devices: int,
    latency_scale: float,
) -> float:
    """Curve of this number of devices, or the line between the two nearest ones."""

    def at(count: int) -> float:
        c = curves[count]
        scaled = ProtocolCurve(
            latency_s=c.latency_s * latency_scale, ll128_s=c.ll128_s * latency_scale,
            simple_s=c.simple_s * latency_scale, ll=c.ll, ll128=c.ll128, simple=c.simple,
        )  # fmt: skip
        sent = egress_bytes(kind, buffer_bytes, count)
        return curve_s(scaled, sent, hardware.link_bytes_per_s)

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
