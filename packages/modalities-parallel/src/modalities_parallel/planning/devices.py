"""The figures of accelerators that a roofline needs, each with its source."""

from __future__ import annotations

from typing import NamedTuple

from modalities_core.training.peak import dense_peak

GIGA = 10**9
LINK_SHARE = 0.8
"""Of a link's bandwidth that large collectives reach: an assumption."""
NODE_HOP_SECONDS, NETWORK_HOP_SECONDS = 3.4e-6, 14e-6
"""What each step of a ring waits within and between nodes: NCCL's own tuning model, src/graph/tuning.cc, protocol
Simple."""


class Device(NamedTuple):
    """One accelerator in a node of eight.

    name: as its maker writes it, as in ``modalities_core.training.peak``.
    matmul_share: of the peak that the best matrix products reach, measured, or assumed where the source says so.
    fp32_flops: FLOP/s in float32 without TF32.
    memory: bytes.
    bandwidth: of the memory, bytes per second.
    node_link: bytes per second that one device sends to the others of its node.
    network_link: bytes per second that one device sends to other nodes.
    host_link: bytes per second to and from the host's memory, each way.
    host_bandwidth: of that memory, the share of one of eight devices.
    source: of all that.
    """

    name: str
    matmul_share: float
    fp32_flops: float
    memory: int
    bandwidth: float
    node_link: float
    network_link: float
    host_link: float
    host_bandwidth: float
    source: str

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s by the data sheet, what MFU is counted against."""
        found = dense_peak(self.name)
        assert found is not None, f"{self.name} is in modalities_core.training.peak"
        return found


HOST = "PCIe 5.0 x16; DDR5-4800 on sixteen channels for eight devices"
MEASURED = "matmul share: ml-engineering by S. Bekman, table of maximum achievable matmul FLOPS"
DEVICES: dict[str, Device] = {
    "a100": Device(
        "A100", 0.869, 19.5e12, 80 * GIGA, 2.039e12, 300e9, 25e9, 32e9, 51e9,
        f"NVIDIA A100 80GB SXM data sheet; DGX A100: one 200 Gb/s HDR port per GPU, PCIe 4.0 x16, DDR4-3200 on sixteen "
        f"channels; {MEASURED}, 271.2 of 312",
    ),
    "h100": Device(
        "H100", 0.803, 67e12, 80 * GIGA, 3.35e12, 450e9, 50e9, 64e9, 77e9,
        f"NVIDIA H100 SXM data sheet; DGX H100: one 400 Gb/s NDR port per GPU; {HOST}; {MEASURED}, 794.5 of 989",
    ),
    "h200": Device(
        "H200", 0.803, 67e12, 141 * GIGA, 4.8e12, 450e9, 50e9, 64e9, 77e9,
        f"NVIDIA H200 SXM data sheet; one 400 Gb/s NDR port per GPU; {HOST}; {MEASURED}, 794.5 of 989 as H100",
    ),
    "b200": Device(
        "B200", 0.8, 75e12, 180 * GIGA, 8e12, 900e9, 50e9, 64e9, 77e9,
        f"NVIDIA DGX B200 data sheet, an eighth each; one 400 Gb/s port per GPU; {HOST} assumed; matmul share assumed "
        "as H100",
    ),
    "mi300x": Device(
        "MI300X", 0.6, 163.4e12, 192 * GIGA, 5.3e12, 448e9, 50e9, 64e9, 77e9,
        f"AMD Instinct MI300X data sheet: seven links of 64 GB/s each way; 400 Gb/s port per GPU; {HOST} assumed; "
        "matmul share assumed",
    ),
}  # fmt: skip
DEVICES_PER_NODE = 8


def gather_seconds(size: float, ranks: int, device: Device, apart: int = 1) -> float:
    """How long an all-gather or a reduce-scatter of ``size`` bytes in all takes, by rings.

    Between nodes all devices of a node that take part send at once, so that a ring gets the bandwidth of all of them,
    but no more than devices send within it.

    Args:
        size: bytes of the whole, gathered.
        ranks: that take part.
        device: of which there are eight in a node.
        apart: how far two neighbours of the ring are from each other: 1 where they are numbered one after the other.
    """
    if ranks == 1:
        return 0.0
    together, nodes = _spread(ranks, apart)
    waiting = (ranks - nodes) * NODE_HOP_SECONDS + (nodes - 1) * NETWORK_HOP_SECONDS
    return size * (ranks - 1) / ranks / _speed(together, nodes, device) + waiting


def exchange_seconds(size: float, ranks: int, device: Device, apart: int = 1) -> float:
    """How long an all-to-all takes in which each rank has ``size`` bytes and keeps a share of them for itself.

    Args:
        size: bytes of each rank.
        ranks: that take part.
        device: of which there are eight in a node.
        apart: as for ``gather_seconds``.
    """
    if ranks == 1:
        return 0.0
    together, nodes = _spread(ranks, apart)
    hop = NODE_HOP_SECONDS if nodes == 1 else NETWORK_HOP_SECONDS
    within = size * (together - 1) / ranks / (LINK_SHARE * device.node_link)
    between = size * (ranks - together) / ranks / (LINK_SHARE * device.network_link)
    return max(within, between) + (ranks - 1) * hop


def send_seconds(size: float, apart: int, device: Device) -> float:
    """How long a message of ``size`` bytes takes to a rank that is so far ``apart``."""
    within = apart < DEVICES_PER_NODE
    link, hop = (device.node_link, NODE_HOP_SECONDS) if within else (device.network_link, NETWORK_HOP_SECONDS)
    return size / (LINK_SHARE * link) + hop


def replicas_seconds(size: float, replicas: int, shards: int, device: Device) -> float:
    """How long an all-reduce of ``size`` bytes of each rank takes between the groups that hold a whole model.

    Args:
        size: bytes on each rank.
        replicas: groups.
        shards: neighbouring ranks of each group.
        device: of which there are eight in a node.
    """
    if replicas == 1:
        return 0.0
    within = replicas * shards <= DEVICES_PER_NODE
    link, hop = (device.node_link, NODE_HOP_SECONDS) if within else (device.network_link, NETWORK_HOP_SECONDS)
    if not within and shards < DEVICES_PER_NODE:
        # Groups that share a node reduce among themselves first, so the node's ports carry the sum only.
        link *= DEVICES_PER_NODE / shards
    return 2 * size * (replicas - 1) / replicas / (LINK_SHARE * min(link, device.node_link)) + 2 * (replicas - 1) * hop


def _spread(ranks: int, apart: int) -> tuple[int, int]:
    """How many of the ranks are in one node, and in how many nodes they are."""
    together = min(ranks, max(1, DEVICES_PER_NODE // apart))
    return together, -(-ranks // together)


def _speed(together: int, nodes: int, device: Device) -> float:
    """Bytes per second of a ring."""
    return LINK_SHARE * (device.node_link if nodes == 1 else min(device.node_link, device.network_link * together))
