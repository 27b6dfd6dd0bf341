"""Which parameters get which settings."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from training_parts import TinyModel

from modalities_core.config.document import parse
from modalities_core.config.graph import Graph
from modalities_core.config.positions import DocumentError
from modalities_core.errors import ConfigError
from modalities_core.registry import registry
from modalities_core.training.optim import ParameterGroup, adam, adamw, lion, muon, sgd


def named(optimizer):
    return [(set(group["param_names"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups]


def test_groups_take_what_they_match_and_keep_their_settings():
    groups = [
        ParameterGroup(parameters=("embed*",), lr=0.5),
        ParameterGroup(parameters=("*norm*", "embed*"), weight_decay=0.3),
        ParameterGroup(parameters=("head.*",), betas=(0.5, 0.6)),
    ]
    optimizer = adamw(TinyModel(), lr=1.0, groups=groups)
    assert named(optimizer) == [
        ({"hidden.weight"}, 1.0, 0.1),
        ({"hidden.bias"}, 1.0, 0.0),
        ({"embedding.weight"}, 0.5, 0.0),
        ({"norm.weight", "norm.bias"}, 1.0, 0.3),
        ({"head.weight"}, 1.0, 0.1),
    ]
    assert [group["betas"] for group in optimizer.param_groups][3:] == [(0.9, 0.95), (0.5, 0.6)]


def test_groups_are_refused_where_they_change_nothing():
    with pytest.raises(ConfigError, match=r"groups has 'haed\.\*'"):
        adamw(TinyModel(), lr=1.0, groups=[ParameterGroup(parameters=("haed.*",))])
    twice = [ParameterGroup(parameters=("head.*",)), ParameterGroup(parameters=("head.weight",))]
    with pytest.raises(ConfigError, match=r"groups\[1\] gets no parameter"):
        adamw(TinyModel(), lr=1.0, groups=twice)
    with pytest.raises(ConfigError, match=r"groups\[0\] sets eps, which"):
        lion(TinyModel(), lr=1.0, groups=[ParameterGroup(parameters=("head.*",), eps=1e-3)])
    with pytest.raises(ConfigError, match=r"groups\[0\]\.lr has to be positive"):
        adam(TinyModel(), lr=1.0, groups=[ParameterGroup(parameters=("head.*",), lr=-1.0)])
    with pytest.raises(ConfigError, match="zero in all groups or in none"):
        sgd(TinyModel(), lr=1.0, groups=[ParameterGroup(parameters=("head.*",), momentum=0.0)])
    with pytest.raises(ConfigError, match="nesterov"):
        sgd(TinyModel(), lr=1.0, momentum=0.0, nesterov=True)
    with pytest.raises(ValidationError, match="learning_rate"):
        ParameterGroup(parameters=("head.*",), learning_rate=1.0)


@pytest.mark.parametrize(
    ("component", "numbers"),
    [
        (adam, {"lr": 0.0}),
        (sgd, {"momentum": 1.0}),
        (sgd, {"weight_decay": -1.0}),
        (lion, {"betas": (0.9, 1.0)}),
        (muon, {"momentum": -0.1}),
        (muon, {"adamw_lr": 0.0}),
        (muon, {"eps": 0.0}),
    ],
)
def test_numbers_out_of_range_are_refused(component, numbers):
    with pytest.raises(ConfigError, match=next(iter(numbers))):
        component(TinyModel(), **({"lr": 1.0} | numbers))


def test_muon_has_the_matrices_and_adamw_the_rest():
    optimizer = muon(TinyModel(), lr=1.0, adamw_lr=0.5)
    assert named(optimizer) == [
        ({"hidden.weight"}, 1.0, 0.1),
        ({"head.weight"}, 0.5, 0.1),
        ({"embedding.weight", "hidden.bias", "norm.weight", "norm.bias"}, 0.5, 0.0),
    ]
    assert [group["orthogonal"] for group in optimizer.param_groups] == [True, False, False]


def test_what_adamw_takes_from_muon_can_be_named():
    optimizer = muon(TinyModel(), lr=1.0, by_adamw=("embedding.*",))
    assert named(optimizer)[0][0] == {"hidden.weight", "head.weight"}
    with pytest.raises(ConfigError, match=r"by_adamw has 'haed\.\*'"):
        muon(TinyModel(), lr=1.0, by_adamw=("haed.*",))
    with pytest.raises(ConfigError, match="no matrix is left"):
        muon(TinyModel(), lr=1.0, by_adamw=("*",))


def build(text):
    pytest.importorskip("modalities_models", reason="the document has its decoder")
    model = "{component: model.decoder, preset: nano, sequence_length: 32, vocab_size: 300}"
    source = f"version: 1\nsettings: {{small: 1e-4}}\nmodel: {model}\nthing:\n  model: ${{model}}\n  lr: 1e-3\n{text}"
    graph = Graph(parse(source, "c.yaml", Path()), registry(), {"thing": object})
    graph.check()
    return graph.build("thing")


def test_groups_are_plain_data_in_a_document():
    optimizer = build(
        "  component: optimizer.lion\n  groups:\n    - {parameters: ['*norm*'], lr: '${settings.small}'}\n"
        "    - {parameters: ['embed*'], weight_decay: 0.5}\n"
    )
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups[1:]] == [(1e-4, 0.0), (1e-3, 0.5)]


@pytest.mark.parametrize("wrong", ["{parameters: ['*'], rate: 1}", "{parameters: ['*'], lr: fast}", "{lr: 1.0}"])
def test_mistakes_in_groups_have_a_position(wrong):
    with pytest.raises(DocumentError, match=r"thing\.groups.*c\.yaml:\d+"):
        build(f"  component: optimizer.lion\n  groups:\n    - {wrong}\n")


def test_meta_models_get_optimizers():
    with torch.device("meta"):
        model = TinyModel()
    for component in (adam, sgd, lion, muon):
        assert component(model, lr=1.0).param_groups
