"""References: ``${path}`` for the thing at that path, ``${env:NAME}`` for an environment variable.

A text that is one whole reference stands for the object or value itself; inside a longer text, values are inserted.
``$${`` writes a literal ``${``.
"""

from __future__ import annotations

import os
import re
from typing import Any

from modalities_core.config.document import Document, list_index, scalar
from modalities_core.config.positions import NodePath, dotted
from modalities_core.errors import ConfigError
from modalities_core.spelling import did_you_mean

_REFERENCE = re.compile(r"(?<!\$)\$\{([^{}]*)\}")
_ENVIRONMENT = re.compile(r"MODALITIES_\w+|SLURM_\w+|HOME|USER|HOSTNAME|TMPDIR|SCRATCH|RANK|LOCAL_RANK|WORLD_SIZE")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL|AUTH", re.IGNORECASE)


class DanglingReference(ConfigError):
    """A reference that leads nowhere; ``text`` is the path it names."""

    def __init__(self, message: str, text: str) -> None:
        super().__init__(message)
        self.text = text


def has_reference(text: object) -> bool:
    """Whether a value is text with a reference in it."""
    return isinstance(text, str) and _REFERENCE.search(text) is not None


def target(document: Document, path: NodePath) -> NodePath | None:
    """The path whose value stands at ``path``: itself, or where a chain of whole references ends.

    None if the chain ends in a value that has to be computed: an environment variable or text with insertions.

    Raises:
        ConfigError: a reference dangles or goes round in a circle.
    """
    return _chain(document, path)[-1]


def followed(document: Document, path: NodePath) -> set[NodePath]:
    """The paths that references from ``path`` lead through."""
    return {step for step in _chain(document, path)[1:] if step is not None}


def _chain(document: Document, path: NodePath) -> list[NodePath | None]:
    """``path`` and where each whole reference leads from there, in order."""
    chain: list[NodePath | None] = [path]
    while True:
        here = chain[-1]
        assert here is not None
        value = document.get(here)
        if not has_reference(value):
            return chain
        whole = _REFERENCE.fullmatch(value)
        if whole is None or whole.group(1).startswith("env:"):
            return [*chain, None]
        following = resolve(document, whole.group(1))
        if following in chain:
            circle = " -> ".join(dotted(step) for step in (*chain, following) if step is not None)
            raise ConfigError(f"the reference goes round in a circle: {circle}")
        chain.append(following)


def resolve(document: Document, text: str) -> NodePath:
    """The path that a reference's text names; references on the way are followed.

    Raises:
        ConfigError: there is nothing at that path.
    """
    path: NodePath = ()
    for part in text.strip().split("."):
        inner = document.get(path)
        if path and has_reference(inner):
            inner_path = target(document, path)
            path = path if inner_path is None else inner_path
            inner = document.get(path)
        try:
            key: str | int = list_index(part, len(inner)) if isinstance(inner, list) else part
        except KeyError:
            key = part
        if not (isinstance(inner, dict) and key in inner) and not isinstance(key, int):
            known = [dotted(at) for at in document.positions if at]
            raise DanglingReference(f"the reference ${{{text}}} leads nowhere{did_you_mean(text, known)}", text)
        path = (*path, key)
    return path


def plain(document: Document, path: NodePath, used: set[NodePath], open_paths: tuple[NodePath, ...] = ()) -> Any:
    """The plain value at ``path`` with every reference in it replaced; what was referred to is added to ``used``.

    Raises:
        ConfigError: a reference dangles, goes round in a circle, or leads to an object.
    """
    if path in open_paths:
        circle = " -> ".join(dotted(step) for step in (*open_paths, path))
        raise ConfigError(f"the reference goes round in a circle: {circle}")
    inside = (*open_paths, path)
    value = document.get(path)
    if isinstance(value, dict):
        if "component" in value:
            raise ConfigError(f"`{dotted(path)}` is an object (`{value['component']}`), but plain data is needed here")
        return {key: plain(document, (*path, key), used, inside) for key in value}
    if isinstance(value, list):
        return [plain(document, (*path, index), used, inside) for index in range(len(value))]
    if not isinstance(value, str):
        return value

    def insert(text: str) -> Any:
        if text.startswith("env:"):
            return environment(text.removeprefix("env:"))
        found = resolve(document, text)
        used.add(found)
        return plain(document, found, used, inside)

    if whole := _REFERENCE.fullmatch(value):
        return insert(whole.group(1))
    return _REFERENCE.sub(lambda match: str(insert(match.group(1))), value).replace("$${", "${")


def environment(name: str) -> Any:
    """The value of an environment variable a configuration may read, as a YAML scalar.

    Raises:
        ConfigError: the variable is unset, or not one that may be read.
    """
    if _SECRET.search(name):
        raise ConfigError(f"${{env:{name}}} looks like a secret; components read their credentials themselves")
    if not _ENVIRONMENT.fullmatch(name):
        raise ConfigError(
            f"${{env:{name}}} may not be read; allowed are MODALITIES_*, SLURM_*, HOME, USER, HOSTNAME, TMPDIR, "
            "SCRATCH, RANK, LOCAL_RANK and WORLD_SIZE"
        )
    if name not in os.environ:
        raise ConfigError(f"the environment variable {name} is not set")
    return scalar(os.environ[name])
