"""A run's configuration as it may leave the machine: without what looks like a secret."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from modalities_core.config.document import parse

RESOLVED = "config.resolved.yaml"
HIDDEN = "***"
_SECRET = frozenset({"key", "apikey", "token", "secret", "password", "passphrase", "credential", "credentials", "auth"})
_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")


def settings(folder: Path) -> dict[str, Any]:
    """The configuration of the run in ``folder``, references kept; empty for a run without one.

    References such as ``${env:NAME}`` are never resolved on disk. Beyond that, texts whose key ends with a word such
    as ``token`` or ``password``, and logins inside of addresses, become ``***``.
    """
    path = folder / RESOLVED
    if not path.is_file():
        return {}
    tree = parse(path.read_text(encoding="utf-8"), path.name, folder).tree
    return {name: without_secrets(value, name) for name, value in tree.items()}


def without_secrets(value: Any, name: str = "") -> Any:
    """Plain values with secrets replaced.

    Args:
        value: mappings, lists and scalars.
        name: the key that ``value`` stands under.
    """
    if isinstance(value, dict):
        return {key: without_secrets(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [without_secrets(item, name) for item in value]
    if not isinstance(value, str) or value.startswith("${"):
        return value
    if re.split(r"[_\W]+", name.lower())[-1] in _SECRET:
        return HIDDEN
    return _LOGIN.sub(f"{HIDDEN}@", value)


def flat(tree: Any, path: str = "") -> dict[str, str]:
    """Every scalar of a configuration as text under its dotted path, list items by number."""
    if isinstance(tree, dict):
        items = [(str(key), item) for key, item in tree.items()]
    elif isinstance(tree, list):
        items = [(str(place), item) for place, item in enumerate(tree)]
    else:
        return {path: str(tree)}
    return {name: text for key, item in items for name, text in flat(item, f"{path}.{key}" if path else key).items()}


def has_secret(arguments: list[str] | None = None) -> bool:
    """Whether a command line gives a secret, as in ``sink.api_key=...``; by default this process's own."""
    pairs = (argument.partition("=") for argument in (sys.argv if arguments is None else arguments))
    return any(equals and without_secrets(value, name) != value for name, equals, value in pairs)
