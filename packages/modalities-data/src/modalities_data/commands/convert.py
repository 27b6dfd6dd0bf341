"""``convert``: from and to what other programs read and write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from modalities_data.commands.group import PATH, as_json_option, data, overwrite_option
from modalities_data.terminal import accounted, amount, packing_progress, say, summarize

if TYPE_CHECKING:
    from modalities_data.convert.raw import Vocabulary
    from modalities_data.manifest import Manifest

copy_option = click.option("--copy", is_flag=True, help="Copy files that could be hard links.")
append_option = click.option("--append-end", is_flag=True, help="Put the end id where a document lacks it.")


def vocabulary_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What the ids mean: these files do not say."""
    for option in (
        click.option("--end-id", type=click.IntRange(0), help="The end-of-document id, without a tokenizer."),
        click.option("--vocab-size", type=click.IntRange(1), help="How many ids there are, without a tokenizer."),
        click.option(
            "--end-of-document",
            default="<|endoftext|>",
            show_default=True,
            help="The tokenizer's token that ends every document.",
        ),
        click.option("--tokenizer", metavar="PATH|bytes", help="The tokenizer that made the ids; kept with them."),
    ):
        command = option(command)
    return command


@data.group()
def convert() -> None:
    """Convert packed folders from and to what other programs use."""


@convert.command("from-megatron")
@click.argument("prefixes", metavar="PREFIXES...", nargs=-1, required=True, type=PATH)
@click.argument("output", type=PATH)
@vocabulary_options
@click.option("--unit", type=click.Choice(["document", "sequence"]), default="document", show_default=True,
              help="What becomes a document: Megatron's documents or its sequences.")  # fmt: skip
@append_option
@copy_option
@overwrite_option
@as_json_option
def from_megatron(
    prefixes: tuple[Path, ...], output: Path, unit: Literal["document", "sequence"], append_end: bool, copy: bool,
    overwrite: bool, as_json: bool, **vocabulary: Any,
) -> None:  # fmt: skip
    """Make the packed folder OUTPUT of Megatron-LM's .bin and .idx pairs, named without these endings.

    Every id is checked. Files are hard links where their bytes can stay as they are.

    \b
    Example: modalities-data convert from-megatron corpus_text_document train --tokenizer tokenizer.json
    """
    from modalities_data.convert import megatron

    ids = _vocabulary(**vocabulary)
    with packing_progress("converting") as progress:
        made = megatron.from_megatron(
            prefixes,
            output,
            ids,
            unit=unit,
            append_end=append_end,
            copy=copy,
            overwrite=overwrite,
            on_progress=progress,
        )
    _tell(output, made, as_json)


@convert.command("to-megatron")
@click.argument("folder", type=PATH)
@click.argument("prefix", type=PATH)
@copy_option
@overwrite_option
@as_json_option
def to_megatron(folder: Path, prefix: Path, copy: bool, overwrite: bool, as_json: bool) -> None:
    """Write the packed FOLDER as one Megatron-LM pair, PREFIX.bin and PREFIX.idx.

    Each shard is such a pair already, named FOLDER/00000 and so on; this joins them.

    \b
    Example: modalities-data convert to-megatron train megatron/train_text_document
    """
    from modalities_data.convert import megatron

    documents, tokens = megatron.to_megatron(folder, prefix, copy=copy, overwrite=overwrite)
    say(f"{prefix}: {documents} documents, {amount(tokens, 'tokens')}", as_json)
    summarize({"output": str(prefix), "documents": documents, "tokens": tokens}, as_json)


@convert.command("from-pbin")
@click.argument("files", metavar="FILES...", nargs=-1, required=True, type=PATH)
@click.argument("output", type=PATH)
@vocabulary_options
@append_option
@overwrite_option
@as_json_option
def from_pbin(
    files: tuple[Path, ...], output: Path, append_end: bool, overwrite: bool, as_json: bool, **vocabulary: Any
) -> None:
    """Make the packed folder OUTPUT of .pbin files of the original Modalities.

    Their pickled index is read without unpickling: a file made to harm runs nothing.

    \b
    Example: modalities-data convert from-pbin corpus.pbin train --tokenizer tokenizer.json
    """
    from modalities_data.convert import pbin

    ids = _vocabulary(**vocabulary)
    with packing_progress("converting") as progress:
        made = pbin.from_pbin(files, output, ids, append_end=append_end, overwrite=overwrite, on_progress=progress)
    _tell(output, made, as_json)


@convert.command("from-datatrove")
@click.argument("sources", metavar="SOURCES...", nargs=-1, required=True, type=PATH)
@click.argument("output", type=PATH)
@vocabulary_options
@append_option
@copy_option
@overwrite_option
@as_json_option
def from_datatrove(
    sources: tuple[Path, ...], output: Path, append_end: bool, copy: bool, overwrite: bool, as_json: bool,
    **vocabulary: Any,
) -> None:  # fmt: skip
    """Make the packed folder OUTPUT of datatrove's .ds files, or of folders of them.

    Every id is checked. Files are hard links where their bytes can stay as they are; losses become masks.

    \b
    Example: modalities-data convert from-datatrove tokenized train --tokenizer tokenizer.json
    """
    from modalities_data.convert import datatrove

    ids = _vocabulary(**vocabulary)
    with packing_progress("converting") as progress:
        made = datatrove.from_datatrove(
            sources, output, ids, append_end=append_end, copy=copy, overwrite=overwrite, on_progress=progress
        )
    _tell(output, made, as_json)


@convert.command("to-datatrove")
@click.argument("folder", type=PATH)
@click.argument("output", type=PATH)
@copy_option
@overwrite_option
@as_json_option
def to_datatrove(folder: Path, output: Path, copy: bool, overwrite: bool, as_json: bool) -> None:
    """Write the packed FOLDER as datatrove's .ds files, one per shard, into the folder OUTPUT.

    \b
    Example: modalities-data convert to-datatrove train tokenized
    """
    from modalities_data.convert import datatrove

    made = datatrove.to_datatrove(folder, output, copy=copy, overwrite=overwrite)
    say(f"{output}: {made.documents} documents, {amount(made.tokens, 'tokens')}", as_json)
    summary = {"output": str(output), "documents": made.documents, "tokens": made.tokens, "files": len(made.shards)}
    summarize(summary, as_json)


def _vocabulary(tokenizer: str | None, end_of_document: str, vocab_size: int | None, end_id: int | None) -> Vocabulary:
    from modalities_data.convert.raw import Vocabulary
    from modalities_data.tokenizers.opening import named_tokenizer

    return Vocabulary.of(named_tokenizer(tokenizer, end_of_document) if tokenizer else None, vocab_size, end_id)


def _tell(output: Path, made: Manifest, as_json: bool) -> None:
    counts = made.accounting
    say(
        f"{output}: {accounted(counts, 'documents')}, {amount(made.tokens, 'tokens')} in {len(made.shards)} shards of "
        f"{made.dtype}",
        as_json,
    )
    summary = {
        "output": str(output), "tokens": made.tokens, "documents": counts.documents, "written": counts.written,
        "skipped": counts.skipped, "shards": len(made.shards), "dtype": made.dtype, "fingerprint": made.fingerprint,
    }  # fmt: skip
    summarize(summary, as_json)
