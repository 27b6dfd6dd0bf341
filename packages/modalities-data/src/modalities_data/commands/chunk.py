"""``chunk``: equal parts of packed folders."""

from __future__ import annotations

from pathlib import Path

import click

from modalities_data.commands.group import PATH, as_json_option, data, overwrite_option
from modalities_data.terminal import amount, packing_progress, say, summarize


class _Part(click.ParamType):
    """``2/8``: the number of a part, from one, and how many there are."""

    name = "i/n"

    def convert(self, value, param, ctx):
        """The two numbers."""
        first, _, second = str(value).partition("/")
        if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
            self.fail(f"{value!r} is not I/N, such as 1/4 for the first of four parts", param, ctx)
        return int(first), int(second)


@data.command()
@click.argument("sources", metavar="FOLDERS...", nargs=-1, required=True, type=PATH)
@click.argument("output", type=PATH)
@click.option("--part", type=_Part(), required=True, metavar="I/N", help="The I-th of N parts, such as 1/4.")
@click.option("--seed", type=int, help="Shuffle the documents of the part.")
@click.option("--shard-tokens", type=click.IntRange(1), default=1 << 27, show_default=True,
              help="Tokens per shard, at least.")  # fmt: skip
@overwrite_option
@as_json_option
def chunk(
    sources: tuple[Path, ...], output: Path, part: tuple[int, int], seed: int | None, shard_tokens: int,
    overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write one of n parts of each packed folder, equal by tokens, to the packed folder OUTPUT.

    The parts together have every document once. Bytes of text are estimated where a shard is cut.

    \b
    Example: modalities-data chunk books web part-1 --part 1/4 --seed 1
    """
    from modalities_data.prepare.chunk import chunk as write_chunk

    with packing_progress("chunking") as progress:
        made = write_chunk(
            sources, output, *part, seed=seed, shard_tokens=shard_tokens, overwrite=overwrite, on_progress=progress
        )
    counts = made.accounting
    say(f"{output}: {counts.written} of {counts.documents} documents, {amount(made.tokens, 'tokens')}", as_json)
    summary = {"output": str(output), "documents": counts.documents, "written": counts.written,
               "skipped": counts.skipped, "tokens": made.tokens, "fingerprint": made.fingerprint}  # fmt: skip
    summarize(summary, as_json)
