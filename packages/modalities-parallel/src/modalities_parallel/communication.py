"""How fast the ranks of a mesh reach each other, and which of them is slow.

Bandwidth is that of the bus, as NVIDIA's nccl-tests define it (their PERFORMANCE.md): bytes per second times
2 (n - 1) / n for an all-reduce and (n - 1) / n for the others, so that it compares with what one link can do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from modalities_parallel.mesh import CONTEXT, EXPERTS, SHARD, Meshes
from modalities_parallel.pairs import all_gather, clock_offsets, pair_seconds, reduce_scatter

CPU_SIZES = (4096, 1 << 20, 16 << 20)
GPU_SIZES = (4096, 1 << 20, 64 << 20, 512 << 20)
SLOWER_COMPUTE = 1.25
SLOWER_PAIRS = 2.0
NOISE_SECONDS = 5e-4
"""Messages that are later by less may have waited for a core; with gloo all ranks share those of the node."""
CLOCK_SECONDS = 1.0
MATRIX = {"cpu": 512, "cuda": 8192}


class Collective(NamedTuple):
    """One operation on one axis of the mesh at one size.

    axis: of the mesh; ``dp_shard x cp``, which weights are sharded over; or ``all``.
    ranks: in each group along it; all groups work at the same time, as in training.
    operation: all_reduce, all_gather or reduce_scatter; along cp and ep also all_to_all.
    bytes: of the whole tensor.
    seconds: of one operation, on the slowest rank.
    bus_bytes_per_second: see the head of this module.
    """

    axis: str
    ranks: int
    operation: str
    bytes: int
    seconds: float
    bus_bytes_per_second: float


class Slow(NamedTuple):
    """A rank that is slower than the others.

    what: compute, or messages.
    times: slower than the median rank.
    """

    rank: int
    what: str
    times: float


class CommunicationReport(NamedTuple):
    """What the test found; the same on every rank.

    compute_seconds: of one matrix product, by rank.
    pair_seconds: [i][j] of 64 KiB from i to j and back, 0 where i is j.
    clock_offsets: seconds that each rank's clock is ahead of rank 0's.
    """

    collectives: list[Collective]
    compute_seconds: list[float]
    pair_seconds: list[list[float]]
    clock_offsets: list[float]
    slow: list[Slow]

    def wrong_clocks(self) -> list[int]:
        """Ranks whose clock differs from rank 0's by more than a second."""
        return [rank for rank, offset in enumerate(self.clock_offsets) if abs(offset) > CLOCK_SECONDS]


def communication_test(meshes: Meshes, device: torch.device, sizes: Sequence[int] | None = None) -> CommunicationReport:
    """Time the collectives of every axis, a product on every rank, and every pair; collective, seconds on a few ranks.

    Args:
        meshes: of the world.
        device: of this rank.
        sizes: bytes of the tensors, 4 KiB to 16 MiB on the CPU and to 512 MiB on a GPU by default.
    """
    sizes = sizes or (GPU_SIZES if device.type == "cuda" else CPU_SIZES)
    collectives = [
        timed_collective(axis, group, operation, size, device)
        for axis, group in groups_of(meshes).items()
        for operation in (*REDUCTIONS, *(EXCHANGES if axis in (CONTEXT, EXPERTS) else ()))
        for size in sizes
    ]
    compute = gathered(product_seconds(device), device)
    pairs, offsets = pair_seconds(device), clock_offsets(device)
    return CommunicationReport(collectives, compute, pairs, offsets, slow_ranks(compute, pairs))


def groups_of(meshes: Meshes) -> dict[str, Any]:
    """The group of this rank along each axis that has several ranks, and all ranks where there are several axes."""
    names = meshes.whole.mesh_dim_names or ()
    groups: dict[str, Any] = {name: meshes.whole.get_group(name) for name in names if meshes.whole[name].size() > 1}
    if meshes.degrees.cp > 1 and meshes.degrees.dp_shard > 1:
        groups[f"{SHARD} x {CONTEXT}"] = meshes.weights.get_group(SHARD)
    if meshes.experts is not None:
        groups[EXPERTS] = meshes.experts.get_group(EXPERTS)
    if len(groups) > 1:
        groups["all"] = dist.group.WORLD
    return groups


def slow_ranks(compute: Sequence[float], pairs: Sequence[Sequence[float]]) -> list[Slow]:
    """Ranks whose product takes 1.25 times the median, or whose messages do twice the median and 0.5 ms more.

    A rank's messages are judged by its fastest partner: a slow rank makes all of its pairs slow, but only one pair of
    each other rank.
    """
    found = [Slow(rank, "compute", times) for rank, times in enumerate(_times(compute)) if times >= SLOWER_COMPUTE]
    if len(pairs) > 2:
        best = [min(seconds for other, seconds in enumerate(row) if other != rank) for rank, row in enumerate(pairs)]
        late = [seconds - statistics.median_low(best) > NOISE_SECONDS for seconds in best]
        ratios = enumerate(_times(best))
        found += [Slow(rank, "messages", times) for rank, times in ratios if times >= SLOWER_PAIRS and late[rank]]
    return found


def _times(values: Sequence[float]) -> list[float]:
    # With two ranks the median would be halfway to the slow one.
    typical = statistics.median_low(values)
    return [value / typical for value in values]


def timed_collective(axis: str, group: Any, operation: str, size: int, device: torch.device) -> Collective:
    """Time one operation on tensors of about ``size`` bytes along ``group``; collective over all ranks."""
    ranks = dist.get_world_size(group)
    run, factor = OPERATIONS[operation](group, ranks, max(1, size // 4 // ranks), device)
    real = max(1, size // 4 // ranks) * ranks * 4
    seconds = max(gathered(seconds_of(run, device, repeats=20 if size < 1 << 20 else 5), device))
    return Collective(axis, ranks, operation, real, seconds, factor * real / seconds)


def _all_reduce(group: Any, ranks: int, share: int, device: torch.device) -> tuple[Callable[[], object], float]:
    whole = torch.ones(share * ranks, device=device)
    # The largest instead of the sum: repeated sums would overflow.
    return lambda: dist.all_reduce(whole, dist.ReduceOp.MAX, group=group), 2 * (ranks - 1) / ranks


def _all_gather(group: Any, ranks: int, share: int, device: torch.device) -> tuple[Callable[[], object], float]:
    whole, part = torch.empty(share * ranks, device=device), torch.ones(share, device=device)
    return lambda: all_gather(whole, part, group=group), (ranks - 1) / ranks


def _reduce_scatter(group: Any, ranks: int, share: int, device: torch.device) -> tuple[Callable[[], object], float]:
    whole, part = torch.ones(share * ranks, device=device), torch.empty(share, device=device)
    return lambda: reduce_scatter(part, whole, group=group), (ranks - 1) / ranks


def _all_to_all(group: Any, ranks: int, share: int, device: torch.device) -> tuple[Callable[[], object], float]:
    sent, received = torch.ones(share * ranks, device=device), torch.empty(share * ranks, device=device)
    return lambda: dist.all_to_all_single(received, sent, group=group), (ranks - 1) / ranks


REDUCTIONS = {"all_reduce": _all_reduce, "all_gather": _all_gather, "reduce_scatter": _reduce_scatter}
EXCHANGES = {"all_to_all": _all_to_all}
OPERATIONS = REDUCTIONS | EXCHANGES


def product_seconds(device: torch.device) -> float:
    """Seconds of one square matrix product, the fastest of several: what this rank can do when nobody disturbs it."""
    size = MATRIX.get(device.type, 512)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left = torch.ones(size, size, device=device, dtype=dtype)
    return min(seconds_of(lambda: left @ left, device, repeats=1, together=False) for _ in range(30))


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int, together: bool = True) -> float:
    """Mean seconds of ``run``, after a warm-up; all ranks begin ``together``, which makes it collective."""
    run()
    _wait(device)
    if together:
        dist.barrier()
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait(device)
    return (time.perf_counter() - started) / repeats


def gathered(value: float, device: torch.device) -> list[float]:
    """The values of all ranks; collective."""
    values = torch.empty(dist.get_world_size(), dtype=torch.float64, device=device)
    own: Tensor = torch.tensor([value], dtype=torch.float64, device=device)
    all_gather(values, own)
    return values.tolist()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
