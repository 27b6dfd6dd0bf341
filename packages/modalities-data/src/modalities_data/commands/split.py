"""``split``: what is held out."""

from __future__ import annotations

from pathlib import Path

import click

from modalities_data.commands.group import PATH, as_json_option, data, key_option, overwrite_option
from modalities_data.terminal import say, summarize


@data.command()
@click.argument("source", metavar="INPUT", type=PATH)
@click.argument("train", type=PATH)
@click.argument("held_out", metavar="HELD_OUT", type=PATH)
@click.option("--fraction", default=0.01, show_default=True, help="How much to hold out.")
@click.option("--seed", default=0, show_default=True, help="Chooses another split.")
@key_option
@overwrite_option
@as_json_option
def split(
    source: Path, train: Path, held_out: Path, fraction: float, seed: int, key: str, overwrite: bool, as_json: bool
) -> None:
    """Split the documents of INPUT into TRAIN and HELD_OUT by a hash of their text.

    \b
    Example: modalities-data split corpus.jsonl train.jsonl held-out.jsonl --fraction 0.01
    """
    from modalities_data.disk import refuse_existing
    from modalities_data.prepare.split import split as split_file

    for path in (train, held_out):
        refuse_existing(path, overwrite)
    report = split_file(source, train, held_out, fraction, seed, key)
    say(f"{train}: {report.train} documents\n{held_out}: {report.held_out} documents", as_json)
    summarize(report._asdict(), as_json)
