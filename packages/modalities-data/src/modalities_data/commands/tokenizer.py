"""``train-tokenizer``."""

from __future__ import annotations

from pathlib import Path

import click

from modalities_data.commands.group import PATH, as_json_option, data, end_option, key_option, overwrite_option
from modalities_data.terminal import say, summarize


@data.command("train-tokenizer")
@click.argument("source", metavar="INPUT", type=PATH)
@click.argument("output", type=PATH)
@click.option("--vocab-size", type=click.IntRange(257), required=True, help="Ids to have in all.")
@end_option
@key_option
@overwrite_option
@as_json_option
def train_tokenizer(
    source: Path, output: Path, vocab_size: int, end_of_document: str, key: str, overwrite: bool, as_json: bool
) -> None:
    """Train a byte-level BPE tokenizer on INPUT and write it to OUTPUT, a tokenizer.json.

    \b
    Example: modalities-data train-tokenizer train.jsonl tokenizer.json --vocab-size 8000
    """
    from modalities_data.disk import refuse_existing
    from modalities_data.jsonl import documents
    from modalities_data.tokenizers.train import train_tokenizer as train

    refuse_existing(output, overwrite)
    reached = train(documents(source, key), output, vocab_size, end_of_document)
    say(f"{output}: {reached} ids", as_json)
    if reached < vocab_size:
        click.echo(f"warning: the text gives only {reached} of {vocab_size} ids", err=True)
    summarize({"output": str(output), "vocab_size": reached}, as_json)
