"""``modalities run``: a document to a trained model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from modalities_core.progress import Progress


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
    import gc

    from modalities_cli.run_folder import config_hash, describe
    from modalities_cli.wiring import checked_graph
    from modalities_core.errors import ModalitiesError
    from modalities_core.training.lock import locked

    graph = checked_graph(config, overrides)
    trainer = graph.build("trainer")
    world = trainer.world
    try:
        if world.rank == 0:
            show_choices()
        with locked(folder, world):
            if world.rank == 0:
                describe(folder, graph.document, world.size)
            return trainer.run(folder, fresh=fresh, config_hash=config_hash(graph.document))
    except ModalitiesError as error:
        raise graph.place(error) from error
    finally:
        # Sharded objects first, then the process group: the other way round a process may abort at its exit.
        del trainer, graph
        gc.collect()
        world.close()


class _Said(logging.Handler):
    """Prints records on standard error as it is at that moment: a progress bar may have put itself in between."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        click.echo(self.format(record), err=True)


def show_choices() -> None:
    """From now on show what the packages log of their choices, such as the implementation of attention."""
    logger = logging.getLogger("modalities")
    if not any(isinstance(handler, _Said) for handler in logger.handlers):
        logger.addHandler(_Said())
        logger.setLevel(logging.INFO)
