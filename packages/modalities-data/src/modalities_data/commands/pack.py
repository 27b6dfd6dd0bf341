"""``pack``: text to tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

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
from modalities_data.terminal import accounted, amount, packing_progress, rates, say, summarize

if TYPE_CHECKING:
    from modalities_data.inputs.files import FormatChoice
    from modalities_data.prepare.pack import PackReport


def _part(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """``3/8`` as numbers."""
    if value is None:
        return None
    number, slash, of = value.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise click.BadParameter(f"{value} is not I/N, such as 1/8 for the first of eight parts")
    return int(number), int(of)


@data.command()
@click.argument("sources", metavar="INPUT...", nargs=-1, required=True)
@click.argument("output", type=PATH)
@click.option("--tokenizer", required=True, metavar="PATH|bytes",
              help="A tokenizer.json, a SentencePiece .model, a .tiktoken file of ranks, or bytes.")  # fmt: skip
@end_option
@click.option("--engine", type=click.Choice(["auto", "fastokens", "gigatoken", "tokenizers"]), default="auto",
              show_default=True, help="What computes the ids; auto takes the fastest that is exact.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1), help="Processes; one per available core by default.")
@click.option("--on-error", type=click.Choice(["fail", "skip"]), default="fail", show_default=True,
              help="What to do with a record that is no document.")  # fmt: skip
@click.option("--range-bytes", type=click.IntRange(1),
              help="Input bytes per shard, at least; 64 MiB by default, more beyond 256 GiB of input.")  # fmt: skip
@click.option("--shard", "part", metavar="I/N", callback=_part,
              help="Write the I-th of N parts, as one job of an array; then merge the N folders.")  # fmt: skip
@click.option("--verify-every", type=click.IntRange(1), metavar="K",
              help="Encode every K-th document again with tokenizers, and stop at a difference.")  # fmt: skip
@click.option("--run-on", type=click.Choice(["processes", "ray"]), default="processes", show_default=True,
              help="Processes here, or tasks of the Ray cluster at RAY_ADDRESS.")  # fmt: skip
@key_option
@format_option
@overwrite_option
@as_json_option
def pack(
    sources: tuple[str, ...], output: Path, tokenizer: str, end_of_document: str, engine: str, workers: int | None,
    on_error: Literal["fail", "skip"], range_bytes: int | None, part: tuple[int, int] | None, verify_every: int | None,
    run_on: Literal["processes", "ray"], key: str, format_: FormatChoice, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Tokenize INPUT... into the packed folder OUTPUT.

    An input is JSON Lines (plain, .gz or .zst), Parquet, or text, where a file is a document; each a file, a folder,
    a pattern in quotes, or an address such as s3://bucket/folder. Run the command again if it was interrupted:
    finished shards are kept.

    \b
    Example: modalities-data pack train.jsonl train --tokenizer tokenizer.json
    Example: as an array of 8 jobs, in job number $I
      modalities-data pack "texts/*.jsonl.zst" parts/$I --tokenizer tokenizer.json --shard $I/8
      modalities-data merge parts/* train
    """
    from modalities_data.prepare.pack import pack as pack_files
    from modalities_data.tokenizers.opening import named_tokenizer

    chosen = named_tokenizer(tokenizer, end_of_document, engine)
    with packing_progress() as progress:
        report = pack_files(
            sources, output, chosen, workers=workers, on_error=on_error, overwrite=overwrite, key=key,
            range_bytes=range_bytes, format=format_, part=part, verify_every=verify_every, run_on=run_on,
            on_progress=progress,
        )  # fmt: skip
    _tell_packed(output, report, as_json)


def _tell_packed(output: Path, report: PackReport, as_json: bool) -> None:
    made, counts = report.manifest, report.manifest.accounting
    reused = f", {report.shards_reused} shards from an earlier run" if report.shards_reused else ""
    say(
        f"{output}: {accounted(counts, 'documents', f'{output}/*.rejected.jsonl')}, {amount(made.tokens, 'tokens')}"
        f"; {rates(report.seconds, report.bytes_read, report.tokens_written)}, {made.tokenizer.engine}, "
        f"workers: {report.workers}{reused}",
        as_json,
    )
    summary = {
        "output": str(output), "tokens": made.tokens, "text_bytes": made.text_bytes, "shards": len(made.shards),
        "inputs": len(made.inputs),
        "documents": counts.documents, "written": counts.written, "skipped": counts.skipped, "failed": counts.failed,
        "engine": made.tokenizer.engine, "workers": report.workers, "seconds": round(report.seconds, 3),
        "bytes_read": report.bytes_read, "tokens_written": report.tokens_written,
        "shards_reused": report.shards_reused, "fingerprint": made.fingerprint,
    }  # fmt: skip
    summarize(summary, as_json)
