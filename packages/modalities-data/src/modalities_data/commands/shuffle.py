"""``shuffle``: documents in another order."""

from __future__ import annotations

from pathlib import Path

import click

from modalities_data.commands.group import PATH, as_json_option, data, overwrite_option
from modalities_data.terminal import amount, packing_progress, say, summarize


@data.command()
@click.argument("sources", metavar="INPUT...", nargs=-1, required=True)
@click.argument("output", type=PATH)
@click.option("--seed", default=0, show_default=True, help="Chooses the order.")
@click.option("--shard-tokens", type=click.IntRange(1), default=1 << 27, show_default=True,
              help="Tokens per shard, at least.")  # fmt: skip
@overwrite_option
@as_json_option
def shuffle(
    sources: tuple[str, ...], output: Path, seed: int, shard_tokens: int, overwrite: bool, as_json: bool
) -> None:
    """Write the documents of packed folders, or of JSONL files, to OUTPUT in an order drawn by a seed.

    OUTPUT is a packed folder or a JSONL file, as the inputs are; those may be compressed. Training reads samples in
    a shuffled order anyway; this mixes the documents within samples too.

    \b
    Example: modalities-data shuffle train train-shuffled --seed 1
    """
    from modalities_data.disk import refuse_existing
    from modalities_data.prepare.rewrite import is_packed
    from modalities_data.prepare.shuffle import shuffle_folders, shuffle_lines

    refuse_existing(output, overwrite)
    folders = [Path(source) for source in sources]
    with packing_progress("shuffling") as progress:
        if all(map(is_packed, folders)):
            made = shuffle_folders(
                folders, output, seed, shard_tokens=shard_tokens, overwrite=overwrite, on_progress=progress
            )
            counts, size = made.accounting, amount(made.tokens, "tokens")
            summary = {"tokens": made.tokens, "fingerprint": made.fingerprint}
        else:
            record = shuffle_lines(sources, output, seed, on_progress=progress)
            counts, size = record.accounting, amount(record.bytes, "B")
            summary = {"bytes": record.bytes, "checksum": record.checksum}
    say(f"{output}: {counts.written} documents, {size}", as_json)
    summarize({"output": str(output), "documents": counts.documents, "written": counts.written, **summary}, as_json)
