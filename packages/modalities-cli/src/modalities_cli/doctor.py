"""``modalities doctor``: is this machine fit for a run, and do its ranks reach each other."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from modalities_cli.machine import Finding
    from modalities_parallel.communication import CommunicationReport

GIB = 1 << 30


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--comm", is_flag=True, help="Test the communication between ranks instead.")
@click.option("--nproc", type=int, help="Ranks that --comm starts here; without it, those of torchrun.")
@click.option("--nnodes", type=int, default=1, show_default=True, help="Nodes; the command runs on each of them.")
@click.option("--node-rank", type=int, help="Number of this node, from 0.  [default: as they come]")
@click.option("--rendezvous", metavar="HOST:PORT", help="Where several nodes meet: a free port on node 0.")
@click.option("--dp-replicate", type=int, default=1, show_default=True, help="Of the mesh, as in world.auto.")
@click.option("--cp", type=int, default=1, show_default=True, help="Likewise, context parallelism.")
@click.option("--tp", type=int, default=1, show_default=True, help="Likewise, tensor parallelism.")
@click.option("--pp", type=int, default=1, show_default=True, help="Likewise, pipeline parallelism.")
@click.option("--ep", type=int, default=1, show_default=True, help="Likewise, expert parallelism.")
@click.option("--config", type=click.Path(path_type=Path), help="Take the mesh of this run's configuration instead.")
def doctor(
    as_json: bool,
    comm: bool,
    nproc: int | None,
    nnodes: int,
    node_rank: int | None,
    rendezvous: str | None,
    config: Path | None,
    **mesh: int,
) -> int | None:
    """Tell what this machine has and what stands in the way of a run.

    Versions, extras, GPUs, CPU, memory, shared memory, limits, clock, disk and network, and findings with advice.
    With --comm: bandwidth and latency of the collectives on each axis of the mesh, clocks, and which rank is slow.

    \b
    Example:
        modalities doctor
        modalities doctor --comm --nproc 4 --dp-replicate 2
        modalities doctor --comm --nproc 8 --config config_files/llama_1b_fsdp.yaml
    """
    if not comm:
        _machine(as_json)
        return None
    if "RANK" in os.environ:
        _communicate(as_json, config, mesh)
        return None
    again = [f"--{name.replace('_', '-')}={degree}" for name, degree in mesh.items()]
    again += ["--json"] * as_json + ([] if config is None else [f"--config={config}"])
    return _launch(again, nproc, nnodes, node_rank, rendezvous)


def _machine(as_json: bool) -> None:
    from modalities_cli.machine import facts, findings

    known = facts(Path.cwd())
    found = findings(known)
    if as_json:
        click.echo(json.dumps(known | {"findings": [finding._asdict() for finding in found]}, indent=2))
    else:
        click.echo("\n".join(lines(known)))
        click.echo("\n".join(_said(found)))


def lines(known: dict[str, Any]) -> Iterator[str]:
    """The facts as a person reads them."""
    for name, value in known["versions"].items():
        yield f"{name:>20}  {value or 'none'}"
    for extra in known["extras"]:
        state = f"missing {', '.join(extra['missing'])}: {extra['pip']}" if extra["missing"] else "present"
        yield f"{extra['extra']:>34}  {state}"
    for number, device in enumerate(known["devices"]):
        clock = device["clock_mhz"]
        shown = f", {clock['now']} of {clock['most']} MHz" if clock else ""
        capability = f"compute capability {device['compute_capability']}, bf16 {_yes(device['bf16'])}"
        yield f"{f'GPU {number}':>20}  {device['name']}, {_gib(device['memory'])}, {capability}{shown}"
    if not known["devices"]:
        yield f"{'GPU':>20}  none"
    cpu, memory, disk, network = known["cpu"], known["memory"], known["disk"], known["network"]
    yield f"{'CPU':>20}  {cpu['model']}"
    yield f"{'cores':>20}  {cpu['usable_cores']} usable of {cpu['cores']}, torch takes {cpu['torch_threads']}"
    yield f"{'AVX512-BF16, AMX':>20}  {_yes(cpu['avx512_bf16'])}, {_yes(cpu['amx_bf16'])}"
    yield f"{'memory':>20}  {_gib(memory['available'])} available of {_gib(memory['total'])}"
    if memory["container_limit"] is not None:
        yield f"{'container limit':>20}  {_gib(memory['container_limit'])}"
    yield f"{'shared memory':>20}  {_gib(memory['shared_free'])} free of {_gib(memory['shared'])}"
    limit = known["limits"]["open_files"]
    yield f"{'open files':>20}  " + (f"{limit['soft']}, at most {limit['hard']}" if limit else "unknown")
    yield f"{'clock':>20}  {known['clock']['utc']}, kept in time: {_yes(known['clock']['synchronised'])}"
    yield f"{'disk':>20}  {_gib(disk['free'])} free of {_gib(disk['total'])} in {disk['folder']}"
    interfaces = ", ".join(f"{one['name']} ({one['state']})" for one in network["interfaces"])
    yield f"{'network':>20}  {interfaces or 'none'}; InfiniBand: {', '.join(network['infiniband']) or 'none'}"
    yield f"{'host':>20}  {network['host']}, {network['address'] or 'which resolves to nothing'}"


def _said(found: list[Finding]) -> Iterator[str]:
    yield "" if found else "\nno findings"
    for finding in found:
        yield f"finding: {finding.what}\n  {finding.advice}"


def _launch(options: list[str], nproc: int | None, nnodes: int, node_rank: int | None, rendezvous: str | None) -> int:
    """Start the ranks that do the test, with these options of the command."""
    from modalities_cli.launch import report
    from modalities_parallel.launch import devices, launch_ranks, nodes

    place, ranks = nodes(nnodes, node_rank, rendezvous), devices() if nproc is None else nproc
    command = [sys.executable, "-P", "-m", "modalities", "doctor", "--comm", *options]
    with tempfile.TemporaryDirectory(prefix="modalities-doctor-") as logs:
        cause = launch_ranks(command, ranks, Path(logs), place)
        if cause is None:
            return 0
        click.echo(Path(cause.log).read_text(errors="replace") if Path(cause.log).exists() else "", err=True)
    click.echo(report(cause), err=True)
    return cause.process_code


def _communicate(as_json: bool, config: Path | None, mesh: dict[str, int]) -> None:
    """The part of one rank."""
    from modalities_cli.wiring import checked_graph
    from modalities_core.errors import ConfigError
    from modalities_parallel.communication import communication_test
    from modalities_parallel.distributed import Distributed
    from modalities_parallel.world import auto

    world = auto(**mesh) if config is None else checked_graph(config, ()).build("trainer.world")
    try:
        if not isinstance(world, Distributed) or world.size < 2:
            raise ConfigError("one rank has nobody to talk to", hint="modalities doctor --comm --nproc 2")
        found = communication_test(world.meshes, world.device)
        if world.rank == 0:
            click.echo(json.dumps(as_values(found), indent=2) if as_json else "\n".join(comm_lines(found)))
    finally:
        world.close()


def as_values(found: CommunicationReport) -> dict[str, Any]:
    """The report as JSON values."""
    rows = {"collectives": [row._asdict() for row in found.collectives], "slow": [row._asdict() for row in found.slow]}
    return found._asdict() | rows | {"wrong_clocks": found.wrong_clocks()}


def comm_lines(found: CommunicationReport) -> Iterator[str]:
    """The report as a person reads it."""
    yield f"{'axis':<14}{'ranks':>6}  {'operation':<15}{'size':>10}{'time':>12}{'bus bandwidth':>16}"
    for row in found.collectives:
        size = f"{row.bytes / 1024:.0f} KiB" if row.bytes < 1 << 20 else f"{row.bytes / (1 << 20):.0f} MiB"
        times = f"{row.seconds * 1e6:,.0f} us{row.bus_bytes_per_second / 1e9:>11.2f} GB/s"
        yield f"{row.axis:<14}{row.ranks:>6}  {row.operation:<15}{size:>10}{times:>28}"
    yield ""
    for rank, seconds in enumerate(found.compute_seconds):
        others = [there for other, there in enumerate(found.pair_seconds[rank]) if other != rank]
        yield (
            f"rank {rank}: matrix product {seconds * 1e3:.2f} ms, 64 KiB there and back {min(others) * 1e6:,.0f} to "
            f"{max(others) * 1e6:,.0f} us, clock {found.clock_offsets[rank] * 1e3:+.2f} ms"
        )
    yield ""
    for slow in found.slow:
        yield f"finding: rank {slow.rank} is slow: {slow.times:.1f} times the median rank's time in {slow.what}"
    for rank in found.wrong_clocks():
        yield f"finding: the clock of rank {rank} is {found.clock_offsets[rank]:+.1f} s off: have NTP keep it in time"
    if not found.slow and not found.wrong_clocks():
        yield "no findings: no rank is slower than the others"


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.1f} GiB"


def _yes(value: bool | None) -> str:
    return "unknown" if value is None else "yes" if value else "no"
