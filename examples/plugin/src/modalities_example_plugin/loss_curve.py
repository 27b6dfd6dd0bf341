"""A command: the loss of a run as a line of blocks."""

import json
from pathlib import Path

import click

BLOCKS = "▁▂▃▄▅▆▇█"


@click.command()
@click.argument("run_folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--width", default=60, show_default=True, help="Characters to draw.")
def loss_curve(run_folder: Path, width: int) -> None:
    """Draw the training loss of the run in RUN_FOLDER."""
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["event"] == "step_logged"]
    if not losses:
        raise click.ClickException(f"{run_folder} has logged no step yet")
    picked = (
        [losses[i * len(losses) // width] for i in range(min(width, len(losses)))] if width < len(losses) else losses
    )
    low, high = min(picked), max(picked)
    height = (len(BLOCKS) - 1) / ((high - low) or 1)
    click.echo("".join(BLOCKS[round((loss - low) * height)] for loss in picked))
    click.echo(f"{losses[0]:.3f} -> {losses[-1]:.3f} nats per token")
