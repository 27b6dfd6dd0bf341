"""``corpus``: text that is at hand without a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from modalities_data.commands.group import PATH, as_json_option, data, overwrite_option
from modalities_data.terminal import amount, say, summarize

if TYPE_CHECKING:
    from modalities_data.corpus import CorpusReport


@data.group()
def corpus() -> None:
    """Write text that is at hand without a network."""


@corpus.command()
@click.argument("output", type=PATH)
@overwrite_option
@as_json_option
def stdlib(output: Path, overwrite: bool, as_json: bool) -> None:
    """Write this Python's standard library, about 30 MB of source, to OUTPUT as JSON Lines.

    \b
    Example: modalities-data corpus stdlib corpus.jsonl
    """
    from modalities_data.corpus import write_standard_library
    from modalities_data.disk import refuse_existing

    refuse_existing(output, overwrite)
    _tell_corpus(output, write_standard_library(output), as_json)


@corpus.command()
@click.argument("output", type=PATH)
@click.option("--documents", type=click.IntRange(1), required=True, help="How many to write, half a kilobyte each.")
@click.option("--seed", default=0, show_default=True, help="Chooses the text.")
@overwrite_option
@as_json_option
def lorem(output: Path, documents: int, seed: int, overwrite: bool, as_json: bool) -> None:
    """Write made-up sentences that a model can learn from to OUTPUT as JSON Lines.

    \b
    Example: modalities-data corpus lorem corpus.jsonl --documents 1000
    """
    from modalities_data.corpus import write_lorem
    from modalities_data.disk import refuse_existing

    refuse_existing(output, overwrite)
    _tell_corpus(output, write_lorem(output, documents, seed), as_json)


def _tell_corpus(output: Path, report: CorpusReport, as_json: bool) -> None:
    skipped = "".join(f", {count} skipped as {rule}" for rule, count in report.skipped.items())
    say(f"{output}: {report.documents} documents, {amount(report.text_bytes, 'B')} of text{skipped}", as_json)
    summarize({"output": str(output), **report._asdict()}, as_json)
