"""``merge``: several packed folders as one."""

from __future__ import annotations

from pathlib import Path

import click

from modalities_data.commands.group import PATH, as_json_option, data, overwrite_option
from modalities_data.terminal import amount, say, summarize


@data.command()
@click.argument("folders", metavar="FOLDER...", type=PATH, nargs=-1, required=True)
@click.argument("output", type=PATH)
@overwrite_option
@as_json_option
def merge(folders: tuple[Path, ...], output: Path, overwrite: bool, as_json: bool) -> None:
    """Join packed folders into the packed folder OUTPUT without rewriting a token.

    Files are linked where OUTPUT is on the same file system, else copied. The folders must have the same tokenizer.
    The parts of `pack --shard` become what a single run would have written, whatever their order.

    \b
    Example: modalities-data merge web books train
    Example: to append to a folder
      modalities-data pack new.jsonl new --tokenizer train/tokenizer.json
      modalities-data merge train new train --overwrite
    """
    from modalities_data.prepare.merge import merge as merge_folders

    report = merge_folders(folders, output, overwrite)
    made = report.manifest
    how = f"{report.copied} files copied" if report.copied else "no byte copied"
    say(
        f"{output}: {made.documents} documents, {amount(made.tokens, 'tokens')} in {len(made.shards)} shards "
        f"from {len(folders)} folders, {how}",
        as_json,
    )
    summary = {
        "output": str(output), "folders": [str(folder) for folder in folders], "tokens": made.tokens,
        "documents": made.documents, "shards": len(made.shards), "copied": report.copied,
        "fingerprint": made.fingerprint,
    }  # fmt: skip
    summarize(summary, as_json)
