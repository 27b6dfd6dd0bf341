"""``train-tokenizer``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from modalities_data.commands.group import (
    PATH,
    as_json_option,
    data,
    end_option,
    format_option,
    key_option,
    overwrite_option,
)
from modalities_data.terminal import say, summarize

if TYPE_CHECKING:
    from modalities_data.inputs.files import FormatChoice


@data.command("train-tokenizer")
@click.argument("sources", metavar="INPUT...", nargs=-1, required=True)
@click.argument("output", type=PATH)
@click.option("--vocab-size", type=click.IntRange(257), required=True, help="Ids to have in all.")
@end_option
@key_option
@format_option
@overwrite_option
@as_json_option
def train_tokenizer(
    sources: tuple[str, ...], output: Path, vocab_size: int, end_of_document: str, key: str, format_: FormatChoice,
    overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Train a byte-level BPE tokenizer on INPUT... and write it to OUTPUT, a tokenizer.json.

    Inputs are what `pack` reads.

    \b
    Example: modalities-data train-tokenizer train.jsonl tokenizer.json --vocab-size 8000
    """
    from modalities_data.disk import refuse_existing
    from modalities_data.inputs.reading import documents
    from modalities_data.tokenizers.train import train_tokenizer as train

    refuse_existing(output, overwrite)
    reached = train(documents(sources, key, format_), output, vocab_size, end_of_document)
    say(f"{output}: {reached} ids", as_json)
    if reached < vocab_size:
        click.echo(f"warning: the text gives only {reached} of {vocab_size} ids", err=True)
    summarize({"output": str(output), "vocab_size": reached}, as_json)
