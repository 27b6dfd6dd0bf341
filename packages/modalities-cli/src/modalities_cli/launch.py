"""``modalities launch``: a run on several ranks."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from modalities_cli.slurm import Job
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
@click.option("--node-rank", type=int, help="Number of this node, from 0.  [default: Slurm's, or as they come]")
@click.option("--rendezvous", metavar="HOST:PORT", help="Where several nodes meet: a free port on node 0.")
@click.option("--grace", type=float, default=15.0, show_default=True, help="Seconds ranks go on after one has failed.")
@click.option("--folder", type=click.Path(path_type=Path), help="The run's folder.  [default: runs/<name of CONFIG>]")
@click.option("--fresh", is_flag=True, help="Start over; an earlier run in the folder is moved aside, not deleted.")
@click.option("--slurm", is_flag=True, help="Start nothing; write a batch file for sbatch into the run's folder.")
@click.option("--submit", is_flag=True, help="The same, and hand it to sbatch.")
@click.option("--partition", help="Of the cluster, for --slurm.")
@click.option("--time", "time_limit", help="For --slurm, as sbatch takes it: 12:00:00.")
@click.option("--account", help="For --slurm.")
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
    slurm: bool,
    submit: bool,
    partition: str | None,
    time_limit: str | None,
    account: str | None,
) -> int:
    """Train what CONFIG describes on several ranks, on one node or more.

    Each rank is one `modalities run` and writes to logs/rank<N>.log in the run's folder; rank 0 also writes here. The
    exit code is that of the rank that failed first, and the last lines name it. SIGTERM and Ctrl-C reach every rank,
    which saves a checkpoint first. OMP_NUM_THREADS is this node's share of cores per rank, unless it is set.

    \b
    Example:
        modalities launch --nproc 2 config_files/config_lorem_ipsum.yaml settings.steps=20
        modalities launch --nproc 8 --nnodes 4 --slurm --partition gpu --time 12:00:00 config.yaml
        modalities launch --nnodes 4 --node-rank 0 --rendezvous node0:29500 config.yaml    # on node 0, and so on
    """
    from modalities_cli.slurm import Job
    from modalities_cli.wiring import checked_graph
    from modalities_core.errors import ConfigError
    from modalities_parallel.launch import launch_ranks, nodes

    folder = folder or Path("runs") / config.stem
    if slurm or submit:
        checked_graph(config, overrides)
        if fresh:
            raise ConfigError("a job that is queued again would start over each time", hint="leave out --fresh")
        job = Job(nnodes, _ranks_of_job(nproc), partition, time_limit, account)
        return _batch(job, ["--grace", str(grace)], config, overrides, folder, submit)
    if nnodes > 1 and node_rank is None and os.environ.get("SLURM_NODEID", "").isdecimal():
        node_rank = int(os.environ["SLURM_NODEID"])
    place = nodes(nnodes, node_rank, rendezvous)
    ranks = _ranks(nproc)
    # A mistake in the document is said once, before any process starts.
    checked_graph(config, overrides)
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


def _batch(
    job: Job, options: list[str], config: Path, overrides: tuple[str, ...], folder: Path, submitting: bool
) -> int:
    """Write the batch file, and hand it over if asked to."""
    from modalities_cli.slurm import batch_file, submit
    from modalities_core.files import write_text

    command = [sys.executable, "-P", "-m", "modalities", "launch", *options]
    text = batch_file(job, command, config, overrides, folder)
    # Slurm opens its log before anything of ours runs.
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    path = folder / "launch.sbatch"
    write_text(path, text)
    click.echo(
        f"submitted job {submit(path)}: {path}" if submitting else f"wrote {path}; submit it with: sbatch {path}"
    )
    return 0


def _ranks_of_job(nproc: str) -> int:
    from modalities_core.errors import ConfigError

    if nproc == "auto":
        raise ConfigError("--slurm has to know how many GPUs a node gives", hint="--nproc 8, for example")
    return _ranks(nproc)


def _ranks(nproc: str) -> int:
    from modalities_core.errors import ConfigError
    from modalities_parallel.launch import devices

    if nproc == "auto":
        return devices()
    if not nproc.isdecimal() or int(nproc) < 1:
        raise ConfigError(f"--nproc is {nproc!r}", hint="a number of processes from 1 on, or auto: one per GPU")
    return int(nproc)
