"""From a document to the objects of a run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from modalities_cli.choices import show_choices
from modalities_core.config.document import load
from modalities_core.config.graph import Graph
from modalities_core.errors import CheckpointError, ConfigError, ModalitiesError
from modalities_core.registry import registry

if TYPE_CHECKING:
    from modalities_core.training.trainer import Trainer

Result = TypeVar("Result")

RESOLVED = "config.resolved.yaml"


def run_roots() -> dict[str, Any]:
    """The top-level names of a run's document and their types."""
    from modalities_core.interfaces import Tokenizer
    from modalities_core.training.trainer import Trainer

    return {"trainer": Trainer, "tokenizer": Tokenizer | None}


def checked_graph(config: Path, overrides: Sequence[str] = ()) -> Graph:
    """The graph of a run's document, its form checked, nothing built.

    Raises:
        ConfigError: all that is wrong with it.
    """
    graph = Graph(load(config, overrides), registry(), run_roots())
    graph.check()
    return graph


def open_run(folder: Path) -> Graph:
    """The graph of a run that has been started in ``folder``.

    Raises:
        ConfigError: there is no run.
    """
    if not (folder / RESOLVED).is_file():
        raise ConfigError(
            f"{folder} is not the folder of a run: it has no {RESOLVED}", hint="`modalities run` makes one"
        )
    return checked_graph(folder / RESOLVED)


def with_trainer(config: Path, overrides: Sequence[str], use: Callable[[Graph, Trainer], Result]) -> Result:
    """Build the run of ``config``, use it, and let go of it in the order that its ranks need.

    Raises:
        ModalitiesError: whatever a user can mend, with its place in the document.
    """
    graph = checked_graph(config, overrides)
    trainer = graph.build("trainer")
    world = trainer.world
    try:
        if world.rank == 0:
            show_choices()
        return use(graph, trainer)
    except ModalitiesError as error:
        raise graph.place(error) from error
    finally:
        # Sharded objects first, then the process group: the other way round a process may abort at its exit.
        del trainer, graph
        gc.collect()
        world.close()


def run_of(path: Path) -> tuple[Path, int | None] | None:
    """The folder of the run that ``path`` is, or is a checkpoint of, and that checkpoint's step; None if it is neither.

    Args:
        path: a run's folder, its ``checkpoints``, or one ``step-...`` folder in there, abandoned ones included.
    """
    from modalities_core.training.lineage import step_folders

    path = path.resolve()
    folder = next((place for place in (path, *path.parents[:3]) if (place / RESOLVED).is_file()), None)
    if folder is None:
        return None
    if path in (folder, folder / "checkpoints"):
        return folder, None
    steps = [step for step, place in step_folders(path.parent).items() if place == path]
    return (folder, steps[0]) if steps else None


def trained_model(graph: Graph, folder: Path, step: int | None = None, shelf: Path | None = None) -> tuple[Any, int]:
    """The run's model with the weights of a checkpoint, every byte verified, and the checkpoint's step.

    Args:
        graph: the run's.
        folder: of the run.
        step: which checkpoint; by default the newest valid one.
        shelf: where the checkpoints lie, if not in ``folder/checkpoints``.

    Raises:
        CheckpointError: there is no valid checkpoint, or not the one that is asked for.
    """
    from modalities_core.training.lineage import Shelf
    from modalities_core.training.parameters import take_dtypes
    from modalities_parallel.world import one_process

    found, _ = Shelf(shelf or folder / "checkpoints").newest_valid(step)
    if found is None:
        raise CheckpointError(f"{folder} holds no checkpoint yet", hint="let the run go on until it saves one")
    with one_process():
        model = graph.build("trainer.executor.model")
    take_dtypes(model, {name: record.dtype for name, record in found.manifest.tensors.items()})
    graph.build("trainer.checkpoints.format").load(found.folder, model, None)
    return model, found.manifest.step
