"""``split``: what is held out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from modalities_data.commands.group import PATH, as_json_option, data, format_option, key_option, overwrite_option
from modalities_data.terminal import amount, packing_progress, say, summarize

if TYPE_CHECKING:
    from modalities_data.inputs.files import FormatChoice


@data.command()
@click.argument("sources", metavar="INPUT...", nargs=-1, required=True)
@click.argument("train", type=PATH)
@click.argument("held_out", metavar="HELD_OUT", type=PATH)
@click.option("--fraction", default=0.01, show_default=True, help="How much to hold out.")
@click.option("--seed", default=0, show_default=True, help="Chooses another split.")
@key_option
@format_option
@overwrite_option
@as_json_option
def split(
    sources: tuple[str, ...], train: Path, held_out: Path, fraction: float, seed: int, key: str,
    format_: FormatChoice, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Split the documents of INPUT... into TRAIN and HELD_OUT by a hash of each, so that equal ones stay together.

    Inputs are what `pack` reads, and the outputs then JSONL files; or packed folders, and so are the outputs.

    \b
    Example: modalities-data split corpus.jsonl train.jsonl held-out.jsonl --fraction 0.01
    Example: modalities-data split packed-web packed-books train held-out
    """
    from modalities_data.disk import refuse_existing
    from modalities_data.prepare.rewrite import is_packed
    from modalities_data.prepare.split import split as split_file

    if all(is_packed(Path(source)) for source in sources):
        _split_folders([Path(source) for source in sources], train, held_out, fraction, seed, overwrite, as_json)
        return
    for path in (train, held_out):
        refuse_existing(path, overwrite)
    report = split_file(sources, train, held_out, fraction, seed, key, format_)
    say(f"{train}: {report.train} documents\n{held_out}: {report.held_out} documents", as_json)
    summarize(report._asdict(), as_json)


def _split_folders(
    sources: list[Path], train: Path, held_out: Path, fraction: float, seed: int, overwrite: bool, as_json: bool
) -> None:
    from modalities_data.prepare.split_folders import split_folders

    with packing_progress("splitting") as progress:
        made = split_folders(
            sources, train, held_out, fraction, seed, overwrite=overwrite, on_progress=progress
        )  # fmt: skip
    for path, manifest in zip((train, held_out), made, strict=True):
        say(f"{path}: {manifest.documents} documents, {amount(manifest.tokens, 'tokens')}", as_json)
    summarize({"train": made[0].documents, "held_out": made[1].documents}, as_json)
