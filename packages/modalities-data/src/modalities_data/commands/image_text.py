"""``image-text``."""

from __future__ import annotations

from pathlib import Path

import click

from modalities_data.commands.group import PATH, as_json_option, data, key_option, overwrite_option
from modalities_data.terminal import say, summarize


@data.command("image-text")
@click.argument("source", type=PATH)
@click.argument("output", type=PATH)
@click.option("--size", type=click.IntRange(1), help="Scale to this height and width, keeping the middle square.")
@click.option("--channels", type=click.Choice(["1", "3"]), default="3", show_default=True, help="1 is grey.")
@click.option("--image-key", default="image", show_default=True, help="The JSON key of the image's path.")
@key_option
@overwrite_option
@as_json_option
def image_text(
    source: Path, output: Path, size: int | None, channels: str, image_key: str, key: str, overwrite: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Write the images and captions that the JSONL file SOURCE lists to the folder OUTPUT, for dataset.image_text.

    Each line has an image's path, relative to SOURCE, and its caption or a list of captions. Images are .npy files of
    uint8 or, with modalities-data[images], whatever Pillow reads.

    \b
    Example: modalities-data image-text pictures/captions.jsonl train --size 224
    """
    from modalities_data.prepare.image_text import image_text as prepare

    made = prepare(source, output, size, int(channels), image_key, key, overwrite)
    say(f"{output}: {made.images} images of {made.height} x {made.width}, {made.captions} captions", as_json)
    summary = {"output": str(output), "images": made.images, "captions": made.captions, "shape": list(made.shape),
               "fingerprint": made.fingerprint}  # fmt: skip
    summarize(summary, as_json)
