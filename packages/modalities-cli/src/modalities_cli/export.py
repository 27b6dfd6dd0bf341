"""``modalities export``: a trained run as a folder of Hugging Face's.

Decoders are written by :mod:`modalities_models.huggingface`. Any other model is, if it has two methods:
``export(folder, read, *, dtype, stored, token_ids)`` with the arguments of
:func:`modalities_models.huggingface.exporting.export` writes weights, config.json and generation_config.json and gives
the name of transformers' class; ``compare(folder, read)`` gives an
:class:`modalities_models.huggingface.verifying.Agreement`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import Tensor

    from modalities_core.config.graph import Graph
    from modalities_core.training.lineage import Checkpoint
    from modalities_models.huggingface.verifying import Agreement

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    class_name: of transformers' class.
    step: of the checkpoint.
    bytes: of the weights.
    dtype: of most of them.
    agreement: with transformers; None where that was not asked for.
    warnings: what a user should know.
    """

    class_name: str
    step: int
    bytes: int
    dtype: str
    agreement: Agreement | None
    warnings: tuple[str, ...]


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the weights.  [default: as they are stored]")
@click.option("--family", help="Write as this model_type.  [default: the first that can express the model]")
@click.option("--chat-template", type=click.Path(path_type=Path, dir_okay=False), help="A Jinja file.  "
              "[default: the one that lies beside the run's tokenizer or data]")  # fmt: skip
@click.option("--no-verify", is_flag=True, help="Do not compare the logits with those of transformers.")
def export(
    source: Path, folder: Path, dtype: str | None, family: str | None, chat_template: Path | None, no_verify: bool
) -> None:
    """Write the model in SOURCE, a run's folder or one of its checkpoints, to DIR for Hugging Face's tools.

    DIR gets config.json, generation_config.json, safetensors, the tokenizer, and the chat template where the run has
    one: a stock class of transformers, no code of its own. Needs no GPU, whatever the run was trained on, and holds
    one tensor at a time. At last the logits of DIR in transformers are compared with ours, for which both models
    are in memory one after the other; where they differ, DIR is not made.

    \b
    Example:
        modalities export runs/quickstart exported/
        modalities export runs/llama/checkpoints/step-00001000 exported/ --dtype bfloat16
    """
    done = export_run(source, folder, dtype, family, chat_template, verify=not no_verify)
    for warning in done.warnings:
        click.echo(f"warning: {warning}", err=True)
    size = f"{done.bytes / 1e6:,.1f} MB of {done.dtype}"
    click.echo(f"{folder}: the model of step {done.step} as a {done.class_name}, {size}")
    click.echo(agreement_line(done.agreement))


def agreement_line(agreement: Agreement | None) -> str:
    """How near the logits came to those of transformers, for people."""
    if agreement is None:
        return "not verified: the logits were not compared with those of transformers"
    return (
        f"logits equal those of transformers: they differ by at most {agreement.difference:.2g}, the largest being "
        f"{agreement.scale:.3g}; the likeliest token is the same at {agreement.greedy} of {agreement.tokens} positions"
    )


def export_run(
    source: Path,
    folder: Path,
    dtype: str | None = None,
    family: str | None = None,
    chat_template: Path | None = None,
    *,
    verify: bool = True,
) -> Exported:
    """Write the model of a run to ``folder``, which appears whole or not at all.

    Args:
        source: a run's folder, or one of its checkpoints.
        folder: where to; must not exist, or be empty.
        dtype: of the weights; by default as they are stored.
        family: its ``model_type``; by default the first that can express the model.
        chat_template: a Jinja file; by default the one that lies beside the run's tokenizer or data.
        verify: compare the logits with those of transformers.

    Raises:
        ConfigError: it is no run, no stock class can express its model, ``folder`` exists, or transformers is missing.
        CheckpointError: there is no valid checkpoint, or transformers computes something else.
    """
    import torch

    from modalities_cli.exported_tokenizer import write_run_tokenizer
    from modalities_cli.wiring import open_run, run_of
    from modalities_core.errors import CheckpointError, ConfigError
    from modalities_core.training.lineage import Shelf
    from modalities_models.decoder import Decoder
    from modalities_models.huggingface.exporting import new_folder
    from modalities_models.huggingface.verifying import require_transformers

    found = run_of(source)
    if found is None:
        raise ConfigError(f"{source} is not the folder of a run, nor a checkpoint of one")
    if verify:
        require_transformers()
    run, step = found
    graph = open_run(run)
    model = bare_model(graph)
    if not isinstance(model, Decoder) and not hasattr(model, "export"):
        raise ConfigError(
            f"a {type(model).__name__} has no counterpart among the language models of transformers",
            hint="model.decoder and model.pretrained can be exported",
        )
    shelf = source.resolve().parent if step is not None else run / "checkpoints"
    checkpoint, passed_over = Shelf(shelf).newest_valid(step)
    if checkpoint is None:
        raise CheckpointError(f"{run} holds no checkpoint yet", hint="let the run go on until it saves one")
    _refuse_other_tensors(checkpoint, model)
    read = tensor_reader(graph, checkpoint.folder, model)
    kind = None if dtype is None else getattr(torch, dtype)

    def stored(name: str) -> torch.dtype:
        return getattr(torch, checkpoint.manifest.tensors[name].dtype)

    with new_folder(folder) as temporary:
        tokens = write_run_tokenizer(temporary, graph, run, model, chat_template)
        how = {"dtype": kind, "stored": stored, "token_ids": tokens.ids}
        class_name = _write(temporary, model, read, family, how)
        agreement = _verified(temporary, model, read) if verify else None
        warnings = [*passed_over, *tokens.warnings]
        size, stored = _weights(temporary)
    return Exported(class_name, checkpoint.manifest.step, size, stored, agreement, tuple(warnings))


def bare_model(graph: Graph) -> Any:
    """The run's model without what shards or wraps it, on the meta device: built anywhere, whatever it trained on."""
    import torch

    from modalities_core.config import references
    from modalities_core.config.positions import dotted

    document = graph.document
    path = references.resolve(document, "trainer.executor.model")
    while True:
        path = references.target(document, path) or path
        node = document.get(path)
        if not (isinstance(node, dict) and "component" in node and "model" in node):
            break
        path = (*path, "model")
    with torch.device("meta"):
        return graph.build(dotted(path))


def tensor_reader(graph: Graph, folder: Path, model: Any) -> Callable[[str], Tensor]:
    """Reads one tensor of a checkpoint at a time where its format can, else it reads them all at once."""
    format = graph.build("trainer.checkpoints.format")
    if hasattr(format, "model_reader"):
        return format.model_reader(folder)
    model.to_empty(device="cpu")
    format.load(folder, model, None)
    return dict(model.state_dict()).__getitem__


def _refuse_other_tensors(checkpoint: Checkpoint, model: Any) -> None:
    """Make sure that the checkpoint holds the model's tensors and no others, so that nothing is left behind.

    Raises:
        CheckpointError: what wrapped the model in the run has added tensors or renamed them.
    """
    from modalities_core.errors import CheckpointError
    from modalities_core.training.parameters import tensor_layout

    here, there = set(tensor_layout(model)), set(checkpoint.manifest.tensors)
    if lost := sorted(here ^ there):
        raise CheckpointError(
            f"{checkpoint.folder} does not hold the tensors of a {type(model).__name__}: {len(lost)} differ, such as "
            f"{lost[0]}",
            hint="what wraps the model in the run's document has tensors of its own, which have no place in an export",
        )


def _write(folder: Path, model: Any, read: Callable[[str], Tensor], family: str | None, how: dict[str, Any]) -> str:
    """Weights, config.json and generation_config.json; gives the name of transformers' class."""
    from modalities_core.errors import ConfigError
    from modalities_models.huggingface.exporting import export as write_decoder

    if not hasattr(model, "export"):
        return write_decoder(folder, model.architecture, read, family=family, **how).class_name
    if family is not None:
        raise ConfigError(f"a {type(model).__name__} is written as what it is; leave --family out")
    return model.export(folder, read, **how)


def _verified(folder: Path, model: Any, read: Callable[[str], Tensor]) -> Agreement:
    """Compare what was written with the checkpoint, then its logits in transformers with ours."""
    from modalities_models.decoder import Decoder
    from modalities_models.huggingface.verifying import exported_decoder, verify

    if isinstance(model, Decoder):
        return verify(exported_decoder(folder, model.architecture, read), folder)
    return model.compare(folder, read)


def _weights(folder: Path) -> tuple[int, str]:
    """Bytes of all weights, and the type of most of them."""
    from modalities_models.huggingface.files import Weights

    weights = Weights(folder)
    sizes: dict[str, int] = {}
    for name in weights:
        info = weights.info(name)
        kind = str(info.dtype).removeprefix("torch.")
        sizes[kind] = sizes.get(kind, 0) + info.bytes
    return sum(sizes.values()), max(sizes, key=lambda kind: sizes[kind])
