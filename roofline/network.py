"""Collectives over nodes of a few GPUs that a slower network joins. Standard library only.

A collective over n devices of which d share a node runs inside the nodes and between them. Of an
array of A bytes, a ring through all devices makes every node send A (N - 1) / N for an all-gather or
reduce-scatter over N nodes and twice that for an all-reduce; groups that run beside each other on
the same node share its egress (scaling book, gpus chapter: cost across nodes). The slower of the
two levels counts, for both work on pieces of the same array at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass

from roofline.kernel_times import Gpu
from roofline.operators.collectives import NETWORK_SHARE, Collective


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """Two levels: links inside a node (those of the GPU), and the network between nodes."""

    devices_per_node: int = 8
    node_bytes_per_s: float
    """Egress of one node, one direction."""
    hop_s: float = 10e-6
    """Added per node that a ring passes, once."""

    def __post_init__(self) -> None:
        """Refuse networks that carry nothing."""
        if self.devices_per_node < 1 or not self.node_bytes_per_s > 0:
            raise ValueError(
                f"network devices_per_node={self.devices_per_node} must be at least 1 and "
                f"node_bytes_per_s={self.node_bytes_per_s} greater than 0"
            )

    @classmethod
    def of(cls, device: Gpu) -> Network:
        """The node and network that the GPU's datasheet names.

        Raises:
            ValueError: it names none.
        """
        sheet = device.sheet
        return cls(
            devices_per_node=sheet.node_devices,
            node_bytes_per_s=sheet.node_devices * sheet.network_bytes_per_s,
        )

    @property
    def device_bytes_per_s(self) -> float:
        """One device's part of the node's egress."""
        return self.node_bytes_per_s / self.devices_per_node

    def collective_s(
        self, device: Gpu, kind: Collective, size_bytes: float, devices: int, stride: int = 1
    ) -> float:
        """Of an array of `size_bytes` over a group of `devices` [s].

        `stride`: neighbours in the group are so many devices apart, and as many groups run at once:
        the product of the axes inside this one.
        """
        if devices <= 1:
            return 0.0
        inside = min(devices, max(1, self.devices_per_node // stride))
        local = device.collective_s(kind, size_bytes, inside)
        nodes = -(-devices // inside)
        if nodes == 1:
            return local
        sent = size_bytes * (nodes - 1) / nodes * (2 if kind == "all_reduce" else 1)
        groups = min(stride, self.devices_per_node)
        rate = NETWORK_SHARE * self.node_bytes_per_s / groups
        return max(local, sent / rate) + nodes * self.hop_s

    def send_s(self, size_bytes: float) -> float:
        """One device to its peer in another node while all its neighbours send too [s]."""
        return self.hop_s + size_bytes / (NETWORK_SHARE * self.device_bytes_per_s)
