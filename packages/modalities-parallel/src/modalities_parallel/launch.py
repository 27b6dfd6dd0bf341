"""One command on every rank of one or more nodes, over torch's elastic agent, with the exit code of the root cause."""

from __future__ import annotations

import os
import uuid
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from modalities_core.errors import ConfigError, DistributedError, first_line
from modalities_parallel.root_cause import Failure

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousParameters

GRACE_SECONDS = 15.0
JOIN_SECONDS = 600.0
RENDEZVOUS_HINT = "name a port of node 0 that is free, the same on every node: --rendezvous node0.cluster:29500"


class Nodes(NamedTuple):
    """The nodes of a launch and where they meet.

    count: of nodes.
    rank: of this one, from 0; None lets torch number them as they come.
    host: of node 0; ``localhost`` for a single node.
    port: on it; 0 for any free one, on a single node.
    """

    count: int = 1
    rank: int | None = None
    host: str = "localhost"
    port: int = 0


def nodes(count: int = 1, rank: int | None = None, rendezvous: str | None = None) -> Nodes:
    """Check what the user says about the nodes.

    Args:
        count: of nodes.
        rank: of this one, from 0.
        rendezvous: ``HOST:PORT`` on node 0.

    Raises:
        ConfigError: the numbers contradict each other, or several nodes have no place to meet.
    """
    if count < 1:
        raise ConfigError(f"nnodes is {count}, but a launch has at least 1 node")
    if rank is not None and not 0 <= rank < count:
        raise ConfigError(f"node rank {rank} of {count} nodes: they count from 0 to {count - 1}")
    if rendezvous is None:
        if count > 1:
            raise ConfigError(f"{count} nodes have no place to meet", hint=RENDEZVOUS_HINT)
        return Nodes(rank=rank)
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"the rendezvous is {rendezvous!r}, which is not HOST:PORT", hint=RENDEZVOUS_HINT)
    # A node alone meets itself on a port that is free, whatever it was told.
    return Nodes(count, rank, host, int(port)) if count > 1 else Nodes(rank=rank)


def cores() -> int:
    """Cores that this process may use, which is fewer than the machine's under Slurm, cgroups' cpusets and taskset."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_threads(ranks_per_node: int, environment: MutableMapping[str, str] = os.environ) -> int:
    """Share the cores between the ranks of this node, by ``OMP_NUM_THREADS``, unless it is set; what it then is."""
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // ranks_per_node)))
    text = environment["OMP_NUM_THREADS"]
    return int(text) if text.isdecimal() else 1


def devices() -> int:
    """How many ranks this node is for: its GPUs, or 1 where it has none."""
    import torch

    return torch.cuda.device_count() or 1


def launch_ranks(
    command: Sequence[str],
    ranks_per_node: int,
    logs: Path,
    place: Nodes | None = None,
    grace_seconds: float = GRACE_SECONDS,
    join_seconds: float = JOIN_SECONDS,
) -> Failure | None:
    """Run ``command`` on every rank of this node and wait for all of them; on several nodes, on each of them alike.

    Each rank writes to ``rank<N>.log`` in ``logs``, rank 0 also on the terminal. SIGTERM, SIGINT, SIGUSR1 and SIGHUP
    are handed on to the ranks, and what they make of them is waited for; the third signal kills them.

    Args:
        command: program and arguments.
        ranks_per_node: processes on this node.
        logs: a folder, made if it is not there.
        place: the nodes; by default this one alone.
        grace_seconds: how long other ranks may go on after one has failed; SIGTERM follows, and SIGKILL 30 s later.
        join_seconds: how long nodes wait for each other at the start.

    Returns:
        The root cause, over all nodes, or None if all ranks ended well.

    Raises:
        ConfigError: there would be no rank.
        DistributedError: the nodes do not find each other.
    """
    if ranks_per_node < 1:
        raise ConfigError(f"nproc is {ranks_per_node}, but a launch has at least 1 process on each node")
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.rendezvous import registry
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    from modalities_parallel.agent import RankAgent

    logs.mkdir(parents=True, exist_ok=True)
    set_threads(ranks_per_node)
    place = place or Nodes()
    try:
        spec = WorkerSpec(
            role="modalities",
            local_world_size=ranks_per_node,
            rdzv_handler=registry.get_rendezvous_handler(_rendezvous(place, join_seconds)),
            entrypoint=command[0],
            args=tuple(command[1:]),
            max_restarts=0,
            monitor_interval=0.05,
            local_addr="localhost" if place.count == 1 else None,
        )
        agent = RankAgent(spec, command, logs, grace_seconds)
        agent.run()
    except (RendezvousError, RuntimeError, TimeoutError) as error:
        raise DistributedError(
            f"{place.count} node(s) did not meet at {place.host}:{place.port} within {join_seconds:g} s: "
            f"{first_line(error)}",
            hint="is the command running on every node, with the same --rendezvous, and is its port open?",
        ) from error
    return agent.cause


def _rendezvous(place: Nodes, join_seconds: float) -> RendezvousParameters:
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    # The job's number keeps two launches apart that meet at the same place.
    run_id = os.environ.get("SLURM_JOB_ID", "modalities") if place.count > 1 else uuid.uuid4().hex
    numbered = place.rank is not None and place.port != 0
    waiting = {"rank": place.rank, "timeout": int(join_seconds)} if numbered else {"join_timeout": int(join_seconds)}
    return RendezvousParameters(
        backend="static" if numbered else "c10d",
        endpoint=f"{place.host}:{place.port}",
        run_id=run_id,
        min_nodes=place.count,
        max_nodes=place.count,
        local_addr="localhost" if place.count == 1 else None,
        **waiting,
    )
