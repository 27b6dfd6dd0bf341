"""``modalities check``: find a mistake before any device is taken."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from modalities_core.training.trainer import Trainer


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--devices", type=click.IntRange(min=1), help="Of the run.  [default: as few as its mesh needs]")
def check(config: Path, overrides: tuple[str, ...], devices: int | None) -> None:
    """Check CONFIG without training: its form, its data, and that its parts fit together.

    The whole run is built, its weights on the meta device, so nothing large is allocated and one process stands for
    all of its devices.

    \b
    Example:
        modalities check config_files/quickstart.yaml optimizer.lr=1e-3
    """
    import torch

    from modalities_cli.wiring import checked_graph
    from modalities_parallel.planning.world import FEWEST, planning

    graph = checked_graph(config, overrides)
    with torch.device("meta"), planning(devices or FEWEST):
        trainer = graph.build("trainer")
        graph.build("tokenizer")
    for name, value in summary(trainer).items():
        click.echo(f"{name:>20}  {value}")
    click.echo(f"{config}: no problems found")


def summary(trainer: Trainer) -> dict[str, str]:
    """What a run would be, in numbers."""
    from modalities_core.training.consumption import samples_of
    from modalities_core.training.parameters import parameter_count

    model, batches = trainer.executor.model, trainer.batches
    length = batches.sequence_length
    first = len(samples_of(batches, 0))
    growing = "" if first == batches.samples_per_step else f", {first} x {length} at first"
    world = {"devices, at least": f"{trainer.world.size:,}"} if trainer.world.size > 1 else {}
    return world | {
        "parameters": f"{parameter_count(model):,}",
        "FLOPs per token": f"{model.flops_per_token(length):.3g}",
        "tokens per step": f"{batches.samples_per_step * length:,} ({batches.samples_per_step} x {length}{growing})",
        "steps": f"{trainer.steps:,}",
        "tokens": f"{samples_of(batches, trainer.steps).start * length:,}",
        "data": batches.fingerprint,
    }
