"""``modalities plan``: what a run would take on devices that are not there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from modalities_core.config.graph import Graph
    from modalities_parallel.planning.devices import Device
    from modalities_parallel.planning.knobs import Knob
    from modalities_parallel.planning.run import Estimate, PlannedRun

DEVICE_NAMES = ("a100", "h100", "h200", "b200", "mi300x")
GIGA = 1e9
UNITS = {"": GIGA, "gb": GIGA, "g": GIGA, "gib": 2**30, "tb": 1e12, "mb": 1e6, "mib": 2**20}


class Bytes(click.ParamType):
    """``80GB`` is 80e9 bytes, ``80GiB`` 80 * 2**30; a number alone is in GB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Bytes as a number."""
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
        if found is None or found[2].lower() not in UNITS or not float(found[1]):
            self.fail(f"{value!r} is no amount of memory: write it as 80GB or 80GiB", param, ctx)
        return float(found[1]) * UNITS[found[2].lower()]


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--devices", type=click.IntRange(min=1), default=1, show_default=True, help="Devices in all.")
@click.option("--device", type=click.Choice(DEVICE_NAMES), default="h100", show_default=True, help="Of which kind.")
@click.option("--memory", type=Bytes(), help="Of one device, such as 80GB; by default what its data sheet says.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, in bytes and seconds.")
def plan(
    config: Path, overrides: tuple[str, ...], devices: int, device: str, memory: float | None, as_json: bool
) -> None:
    """Tell what the run of CONFIG would take on devices that are not there: memory, time, MFU.

    One micro batch goes through the model on the meta device, so nothing is computed and no data, GPU or memory is
    needed. Memory is that of tensors on the fullest rank; keep some 5 to 10 percent free for what the allocator, CUDA
    and NCCL take. Times are those of a roofline: a good run comes near them, no run goes below.

    \b
    Example:
        modalities plan config_files/llama_1b_fsdp.yaml --devices 64 --memory 80GB
    """
    from modalities_parallel.planning.devices import DEVICES
    from modalities_parallel.planning.knobs import knobs, way_to_fit
    from modalities_parallel.planning.run import estimated

    run = built(config, overrides, devices)
    kind = DEVICES[device]
    limit = float(kind.memory) if memory is None else memory
    estimate = estimated(run, kind)
    fits = estimate.memory.total <= limit
    some = [] if fits else knobs(run, kind)
    way = [] if fits else way_to_fit(run, kind, limit)
    figures = summary(run, estimate, kind, limit)
    if as_json:
        figures["knobs"] = [_of_knob(knob, limit) for knob in some]
        figures["way_to_fit"] = [_of_knob(knob, limit) for knob in way]
        click.echo(json.dumps(figures, indent=2))
        return
    for line in (*_lines(run, estimate, kind, limit), *_advice(some, way, limit)):
        click.echo(line)


def built(config: Path, overrides: tuple[str, ...], devices: int) -> PlannedRun:
    """The parts of the run that decide memory and time, built on the meta device for this many ranks.

    Raises:
        ConfigError: the configuration is wrong, or cannot run on this many devices.
    """
    import torch

    from modalities_cli.wiring import checked_graph
    from modalities_core.errors import ConfigError
    from modalities_parallel.planning.run import planned_run
    from modalities_parallel.planning.world import planning

    graph = checked_graph(config, overrides)
    with torch.device("meta"), planning(devices):
        executor = graph.build("trainer.executor")
        if executor.world.size != devices:
            raise ConfigError(
                f"the run has a world of {executor.world.size}, not of {devices} devices",
                hint="use the component world.auto, or leave --devices out",
            )
        optimizer = graph.build("trainer.optimizer")
        try:
            return planned_run(executor, optimizer, *batch_sizes(graph, executor.world.data_size))
        except ConfigError as error:
            raise graph.place(error) from None


def batch_sizes(graph: Graph, data_ranks: int) -> tuple[int, int, int]:
    """Micro batch size, sequence length and samples per step, as the document has them, without opening any data.

    Args:
        graph: of the run.
        data_ranks: devices that see different data.

    Raises:
        ConfigError: one is not there, or micro batches of all devices do not make up a step.
    """
    from modalities_core.errors import ConfigError

    def number(path: str) -> int:
        try:
            value = graph.build(path)
        except (ConfigError, KeyError) as error:
            raise ConfigError(f"{path} is not in the configuration, and a plan needs it") from error
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{path} is a number of at least 1, not {value!r}")
        return value

    micro, samples = number("trainer.batches.micro_batch_size"), number("trainer.batches.samples_per_step")
    if samples % (micro * data_ranks):
        raise ConfigError(
            f"{data_ranks} devices with micro batches of {micro} samples take {micro * data_ranks} at once, which does "
            f"not divide samples_per_step {samples}",
            hint="change trainer.batches.samples_per_step or micro_batch_size, or --devices",
        )
    return micro, number("trainer.batches.dataset.sequence_length"), samples


def summary(run: PlannedRun, estimate: Estimate, device: Device, limit: float) -> dict[str, Any]:
    """All figures as JSON values: bytes, seconds, FLOPs."""
    from modalities_core.training.parameters import parameter_count

    causal = getattr(run.model, "causal_flops_per_token", None)
    return {
        "parameters": parameter_count(run.model),
        "devices": run.ranks,
        "mesh": run.layout.degrees._asdict(),
        "device": device.name,
        "device_source": device.source,
        "memory_limit": limit,
        "fits": estimate.memory.total <= limit,
        "micro_batch_size": run.micro_batch_size,
        "accumulation": run.accumulation,
        "sequence_length": run.sequence_length,
        "tokens_per_step": run.samples_per_step * run.sequence_length,
        "flops_per_token": run.model.flops_per_token(run.sequence_length),
        "causal_flops_per_token": None if causal is None else causal(run.sequence_length),
        "memory": estimate.memory._asdict() | {"total": estimate.memory.total},
        "host_memory": estimate.host,
        "seconds": estimate.time._asdict() | {"step": estimate.time.total},
        "tokens_per_second_per_device": estimate.tokens_per_second,
        "mfu": estimate.mfu,
        "mfu_causal": estimate.mfu_causal,
    }


def _lines(run: PlannedRun, estimate: Estimate, device: Device, limit: float) -> list[str]:
    figures = summary(run, estimate, device, limit)
    causal = figures["causal_flops_per_token"]
    flops = f"{figures['flops_per_token']:.4g}" + ("" if causal is None else f" ({causal:.4g} causal)")
    sizes = f"{run.samples_per_step} samples: {run.data_ranks} x {run.accumulation} x {run.micro_batch_size}"
    mesh = run.layout.degrees
    host = [_line("of the host", f"{estimate.host / GIGA:8.2f} GB")] if estimate.host else []
    lines = [
        _line("parameters", f"{figures['parameters']:,}"),
        _line("FLOPs per token", flops),
        _line("tokens per step", f"{figures['tokens_per_step']:,} ({sizes}, of {run.sequence_length} tokens)"),
        "",
        f"memory of one {device.name}, of {run.ranks}" + (f": {mesh}" if run.ranks > 1 else ""),
        *(_line(name, f"{size / GIGA:8.2f} GB") for name, size in estimate.memory._asdict().items() if size),
        _line("total", f"{estimate.memory.total / GIGA:8.2f} GB of {limit / GIGA:.0f} GB"),
        *host,
        "",
        "time of a step, by roofline",
        *(_line(name, f"{seconds:8.3f} s") for name, seconds in estimate.time._asdict().items() if seconds),
        _line("step", f"{estimate.time.total:8.3f} s"),
        _line("tokens/s per device", f"{estimate.tokens_per_second:8,.0f}"),
        _line("MFU", f"{estimate.mfu:8.1%}" + ("" if causal is None else f" ({estimate.mfu_causal:.1%} causal)")),
        "",
    ]
    return lines


def _advice(some: list[Knob], way: list[Knob], limit: float) -> list[str]:
    if not some:
        return ["it fits"] if not way else []
    lines = ["it does not fit; what would help, each by itself:"]
    lines += [f"  {_knob(knob)}{', and fits' if knob.estimate.memory.total <= limit else ''}" for knob in some]
    if some[0].estimate.memory.total > limit:
        enough = way[-1].estimate.memory.total <= limit
        lines += ["", "one after the other until it fits:" if enough else "all of it together is not enough:"]
        lines += [f"  {_knob(knob)}" for knob in way]
    return lines


def _knob(knob: Knob) -> str:
    estimate = knob.estimate
    return f"{knob.change:<42} {estimate.memory.total / GIGA:8.2f} GB, MFU {estimate.mfu:.1%}"


def _of_knob(knob: Knob, limit: float) -> dict[str, Any]:
    total = knob.estimate.memory.total
    seconds = knob.estimate.time.total
    return {
        "change": knob.change,
        "memory": total,
        "fits": total <= limit,
        "seconds": seconds,
        "mfu": knob.estimate.mfu,
    }


def _line(name: str, value: str) -> str:
    return f"{name:>20}  {value}"
