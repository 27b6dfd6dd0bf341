"""``inspect`` and ``verify``: what is in a packed folder."""

from __future__ import annotations

from pathlib import Path

import click

from modalities_data.commands.group import PATH, as_json_option, data
from modalities_data.terminal import amount, packing_progress, say, summarize


@data.command()
@click.argument("folder", type=PATH)
@click.option("--documents", type=click.IntRange(0), default=3, show_default=True, help="How many to show.")
@click.option("--characters", type=click.IntRange(1), default=200, show_default=True, help="How much of each.")
@as_json_option
def inspect(folder: Path, documents: int, characters: int, as_json: bool) -> None:
    """Show what is in the packed FOLDER: counts, lengths and some documents.

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
    """Check every byte of FOLDER, packed or of images and captions, against its checksums.

    \b
    Example: modalities-data verify train
    """
    from modalities_data import image_text
    from modalities_data.packed import verify as verify_folder

    if image_text.is_image_text(folder):
        manifest = image_text.read_manifest(folder)
        image_text.verify(folder, manifest)
        say(f"{folder}: {manifest.images} images, {amount(manifest.bytes, 'B')}, every checksum matches", as_json)
        summarize({"folder": str(folder), "images": manifest.images, "bytes": manifest.bytes,
                   "fingerprint": manifest.fingerprint}, as_json)  # fmt: skip
        return
    with packing_progress("verifying") as progress:
        made = verify_folder(folder, progress)
    size = sum(shard.bytes + shard.index_bytes for shard in made.shards)
    say(f"{folder}: {len(made.shards)} shards, {amount(size, 'B')}, every checksum matches", as_json)
    summarize({"folder": str(folder), "shards": len(made.shards), "bytes": size, "fingerprint": made.fingerprint},
              as_json)  # fmt: skip
