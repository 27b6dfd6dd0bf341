"""The command group and the options its commands share."""

from __future__ import annotations

from pathlib import Path

import click

PATH = click.Path(path_type=Path)
as_json_option = click.option("--json", "as_json", is_flag=True, help="End stdout with one line of JSON.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what is there.")
key_option = click.option(
    "--key", default="text", show_default=True, help="The JSON key or Parquet column that holds the text."
)
format_option = click.option(
    "--format", "format_", type=click.Choice(["auto", "jsonl", "parquet", "text"]), default="auto", show_default=True,
    help="What the inputs hold; auto goes by their endings.")  # fmt: skip
end_option = click.option("--end-of-document", default="<|endoftext|>", show_default=True, help="Ends every document.")


@click.group()
def data() -> None:
    """Text to packed, checksummed token datasets.

    \b
    Example: from text to a dataset
      modalities-data corpus stdlib corpus.jsonl
      modalities-data split corpus.jsonl train.jsonl held-out.jsonl
      modalities-data train-tokenizer train.jsonl tokenizer.json --vocab-size 8000
      modalities-data pack train.jsonl train --tokenizer tokenizer.json
      modalities-data pack held-out.jsonl held-out --tokenizer tokenizer.json
    """
