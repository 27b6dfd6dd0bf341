"""Names, clashes, broken packages, optional dependencies."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint
from typing import Any, Literal

import pytest

from modalities_core.config.arguments import signature, type_name
from modalities_core.errors import ConfigError
from modalities_core.registry import COMPONENT_GROUP, Registry, register, registry


class Thing:
    """A thing.

    Args:
        a: the first
            of two.
        b: the second.
    """

    def __init__(self, a: int, b: str = "x") -> None: ...


def test_a_clash_names_both_packages() -> None:
    found = Registry()
    found.add("model.thing", Thing, "package-one")
    found.add("model.thing", Thing, "package-two")  # the same target is no clash
    with pytest.raises(ConfigError, match="registered twice: by package-two and by package-three"):
        found.add("model.thing", "other:Thing", "package-three")


@pytest.mark.parametrize("name", ["thing", "Model.thing", "model.", "model.a.b", "model.the thing"])
def test_malformed_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="must look like `kind.variant`"):
        Registry().add(name, Thing)


def test_listing_imports_nothing_and_loading_explains() -> None:
    found = Registry()
    found.add("sink.lost", "no_such_package_at_all.sinks:Sink", "some-plugin")
    assert [entry.name for entry in found] == ["sink.lost"]
    with pytest.raises(ConfigError, match="needs the module `no_such_package_at_all`") as caught:
        found.entry("sink.lost").load()
    assert "pip install no_such_package_at_all" in str(caught.value)
    found.add("sink.wrong", "json:no_such_name", "some-plugin")
    with pytest.raises(ConfigError, match="AttributeError"):
        found.entry("sink.wrong").load()


def test_a_broken_package_is_remembered_not_raised() -> None:
    found = Registry()
    found.add_entry_point(EntryPoint("x", "no_such_package_at_all:COMPONENTS", COMPONENT_GROUP))
    found.add_entry_point(EntryPoint("y", "json:dumps", COMPONENT_GROUP))
    assert len(found.broken) == 2
    with pytest.raises(ConfigError, match="could not be loaded"):
        found.entry("model.missing")


def test_register_makes_a_component_known_to_this_process() -> None:
    @register("part.of_this_test")
    def part(size: int = 3) -> Thing:
        return Thing(size)

    assert registry().entry("part.of_this_test").load() is part


def test_signatures_come_with_help() -> None:
    found = signature(Thing)
    assert found.help == "A thing."
    assert found.arguments["a"].help == "the first of two."
    assert found.arguments["a"].required
    assert found.arguments["b"].default == "x"


def no_return(a: int):  # type: ignore[no-untyped-def]
    ...


def no_annotation(a, b: int) -> int:  # type: ignore[no-untyped-def]
    return b


def variadic(*a: int) -> int:
    return 0


def keywords(**a: int) -> int:
    return 0


@pytest.mark.parametrize("function", [no_return, no_annotation, variadic, keywords])
def test_what_cannot_be_a_component(function: Any) -> None:
    with pytest.raises(ConfigError):
        signature(function)


def test_types_are_named_as_they_are_written() -> None:
    assert type_name(tuple[float, float]) == "tuple[float, float]"
    assert type_name(Sequence[Thing]) == "Sequence[Thing]"
    assert type_name(Thing | None) == "Thing | None"
    assert type_name(Literal["a", "b"] | int) == "Literal['a', 'b'] | int"
    assert type_name(int) == "int"
