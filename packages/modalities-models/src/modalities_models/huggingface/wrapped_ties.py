"""Weights that a model of transformers uses twice."""

from __future__ import annotations

from typing import cast

from torch import nn

from modalities_core.errors import ConfigError
from modalities_models.head import TiedHead


def replace_ties(network: nn.Module) -> list[str]:
    """Let an output matrix that is the embedding read it from there, so that it is stored, sharded and saved once.

    Args:
        network: a causal language model of transformers; changed in place.

    Returns:
        Names of the parameters that are no longer there.

    Raises:
        ConfigError: something else is tied.
    """
    first: dict[int, str] = {}
    twice = {
        name: first[id(value)]
        for name, value in network.named_parameters(remove_duplicate=False)
        if first.setdefault(id(value), name) != name
    }
    for name, source in twice.items():
        (place, _, kind), (other, _, _) = name.rpartition("."), source.rpartition(".")
        module, embedding = network.get_submodule(place), network.get_submodule(other)
        plain = type(module) is nn.Linear and module.bias is None and kind == "weight"
        if not (plain and isinstance(embedding, nn.Embedding)):
            raise ConfigError(
                f"{type(network).__name__} uses {source} once more as {name}, which cannot be trained here",
                hint="config: {tie_word_embeddings: false} makes two of them, where the class allows that",
            )
        parent, _, attribute = place.rpartition(".")
        head = TiedHead(cast(nn.Embedding, embedding), network.get_parameter(name).shape[0])
        setattr(network.get_submodule(parent), attribute, head)
    return list(twice)
