"""The commands: thin, every heavy import inside the one that needs it. One module per topic registers its own."""

from modalities_data.commands import corpus, look, pack, split, tokenizer
from modalities_data.commands.group import data

__all__ = ["corpus", "data", "look", "pack", "split", "tokenizer"]
