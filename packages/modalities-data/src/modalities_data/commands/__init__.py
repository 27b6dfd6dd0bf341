"""The commands: thin, every heavy import inside the one that needs it. One module per topic registers its own."""

from modalities_data.commands import (
    chat,
    chunk,
    convert,
    corpus,
    filter,
    image_text,
    index,
    look,
    merge,
    pack,
    shuffle,
    split,
    tokenizer,
)
from modalities_data.commands.group import data

__all__ = [
    "chat",
    "chunk",
    "convert",
    "corpus",
    "data",
    "filter",
    "image_text",
    "index",
    "look",
    "merge",
    "pack",
    "shuffle",
    "split",
    "tokenizer",
]
