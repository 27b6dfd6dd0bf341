"""``modalities check``: find a mistake before any device is taken."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
def check(config: Path, overrides: tuple[str, ...]) -> None:
    """Check CONFIG without training: its form, its data, and that its parts fit together.

    The whole run is built, its weights on the meta device, so nothing large is allocated.

    \b
    Example:
        modalities check config_files/quickstart.yaml optimizer.lr=1e-3
    """
    import torch

    from modalities_cli.wiring import checked_graph

    graph = checked_graph(config, overrides)
    with torch.device("meta"):
        trainer = graph.build("trainer")
        graph.build("tokenizer")
    for name, value in trainer.summary().items():
        click.echo(f"{name:>24}  {value}")
    click.echo(f"{config}: no problems found")
