"""From a document to the objects of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modalities_core.config.document import load
from modalities_core.config.graph import Graph
from modalities_core.errors import CheckpointError, ConfigError
from modalities_core.registry import registry

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


def trained_model(graph: Graph, folder: Path) -> tuple[Any, int]:
    """The run's model with the weights of its newest valid checkpoint, and the checkpoint's step.

    Raises:
        CheckpointError: there is no valid checkpoint.
    """
    from modalities_core.training.lineage import newest_valid

    found = newest_valid(folder / "checkpoints")
    if found is None:
        raise CheckpointError(f"{folder} holds no checkpoint yet", hint="let the run go on until it saves one")
    model = graph.build("trainer.executor.model")
    graph.build("trainer.checkpoints.format").load(found.folder, model, None)
    return model, found.manifest.step
