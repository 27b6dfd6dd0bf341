"""The JSON Schema accepts what the graph accepts, and refuses what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modalities_core.config.document import parse
from modalities_core.config.schema import json_schema
from modalities_core.registry import Registry

jsonschema = pytest.importorskip("jsonschema")


class Part:
    """A part.

    Args:
        size: how large.
    """

    def __init__(self, size: int, mode: str = "x", shape: tuple[int, int] = (1, 2)) -> None: ...

    def act(self) -> None: ...


class Other: ...


def whole(parts: list[Part], best: Part | None = None) -> Other:
    """Puts parts together."""
    return Other()


@pytest.fixture
def schema() -> dict[str, Any]:
    registry = Registry()
    registry.add("part.plain", Part)
    registry.add("whole.plain", whole)
    return json_schema(registry, {"whole": Other})


def accepts(schema: dict[str, Any], text: str) -> bool:
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema).is_valid(parse(text, "c", Path("/")).tree)


GOOD = """
version: 1
settings: {n: 3}
one: {component: part.plain, size: "${settings.n}", shape: [3, "${settings.n}"]}
whole: {component: whole.plain, parts: ["${one}", {component: part.plain, size: 2}], best: null}
"""


def test_a_good_document_is_accepted(schema: dict[str, Any]) -> None:
    assert accepts(schema, GOOD)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("size: 2", "sice: 2"),
        ("size: 2", "size: two"),
        ("part.plain, size: 2", "part.plane, size: 2"),
        ("part.plain, size: 2", "whole.plain, parts: []"),
        ("best: null", "best: 3"),
        ("best: null", "best: {component: whole.plain, parts: []}"),
        ("version: 1", "version: 2"),
        ("[3,", "[x,"),
        ("whole: {", "hole: {"),
    ],
)
def test_mistakes_are_refused(schema: dict[str, Any], old: str, new: str) -> None:
    assert old in GOOD
    assert not accepts(schema, GOOD.replace(old, new, 1))


def test_help_and_defaults_are_in_the_schema(schema: dict[str, Any]) -> None:
    branch = schema["$defs"]["component"]["allOf"][0]["then"]
    assert branch["description"] == "A part."
    assert branch["properties"]["size"]["description"] == "how large."
    assert branch["properties"]["mode"]["default"] == "x"
    assert branch["required"] == ["component", "size"]
