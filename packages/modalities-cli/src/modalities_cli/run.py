"""``modalities run``: a document to a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from modalities_core.config.graph import Graph
    from modalities_core.progress import Progress
    from modalities_core.training.trainer import Trainer


@click.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.argument("overrides", nargs=-1)
@click.option("--config_file_path", "config_option", type=click.Path(path_type=Path), help="The same as CONFIG.")
@click.option("--folder", type=click.Path(path_type=Path), help="The run's folder.  [default: runs/<name of CONFIG>]")
@click.option("--fresh", is_flag=True, help="Start over; an earlier run in the folder is moved aside, not deleted.")
def run(
    config: Path | None, overrides: tuple[str, ...], config_option: Path | None, folder: Path | None, fresh: bool
) -> None:
    """Train what CONFIG describes; continue if its folder holds a checkpoint.

    OVERRIDES change single values: optimizer.lr=1e-3 'trainer.sinks=[]'. Under torchrun every rank runs this command.

    \b
    Example:
        modalities run config_files/quickstart.yaml settings.steps=100
    """
    from modalities_core.errors import ConfigError

    if config_option is not None:
        # With the option, the first positional is an override.
        overrides = (str(config), *overrides) if config is not None else overrides
        config = config_option
    if config is None:
        raise ConfigError("no configuration given", hint="modalities run config_files/quickstart.yaml")
    train(config, overrides, folder or Path("runs") / config.stem, fresh)


def train(config: Path, overrides: tuple[str, ...], folder: Path, fresh: bool = False) -> Progress:
    """Build the run of ``config`` and train it to its end in ``folder``.

    Raises:
        ModalitiesError: whatever a user can mend; the process group is left in order.
    """
    from modalities_cli.run_folder import config_hash, describe
    from modalities_cli.wiring import with_trainer
    from modalities_core.training.lock import locked

    def run_in_folder(graph: Graph, trainer: Trainer) -> Progress:
        with locked(folder, trainer.world):
            if trainer.world.rank == 0:
                describe(folder, graph.document, trainer.world.size)
            return trainer.run(folder, fresh=fresh, config_hash=config_hash(graph.document))

    return with_trainer(config, overrides, run_in_folder)
