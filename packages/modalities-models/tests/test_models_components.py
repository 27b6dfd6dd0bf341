"""The package's components in the config language: built, described, and mistakes found at their config path."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from modalities_core.config.arguments import signature
from modalities_core.config.document import parse
from modalities_core.config.graph import Graph
from modalities_core.errors import ConfigError
from modalities_core.interfaces import Loss, Model
from modalities_core.registry import Registry
from modalities_models.components import COMPONENTS
from modalities_models.initialization import Llama
from modalities_models.losses import CrossEntropy

CONFIG = """
version: 1
model:
  component: model.decoder
  preset: nano
  vocab_size: 300
  layers: 1
  initialization: {component: initialization.llama, std: 0.01}
loss: {component: loss.cross_entropy, chunk_tokens: 64}
"""


def graph(text: str) -> Graph:
    registry = Registry()
    for name, target in COMPONENTS.items():
        registry.add(name, target)
    return Graph(parse(text, "c.yaml", Path(".")), registry, {"model": Model, "loss": Loss})


def test_a_config_builds_the_model_and_the_loss():
    built = graph(CONFIG)
    built.check()
    model, loss = built.build("model"), built.build("loss")
    assert isinstance(model, Model) and isinstance(loss, CrossEntropy)
    assert model.vocab_size == 300 and loss.chunk_tokens == 64
    assert isinstance(model.initialization, Llama) and model.initialization.std == 0.01


@pytest.mark.parametrize(
    ("before", "after", "place"),
    [
        ("preset: nano", "preset: nanoo", r"model\.preset"),
        ("layers: 1", "layers: 0", r"model\.layers"),
        ("layers: 1", "heads: 3", r"model\.heads"),
        ("layers: 1", "key_value_heads: 3", r"model\.key_value_heads"),
        ("layers: 1", "head_size: 7", r"model\.head_size"),
        ("layers: 1", "dropout: 1.5", r"model\.dropout"),
        ("std: 0.01", "std: -1.0", r"model\.initialization\.std"),
        ("chunk_tokens: 64", "chunk_tokens: 0", r"loss\.chunk_tokens"),
    ],
)
def test_a_mistake_names_its_config_path(before, after, place):
    wrong = graph(CONFIG.replace(before, after))
    with pytest.raises(ConfigError) as caught:
        (wrong.build("model"), wrong.build("loss"))
    assert re.match(place, str(caught.value)), caught.value


def test_every_argument_has_help():
    registry = Registry()
    for name, target in COMPONENTS.items():
        registry.add(name, target)
        for argument in signature(registry.entry(name).load()).arguments.values():
            assert argument.help, (name, argument.name)
