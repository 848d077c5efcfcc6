"""Which links a program's collectives use when its devices fill several nodes, and what pipeline
stages add. Standard library only.

Axes from the inside out: tensor, fsdp, data, pipeline; experts are dealt to the innermost devices that
rows are split over. Neighbours on an axis are as many devices apart as the axes inside it have together
(the stride), so the axis reaches over M nodes with d of its n devices in each. Of an array of A bytes a
node then sends A (M - 1) / M for an all-gather or reduce-scatter and twice that for an all-reduce; of an
all-to-all, in which each of its d devices has an array of its own, d A (n - d) / n. Groups that run beside
each other in a node share its egress. The slower level counts (scaling book, gpus chapter, cost across nodes):

    T = k A max((d - 1) / (d W_link), groups (M - 1) / (M W_node)),   k = 2 for an all-reduce, else 1

A pipeline of p stages works off m micro-batches in m + p - 1 turns (arXiv:1811.06965, section 2.3;
the one-forward-one-backward order of arXiv:2104.04473 has the same number); each turn sends an
activation on, and in training its gradient back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from roofline.hardware import Hardware
from roofline.kernels import Layout, ceil_div
from roofline.phases import PhaseCost
from roofline.traffic import Axis, Collective

FULL_TURNS = 4
"""Micro-batches per stage where nobody says: the stages then idle for a fifth of the time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Devices by axis, and the nodes they fill."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    pipeline: int = 1
    nodes: int = 1

    def __post_init__(self) -> None:
        """Refuse sizes below 1."""
        for name in ("data", "fsdp", "tensor", "pipeline", "nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def devices(self) -> int:
        """All of them."""
        return self.data * self.fsdp * self.tensor * self.pipeline

    @property
    def per_node(self) -> int:
        """Devices of the fullest node."""
        return ceil_div(self.devices, self.nodes)

    def stride(self, axis: Axis) -> int:
        """Devices between neighbours on the axis."""
        rows = {"expert": self.tensor, "fsdp": self.tensor, "data": self.tensor * self.fsdp}
        return 1 if axis == "tensor" else rows[axis]

    def check(self, hardware: Hardware) -> None:
        """Raises: ValueError if nodes are filled unevenly, a node holds fewer devices, or nobody knows the
        network."""
        if self.devices % self.nodes:
            allowed = [n for n in range(1, self.devices + 1) if self.devices % n == 0]
            near = sorted(allowed, key=lambda n: abs(n - self.nodes))[:2]
            raise ValueError(
                f"nodes={self.nodes} do not share {self.devices} devices evenly; use "
                f"{' or '.join(str(n) for n in sorted(near))}"
            )
        if self.per_node > hardware.node_devices:
            least = ceil_div(self.devices, hardware.node_devices)
            raise ValueError(
                f"{self.per_node} devices on a node, but a node of {hardware.name} has "
                f"{hardware.node_devices}; use --nodes {least}"
            )
        if self.nodes > 1 and not hardware.network_bytes_per_s:
            raise ValueError(
                f"{self.nodes} nodes of {hardware.name}, whose network is not known; use --nodes 1, "
                f"at most {hardware.node_devices} devices, or hardware with a network such as h200"
            )

    def collective_s(self, found: Collective, hardware: Hardware) -> float:
        """Seconds of all these collectives, without their fixed times."""
        stride = self.stride(found.axis)
        inside = min(found.devices, max(1, self.per_node // stride))
        spanned = ceil_div(found.devices, inside)
        sent = found.array_bytes * found.count * (2 if found.kind == "all-reduce" else 1)
        local_s = sent * (inside - 1) / inside / hardware.link_bytes_per_s
        if spanned == 1:
            return local_s
        groups = min(stride, self.per_node)
        egress = self.per_node * hardware.network_bytes_per_s
        if found.kind == "all-to-all":  # every device has an array of its own
            leaving = sent * (found.devices - inside) / found.devices
            return max(local_s, groups * inside * leaving / egress)
        return max(local_s, sent * groups * (spanned - 1) / spanned / egress)

    def link_s(
        self, collectives: Sequence[Collective], rest_bytes: float, hardware: Hardware
    ) -> float:
        """Seconds of collectives, and of `rest_bytes` that a device sends anywhere, at the peaks."""
        named = sum(self.collective_s(found, hardware) for found in collectives)
        return named + rest_bytes / self._anywhere(hardware)

    def hop_s(self, size_bytes: float, hardware: Hardware) -> float:
        """Of so many bytes from a stage's device to its peer in the next stage."""
        apart = self.per_node <= self.tensor * self.fsdp * self.data
        rate = hardware.network_bytes_per_s if self.nodes > 1 and apart else (
            hardware.link_bytes_per_s
        )  # fmt: skip
        return hardware.link_latency_s + size_bytes / rate

    def _anywhere(self, hardware: Hardware) -> float:
        """Rate of one device to any other [bytes/s]."""
        slow = hardware.network_bytes_per_s if self.nodes > 1 else hardware.link_bytes_per_s
        return min(slow, hardware.link_bytes_per_s)


def placed(layout: Layout, hardware: Hardware) -> Placement:
    """The layout on as few nodes as hold it."""
    return Placement(
        data=layout.data, fsdp=layout.fsdp, tensor=layout.tensor,
        nodes=ceil_div(layout.devices, hardware.node_devices),
    )  # fmt: skip


def check_network(hardware: Hardware, devices: int) -> None:
    """Raises: ValueError: more devices than a node has, and no known network between nodes."""
    if devices > hardware.node_devices and not hardware.network_bytes_per_s:
        raise ValueError(
            f"{devices} devices span nodes of {hardware.node_devices} x {hardware.name}, whose "
            f"network is not known; use at most {hardware.node_devices} devices"
        )


def linked(
    hardware: Hardware, placement: Placement, work: PhaseCost, found: Sequence[Collective]
) -> Hardware:
    """The hardware with the link rate that the work sees over its nodes: its collectives over mesh axes
    are `found`, the rest goes to any device."""
    if placement.nodes == 1 or not work.link_bytes:
        return hardware
    rest_bytes = max(0.0, work.link_bytes - sum(one.link_bytes for one in found))
    seconds = placement.link_s(found, rest_bytes, hardware)
    return dataclasses.replace(hardware, link_bytes_per_s=work.link_bytes / seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Turns:
    """How a pipeline works off one batch."""

    stages: int
    microbatches: int

    @property
    def turns(self) -> int:
        """Micro-batches that the busiest stage has time for."""
        return self.microbatches + self.stages - 1

    @property
    def idle(self) -> float:
        """Share of the turns in which a stage has nothing to do."""
        return (self.stages - 1) / self.turns


def turns_of(rows: int, stages: int, wanted: int) -> Turns:
    """`rows` rows per replica in `wanted` micro-batches; 0: FULL_TURNS per stage, or one for each row.

    Raises:
        ValueError: more micro-batches than rows.
    """
    if wanted > rows:
        raise ValueError(
            f"microbatches={wanted}, but a replica has {rows} rows; use at most {rows}"
        )
    usual = 1 if stages == 1 else min(rows, FULL_TURNS * stages)
    return Turns(stages=stages, microbatches=wanted or usual)
