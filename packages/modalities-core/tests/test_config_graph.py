"""Checking and building: references, types, unknown and unused names, circles, places of errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modalities_core.config.deferred import Deferred
from modalities_core.config.document import parse
from modalities_core.config.graph import Graph
from modalities_core.errors import ConfigError, DataError
from modalities_core.registry import Registry


class Model(Protocol):
    size: int

    def forward(self, x: int) -> int: ...


class Loss(Protocol):
    def __call__(self, a: int, b: int, c: int) -> int: ...


class Decoder:
    """A model.

    Args:
        size: how large
            it is.
        kind: which one.
    """

    def __init__(self, size: int, dropout: float = 0.0, path: Path = Path("p"), kind: Literal["a", "b"] = "a") -> None:
        if size < 0:
            raise ValueError(f"size {size} is negative")
        self.size, self.dropout, self.path, self.kind = size, dropout, path, kind

    def forward(self, x: int) -> int:
        return x


class Sizeless:
    def forward(self, x: int) -> int:
        return x


@dataclass(frozen=True)
class Schedule:
    warmup: int = 0

    def __call__(self, step: int) -> float:
        return float(step)


@dataclass
class Optimizer:
    model: Model
    lr: float
    betas: tuple[float, float]
    schedule: Schedule | float


def adamw(
    model: Model, lr: float, betas: tuple[float, float] = (0.9, 0.95), schedule: Schedule | float = 1.0
) -> Optimizer:
    if lr > 1:
        raise ConfigError("lr is above 1", about=(model, "size"))
    if lr == 0.5:
        raise DataError("no data", hint="get some")
    return Optimizer(model, lr, betas, schedule)


def sharded(model: Deferred[Model], name: str = "n") -> Model:
    return model()


@dataclass
class Trainer:
    optimizer: Optimizer
    models: Sequence[Model] = ()
    steps: int = 1
    loss: Loss | None = None
    named: dict[str, Schedule] | None = None
    note: str = ""


COMPONENTS: dict[str, Any] = {
    "model.decoder": Decoder,
    "model.sizeless": Sizeless,
    "model.sharded": sharded,
    "optimizer.adamw": adamw,
    "schedule.linear": Schedule,
    "trainer.default": Trainer,
}

GOOD = """\
version: 1
settings: {lr: 1e-3, steps: 5, name: demo}
model:
  component: model.decoder
  size: 3
  path: a/b
optimizer: {component: optimizer.adamw, model: "${model}", lr: "${settings.lr}"}
trainer:
  component: trainer.default
  optimizer: ${optimizer}
  models: ["${model}", "${optimizer.model}", {component: model.decoder, size: 9}]
  steps: ${settings.steps}
  note: run ${settings.name} of ${settings.steps} $${x}
"""


def graph_of(text: str) -> Graph:
    registry = Registry()
    for name, component in COMPONENTS.items():
        registry.add(name, component)
    return Graph(parse(text, "c.yaml", Path("/base")), registry, {"trainer": Trainer, "tokenizer": Model | None})


def problems(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        graph_of(text).check()
    return str(caught.value)


def test_objects_are_built_once_and_shared() -> None:
    graph = graph_of(GOOD)
    graph.check()
    trainer = graph.build("trainer")
    assert trainer.models[0] is trainer.optimizer.model is trainer.models[1]
    assert trainer.models[2] is not trainer.models[0]
    assert trainer.models[0].path == Path("/base/a/b")
    assert trainer.optimizer.betas == (0.9, 0.95)
    assert (trainer.steps, trainer.optimizer.lr) == (5, 1e-3)
    assert trainer.note == "run demo of 5 ${x}"
    assert graph.build("tokenizer") is None
    assert graph.build("trainer") is trainer
    assert graph.build("trainer.optimizer.model") is trainer.models[0]
    assert graph.path_of(trainer.models[0]) == ("model",)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("  size: 3", "  sizee: 3", ["model.sizee: `model.decoder` has no argument", "`size`? (c.yaml:5)"]),
        ("  size: 3", "  dropout: 3", ["model: `model.decoder` needs the argument `size` (c.yaml:3)"]),
        ("steps: 5", "stesp: 5", ["${settings.steps} leads nowhere; did you mean `settings.stesp`?"]),
        ("version: 1", "version: 0", ["version: version 0 is not known"]),
        ("version: 1\n", "", ["`version: 1` is missing"]),
        ("trainer:", "trainr:", ["`trainer` is missing; did you mean `trainr`?"]),
        ("\nmodel:", "\nmodl:", ["${model} leads nowhere; did you mean `modl`?", "modl: nothing refers to this name"]),
        ("size: 3", "size: '3'", ['model.size: must be a valid integer, but found "3" (c.yaml:5)']),
        ("size: 3", "size: 3.5", ["model.size: must be a valid integer"]),
        ("size: 3", "size: true", ["model.size: must be a valid integer, but found true"]),
        ("size: 3", "size: 3\n  kind: c", ["model.kind: must be 'a' or 'b', but found \"c\" (c.yaml:6)"]),
        ("size: 3", "size: ${settings.name}", ['model.size: must be a valid integer, but found "demo"']),
        ("size: 3", "size: ${optimizer}", ["model.size: needs int, but `optimizer.adamw` builds Optimizer"]),
        ("component: model.decoder", "componet: model.decoder", ["unknown key `componet`; did you mean `component`?"]),
        ("component: model.decoder", "component: model.decodr", ["`model.decodr`; did you mean `model.decoder`?"]),
        ("component: model.decoder", "component: os.system", ["unknown component `os.system`"]),
        ("component: model.decoder", "component: ${settings.name}", ["must be the name of a component, written out"]),
        ("${settings.lr}", "${optimizer.lr}", ["goes round in a circle: optimizer.lr -> optimizer.lr"]),
        ("optimizer: ${optimizer}", "optimizer: ${model}", ["needs Optimizer, but `model.decoder` builds Decoder"]),
        ("optimizer: ${optimizer}", "optimizer: 3", ["expected Optimizer", "found plain data: 3"]),
        ("steps: ${settings.steps}", "loss: {component: schedule.linear}", ["needs Loss or None, but"]),
        ("steps: ${settings.steps}", "named: {a: {component: schedule.linear, warm: 1}}", ["trainer.named.a.warm:"]),
        ("steps: ${settings.steps}", "steps: ${env:HF_TOKEN}", ["looks like a secret"]),
        ("steps: ${settings.steps}", "steps: ${env:PATH}", ["may not be read"]),
        ("steps: ${settings.steps}", "steps: ${env:MODALITIES_UNSET}", ["MODALITIES_UNSET is not set"]),
        ("version: 1", "version: 1\nextra: {a: 1}", ["extra: nothing refers to this name"]),
        ("steps: 5", "steps: 5, rest: 1", ["settings.rest: nothing refers to this name"]),
        ('model: "${model}"', "model: {component: model.decoder, size: 1, path: [1]}", ["optimizer.model.path:"]),
        ("lr: 1e-3", "lr: [1, 2]", ["optimizer.lr: must be a valid number, but found [1, 2]"]),
    ],
)  # fmt: skip
def test_each_mistake_is_named_with_its_place(old: str, new: str, expected: list[str]) -> None:
    assert old in GOOD
    text = problems(GOOD.replace(old, new, 1))
    for part in expected:
        assert part in text


def test_all_problems_come_at_once_in_the_order_of_the_document() -> None:
    text = problems(GOOD.replace("size: 3", "size: x").replace("1e-3", "high").replace("steps: 5", "steps: few"))
    assert [line.partition(":")[0] for line in text.splitlines()] == ["model.size", "optimizer.lr", "trainer.steps"]


def test_circles_of_objects_are_named() -> None:
    text = GOOD.replace("size: 3\n", "size: 3\n") + "  loss: ${a}\n"
    text += "a: {component: model.sharded, model: '${b}'}\nb: {component: model.sharded, model: '${a}'}\n"
    assert "the object is needed to build itself: a -> b -> a" in problems(text)


def test_unions_of_objects_and_plain_data() -> None:
    graph = graph_of(GOOD.replace('"${settings.lr}"}', '"${settings.lr}", schedule: 0.5}'))
    graph.check()
    assert graph.build("trainer").optimizer.schedule == 0.5
    graph = graph_of(GOOD.replace('"${settings.lr}"}', '"${settings.lr}", schedule: {component: schedule.linear}}'))
    graph.check()
    assert graph.build("trainer").optimizer.schedule == Schedule()


def test_deferred_arguments_are_built_when_called() -> None:
    text = GOOD.replace("{component: model.decoder, size: 9}", "{component: model.sharded, model: '${model}'}")
    graph = graph_of(text)
    graph.check()
    trainer = graph.build("trainer")
    assert trainer.models[2] is trainer.models[0]
    assert graph.path_of(trainer.models[0]) == ("model",)


def test_refusals_of_components_carry_path_and_line() -> None:
    cases = [
        ("size: 3", "size: -3", ConfigError, r"^model \(c.yaml:3\): size -3 is negative"),
        ("lr: 1e-3", "lr: 2.0", ConfigError, r"^model.size \(c.yaml:5\): lr is above 1"),
        ("lr: 1e-3", "lr: 0.5", DataError, r"^optimizer \(c.yaml:7\): no data\n  get some"),
        ("component: model.decoder", "component: model.sizeless", ConfigError, "a Sizeless is not a Model: it lacks"),
    ]  # fmt: skip
    for old, new, kind, message in cases:
        text = GOOD.replace(old, new, 1)
        text = text.replace("  size: 3\n  path: a/b\n", "") if "sizeless" in new else text
        graph = graph_of(text)
        graph.check()
        with pytest.raises(kind, match=message):
            graph.build("trainer")


def test_environment_variables_are_read_as_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODALITIES_STEPS", "12")
    graph = graph_of(GOOD.replace("steps: ${settings.steps}", "steps: ${env:MODALITIES_STEPS}"))
    graph.check()
    assert graph.build("trainer").steps == 12
    assert "${env:MODALITIES_STEPS}" in graph.document.dump()


KEYS = ["version", "settings", "lr", "steps", "name", "model", "component", "size", "path", "optimizer", "trainer"]


@given(key=st.sampled_from(KEYS), data=st.data())
def test_a_misspelt_key_is_refused_with_the_right_suggestion(key: str, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(key) - 1))
    letter = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz"))
    edit = data.draw(st.sampled_from(["replace", "drop", "insert"]))
    wrong = {
        "replace": key[:position] + letter + key[position + 1 :],
        "drop": key[:position] + key[position + 1 :],
        "insert": key[:position] + letter + key[position:],
    }[edit]
    if wrong in ("", key, *KEYS):
        return
    text = problems(GOOD.replace(f"{key}:", f"{wrong}:", 1))
    assert f"`{key}`" in text or f".{key}`" in text or f"did you mean `{wrong}`" in text or f".{wrong}`" in text
