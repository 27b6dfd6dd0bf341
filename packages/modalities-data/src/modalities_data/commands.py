"""The commands: thin, every heavy import inside the one that needs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from modalities_data.terminal import amount, packing_progress, say, summarize

if TYPE_CHECKING:
    from modalities_data.corpus import CorpusReport
    from modalities_data.prepare.pack import PackReport

PATH = click.Path(path_type=Path)
as_json_option = click.option("--json", "as_json", is_flag=True, help="End stdout with one line of JSON.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what is there.")
key_option = click.option("--key", default="text", show_default=True, help="The JSON key that holds the text.")
end_option = click.option("--end-of-document", default="<|endoftext|>", show_default=True, help="Ends every document.")


@click.group()
def data() -> None:
    r"""Text to packed, checksummed token datasets.

    \b
    Example: from text to a dataset
      modalities-data corpus stdlib corpus.jsonl
      modalities-data split corpus.jsonl train.jsonl held-out.jsonl
      modalities-data train-tokenizer train.jsonl tokenizer.json --vocab-size 8000
      modalities-data pack train.jsonl train --tokenizer tokenizer.json
      modalities-data pack held-out.jsonl held-out --tokenizer tokenizer.json
    """


@data.group()
def corpus() -> None:
    """Write text that is at hand without a network."""


@corpus.command()
@click.argument("output", type=PATH)
@overwrite_option
@as_json_option
def stdlib(output: Path, overwrite: bool, as_json: bool) -> None:
    r"""Write this Python's standard library, about 30 MB of source, to OUTPUT as JSON Lines.

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
    r"""Write made-up sentences that a model can learn from to OUTPUT as JSON Lines.

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
    r"""Split the documents of INPUT into TRAIN and HELD_OUT by a hash of their text.

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
    r"""Train a byte-level BPE tokenizer on INPUT and write it to OUTPUT, a tokenizer.json.

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


@data.command()
@click.argument("source", metavar="INPUT", type=PATH)
@click.argument("output", type=PATH)
@click.option("--tokenizer", required=True, metavar="PATH|bytes", help="A tokenizer.json, or bytes.")
@end_option
@click.option("--engine", type=click.Choice(["auto", "fastokens", "tokenizers"]), default="auto", show_default=True,
              help="What computes the ids; auto takes the fastest that is exact.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1), help="Processes; one per available core by default.")
@click.option("--on-error", type=click.Choice(["fail", "skip"]), default="fail", show_default=True,
              help="What to do with a line that is no document.")  # fmt: skip
@click.option("--range-bytes", type=click.IntRange(1), default=64 << 20, show_default=True,
              help="Input bytes per shard, at least.")  # fmt: skip
@key_option
@overwrite_option
@as_json_option
def pack(
    source: Path, output: Path, tokenizer: str, end_of_document: str, engine: str, workers: int | None,
    on_error: Literal["fail", "skip"], range_bytes: int, key: str, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Tokenize INPUT, a JSONL file, into the packed folder OUTPUT.

    Run it again if it was interrupted: finished shards are kept.

    \b
    Example: modalities-data pack train.jsonl train --tokenizer tokenizer.json
    """
    from modalities_data.prepare.pack import pack as pack_file
    from modalities_data.tokenizers.opening import named_tokenizer

    chosen = named_tokenizer(tokenizer, end_of_document, engine)
    with packing_progress() as progress:
        report = pack_file(
            source, output, chosen, workers=workers, on_error=on_error, overwrite=overwrite, key=key,
            range_bytes=range_bytes, on_progress=progress,
        )  # fmt: skip
    _tell_packed(output, report, as_json)


def _tell_packed(output: Path, report: PackReport, as_json: bool) -> None:
    made, counts = report.manifest, report.manifest.accounting
    skipped = "".join(f", {count} skipped as {rule}" for rule, count in counts.skipped.items())
    failed = f", {counts.failed} failed (see {output}/*.rejected.jsonl)" if counts.failed else ""
    reused = f", {report.shards_reused} shards from an earlier run" if report.shards_reused else ""
    say(
        f"{output}: {counts.written} of {counts.documents} documents, {amount(made.tokens, 'tokens')}{skipped}{failed}"
        f"; {report.seconds:.1f} s, {amount(report.bytes_read / report.seconds, 'B/s')}, "
        f"{amount(report.tokens_written / report.seconds, 'tokens/s')}, {made.tokenizer.engine}, "
        f"workers: {report.workers}{reused}",
        as_json,
    )
    summary = {
        "output": str(output), "tokens": made.tokens, "text_bytes": made.text_bytes, "shards": len(made.shards),
        "documents": counts.documents, "written": counts.written, "skipped": counts.skipped, "failed": counts.failed,
        "engine": made.tokenizer.engine, "workers": report.workers, "seconds": round(report.seconds, 3),
        "bytes_read": report.bytes_read, "tokens_written": report.tokens_written,
        "shards_reused": report.shards_reused, "fingerprint": made.fingerprint,
    }  # fmt: skip
    summarize(summary, as_json)


@data.command()
@click.argument("folder", type=PATH)
@click.option("--documents", type=click.IntRange(0), default=3, show_default=True, help="How many to show.")
@click.option("--characters", type=click.IntRange(1), default=200, show_default=True, help="How much of each.")
@as_json_option
def inspect(folder: Path, documents: int, characters: int, as_json: bool) -> None:
    r"""Show what is in the packed FOLDER: counts, lengths and some documents.

    \b
    Example: modalities-data inspect train --documents 5
    """
    from modalities_data.inspection import inspect_folder

    report = inspect_folder(folder, documents, characters)
    say(report.text, as_json)
    summarize(report.summary, as_json)


@data.command()
@click.argument("folder", type=PATH)
@as_json_option
def verify(folder: Path, as_json: bool) -> None:
    r"""Check every byte of the packed FOLDER against its checksums.

    \b
    Example: modalities-data verify train
    """
    from modalities_data.packed import verify as verify_folder

    made = verify_folder(folder)
    size = sum(shard.bytes + shard.index_bytes for shard in made.shards)
    say(f"{folder}: {len(made.shards)} shards, {amount(size, 'B')}, every checksum matches", as_json)
    summarize({"folder": str(folder), "shards": len(made.shards), "bytes": size, "fingerprint": made.fingerprint},
              as_json)  # fmt: skip
