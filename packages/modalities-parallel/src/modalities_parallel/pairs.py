"""Messages between pairs of ranks: how long they take, and what the other's clock says."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

PAIR_BYTES = 64 << 10
PAIR_REPEATS = 20
# torch 2.13 has other names for these two, and warns of the older ones.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def pair_seconds(device: torch.device) -> list[list[float]]:
    """Seconds of 64 KiB there and back between every two ranks, the fastest of twenty; (ranks, ranks); collective.

    Disjoint pairs talk at the same time, in the rounds of a round-robin tournament: n - 1 of them, or n for an odd n.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    message = torch.ones(PAIR_BYTES // 4, device=device)
    seconds = torch.zeros(ranks, dtype=torch.float64, device=device)
    for opponents in tournament(ranks):
        dist.barrier()
        partner = opponents[rank]
        if partner != rank:
            seconds[partner] = min(_there_and_back(message, rank, partner) for _ in range(PAIR_REPEATS))
    whole = torch.empty(ranks * ranks, dtype=torch.float64, device=device)
    all_gather(whole, seconds)
    return whole.view(ranks, ranks).tolist()


def tournament(ranks: int) -> list[list[int]]:
    """Rounds in which every two of ``ranks`` meet once: a rank's opponent by rank, itself where it pauses.

    The circle method: one stays, the others go round.
    """
    players = list(range(ranks + ranks % 2))
    rounds = []
    for _ in range(len(players) - 1):
        opponents = list(range(ranks))
        for one, other in zip(players[: len(players) // 2], reversed(players), strict=False):
            if max(one, other) < ranks:
                opponents[one], opponents[other] = other, one
        rounds.append(opponents)
        players = [players[0], players[-1], *players[1:-1]]
    return rounds


def clock_offsets(device: torch.device) -> list[float]:
    """Seconds by which each rank's clock is ahead of rank 0's; collective.

    As NTP does (RFC 5905): the other's time against the middle of asking and hearing, of the fastest of twenty.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    offsets = torch.zeros(ranks, dtype=torch.float64, device=device)
    clock = torch.zeros(1, dtype=torch.float64, device=device)
    for other in range(1, ranks):
        if rank == 0:
            offsets[other] = min(_ask(clock, other) for _ in range(PAIR_REPEATS))[1]
        elif rank == other:
            for _ in range(PAIR_REPEATS):
                dist.recv(clock, 0)
                dist.send(clock.fill_(time.time()), 0)
    dist.broadcast(offsets, 0)
    return offsets.tolist()


def _ask(clock: Tensor, other: int) -> tuple[float, float]:
    """(seconds there and back, how far the other's clock is ahead)."""
    asked = time.time()
    dist.send(clock, other)
    dist.recv(clock, other)
    theirs = float(clock)
    heard = time.time()
    return heard - asked, theirs - (asked + heard) / 2


def _there_and_back(message: Tensor, rank: int, partner: int) -> float:
    started = time.perf_counter()
    if rank < partner:
        dist.send(message, partner)
        dist.recv(message, partner)
    else:
        dist.recv(message, partner)
        dist.send(message, partner)
    if message.is_cuda:
        torch.cuda.synchronize(message.device)
    return time.perf_counter() - started
