"""The command tree: help without heavy imports, unknown commands, plugins."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import click
import pytest
from click.testing import CliRunner

from modalities_cli import app as tree
from modalities_core.errors import ConfigError


@pytest.mark.parametrize("name", tree.COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    done = CliRunner().invoke(tree.app, [name, "--help"])
    assert done.exit_code == 0, done.output
    assert "Example" in done.output


def test_help_lists_every_command_with_a_sentence() -> None:
    done = CliRunner().invoke(tree.app, ["--help"])
    for name in tree.COMMANDS:
        assert f"  {name} " in done.output


def test_an_unknown_command_is_refused_with_the_nearest() -> None:
    done = CliRunner().invoke(tree.app, ["quickstrat"])
    assert done.exit_code == 2
    assert "did you mean `quickstart`?" in done.output


def plugin(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    points = [EntryPoint("extra", value, tree.COMMAND_GROUP), EntryPoint("run", "x:y", tree.COMMAND_GROUP)]
    monkeypatch.setattr(tree, "entry_points", lambda group: points)


@click.command()
def extra() -> None:
    """Say hello."""
    click.echo("hello")


def test_a_plugin_is_listed_without_being_imported_and_loaded_when_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(monkeypatch, "no_such_package_at_all:extra")
    listed = CliRunner().invoke(tree.app, ["--help"])
    assert listed.exit_code == 0
    assert "From plugins" in listed.output
    with pytest.raises(ConfigError, match="the command `extra` of .* cannot be loaded: ModuleNotFoundError"):
        CliRunner().invoke(tree.app, ["extra"], catch_exceptions=False)
    monkeypatch.setattr(EntryPoint, "load", lambda self: extra)
    assert CliRunner().invoke(tree.app, ["extra"]).output == "hello\n"
    monkeypatch.setattr(EntryPoint, "load", lambda self: print)
    with pytest.raises(ConfigError, match="is not a click command"):
        CliRunner().invoke(tree.app, ["extra"], catch_exceptions=False)


def test_our_own_commands_cannot_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(monkeypatch, "no_such_package_at_all:extra")
    assert "Train what CONFIG describes" in CliRunner().invoke(tree.app, ["run", "--help"]).output
