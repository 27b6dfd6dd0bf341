"""``modalities launch``: a run on several ranks."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from modalities_parallel.root_cause import Failure

MEANINGS = {
    1: "a bug", 2: "usage or configuration", 3: "input data", 4: "checkpoint", 5: "out of disk or memory",
    6: "lost other ranks", 7: "not finite", 75: "preempted", 130: "interrupted",
}  # fmt: skip


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--nproc", default="auto", show_default=True, help="Ranks on each node; auto: one per GPU.")
@click.option("--nnodes", type=int, default=1, show_default=True, help="Nodes; the command runs on each of them.")
@click.option("--node-rank", type=int, help="Number of this node, from 0.  [default: as they come]")
@click.option("--rendezvous", metavar="HOST:PORT", help="Where several nodes meet: a free port on node 0.")
@click.option("--grace", type=float, default=15.0, show_default=True, help="Seconds ranks go on after one has failed.")
@click.option("--folder", type=click.Path(path_type=Path), help="The run's folder.  [default: runs/<name of CONFIG>]")
@click.option("--fresh", is_flag=True, help="Start over; an earlier run in the folder is moved aside, not deleted.")
def launch(
    config: Path,
    overrides: tuple[str, ...],
    nproc: str,
    nnodes: int,
    node_rank: int | None,
    rendezvous: str | None,
    grace: float,
    folder: Path | None,
    fresh: bool,
) -> int:
    """Train what CONFIG describes on several ranks, on one node or more.

    Each rank is one `modalities run` and writes to logs/rank<N>.log in the run's folder; rank 0 also writes here. The
    exit code is that of the rank that failed first, and the last lines name it. SIGTERM and Ctrl-C reach every rank,
    which saves a checkpoint first. OMP_NUM_THREADS is this node's share of cores per rank, unless it is set.

    \b
    Example:
        modalities launch --nproc 2 config_files/config_lorem_ipsum.yaml settings.steps=20
        modalities launch --nnodes 4 --node-rank 0 --rendezvous node0:29500 config.yaml    # on node 0, and so on
    """
    from modalities_cli.wiring import checked_graph
    from modalities_parallel.launch import launch_ranks, nodes

    place = nodes(nnodes, node_rank, rendezvous)
    ranks = _ranks(nproc)
    # A mistake in the document is said once, before any process starts.
    checked_graph(config, overrides)
    folder = folder or Path("runs") / config.stem
    # -P: what lies in the working folder must not hide an installed package, as for the command itself.
    command = [sys.executable, "-P", "-m", "modalities", "run", str(config), *overrides, "--folder", str(folder)]
    cause = launch_ranks([*command, *(["--fresh"] if fresh else [])], ranks, folder / "logs", place, grace)
    if cause is None:
        return 0
    click.echo(report(cause), err=True)
    return cause.process_code


def report(cause: Failure) -> str:
    """What is printed last: which rank failed first, how, what it said, and where its log is."""
    from modalities_parallel.root_cause import how_it_ended

    meaning = MEANINGS.get(cause.exit_code)
    how = how_it_ended(cause.exit_code) + (f": {meaning}" if meaning else "")
    lines = [f"root cause: rank {cause.rank} on {cause.host}, {how}"]
    # Rank 0 of this node has said it on the terminal already.
    if cause.rank != 0 or cause.host != platform.node():
        lines += [f"  {line}" for line in cause.message.splitlines()]
    return "\n".join([*lines, f"  its log: {cause.log}"])


def _ranks(nproc: str) -> int:
    from modalities_core.errors import ConfigError
    from modalities_parallel.launch import devices

    if nproc == "auto":
        return devices()
    if not nproc.isdecimal() or int(nproc) < 1:
        raise ConfigError(f"--nproc is {nproc!r}", hint="a number of processes from 1 on, or auto: one per GPU")
    return int(nproc)
