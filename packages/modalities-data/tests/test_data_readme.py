"""What the README says about the package itself."""

from __future__ import annotations

import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest

from modalities_data.components import COMPONENTS

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def readme() -> str:
    return (PROJECT / "README.md").read_text(encoding="utf-8")


def test_dependencies_are_those_of_the_package(readme) -> None:
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = {match[0] for text in declared if (match := re.match(r"[\w-]+", text))}
    sentence = re.search(r"what it asks for is (.*?)\.\n", readme, re.DOTALL)
    assert sentence is not None
    assert set(re.findall(r"`([\w-]+)`", sentence[1])) == names


def test_every_component_stands_in_the_table_with_its_arguments(readme) -> None:
    rows = dict(re.findall(r"^\| `(\w+\.\w+)` \|(.*)\|$", readme, re.MULTILINE))
    assert set(rows) == set(COMPONENTS)
    for name, target in COMPONENTS.items():
        if name.startswith("batches."):  # they need torch
            continue
        module, _, attribute = target.partition(":")
        parameters = inspect.signature(getattr(importlib.import_module(module), attribute)).parameters.values()
        expected = [p.name if p.default is p.empty else f"{p.name}={p.default!r}".replace("'", '"') for p in parameters]
        assert re.findall(r"`([^`]+)`", rows[name].replace("\\|", "|")) == expected
