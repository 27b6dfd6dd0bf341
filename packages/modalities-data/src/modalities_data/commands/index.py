"""``index``: where the lines of a file begin."""

from __future__ import annotations

from pathlib import Path

import click

from modalities_data.commands.group import PATH, as_json_option, data, key_option, overwrite_option
from modalities_data.terminal import amount, packing_progress, say, summarize


@data.command()
@click.argument("source", metavar="INPUT", type=PATH)
@click.option("--out", "output", type=PATH, help="The index; INPUT.lines by default.")
@click.option("--validate", is_flag=True, help="Decode every line too, and stop at one that is no document.")
@key_option
@overwrite_option
@as_json_option
def index(source: Path, output: Path | None, validate: bool, key: str, overwrite: bool, as_json: bool) -> None:
    """Write where each line of INPUT, a JSONL file, begins: uint64 positions, and a small manifest beside them.

    Packing needs no index; programs that read single documents of a large file do.

    \b
    Example: modalities-data index corpus.jsonl --validate
    """
    from time import monotonic

    from modalities_data.disk import refuse_existing
    from modalities_data.prepare.index import default_output, describe, index_lines

    output = default_output(source) if output is None else output
    refuse_existing(output, overwrite)
    started = monotonic()
    with packing_progress("indexing", "lines") as progress:
        made = index_lines(source, output, validate, key, progress)
    seconds = monotonic() - started
    blank = f", {made.blank_lines} blank lines" if made.blank_lines else ""
    say(f"{output}: {made.lines} lines{blank}; {seconds:.1f} s, {amount(made.bytes / seconds, 'B/s')}", as_json)
    summarize({**describe(made, output), "validated": validate, "seconds": round(seconds, 3)}, as_json)
