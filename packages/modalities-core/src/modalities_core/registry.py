"""The registry: which names a configuration may build, and from which package each comes.

Packages announce components through the entry-point group ``modalities.components``: each entry point names a mapping
of ``"kind.variant"`` to ``"module:attribute"``. The mapping holds strings, so listing imports no component. A program
registers its own with :func:`register`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from modalities_core.errors import ConfigError
from modalities_core.spelling import did_you_mean

COMPONENT_GROUP = "modalities.components"
_NAME = re.compile(r"[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*")

C = TypeVar("C", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Entry:
    """A registered name: what it builds (a callable, or where to import it from) and who registered it."""

    name: str
    target: Callable[..., Any] | str
    distribution: str

    @property
    def kind(self) -> str:
        """What stands before the dot, say ``optimizer``."""
        return self.name.partition(".")[0]

    def load(self) -> Callable[..., Any]:
        """The component itself.

        Raises:
            ConfigError: importing it failed; a missing optional dependency is named.
        """
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"component `{self.name}` of {self.distribution} needs the module `{error.name}`",
                hint=f"pip install {(error.name or '').partition('.')[0]}",
            ) from error
        except Exception as error:
            raise ConfigError(
                f"component `{self.name}` of {self.distribution} cannot be loaded from {self.target}: "
                f"{type(error).__name__}: {error}"
            ) from error


class Registry:
    """Names to components. Listing is cheap; a component's module is imported when it is first asked for."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self.broken: dict[str, str] = {}
        """Distributions whose component list could not be read, and why."""

    def add(self, name: str, target: Callable[..., Any] | str, distribution: str = "this program") -> None:
        """Register ``target`` under ``name``.

        Raises:
            ConfigError: the name is malformed or taken.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(f"component name `{name}` of {distribution} must look like `kind.variant`, in lower case")
        if (taken := self._entries.get(name)) and taken.target != target:
            raise ConfigError(
                f"component `{name}` is registered twice: by {taken.distribution} and by {distribution}",
                hint="uninstall one of the two or rename its component",
            )
        self._entries[name] = Entry(name, target, distribution)

    def add_entry_point(self, point: EntryPoint) -> None:
        """Register a package's mapping; one that cannot be read is remembered in ``broken``, not raised."""
        distribution = point.dist.name if point.dist else point.value
        try:
            mapping = point.load()
        except Exception as error:
            self.broken[distribution] = f"{type(error).__name__}: {error}"
            return
        if not isinstance(mapping, Mapping):
            self.broken[distribution] = f"{point.value} is not a mapping of names to `module:attribute`"
            return
        for name, target in mapping.items():
            self.add(name, target, distribution)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))

    def entry(self, name: str) -> Entry:
        """The entry for ``name``.

        Raises:
            ConfigError: there is none; the message names the nearest and the kind's others.
        """
        if found := self._entries.get(name):
            return found
        kind = name.partition(".")[0]
        siblings = [entry.name for entry in self if entry.kind == kind]
        message = f"unknown component `{name}`{did_you_mean(name, self._entries)}"
        if siblings:
            message += f" (known: {', '.join(siblings)})"
        if self.broken:
            message += "".join(f"; {dist} could not be loaded ({why})" for dist, why in self.broken.items())
        raise ConfigError(message)


@cache
def registry() -> Registry:
    """The process's registry, filled from the installed packages at the first call."""
    found = Registry()
    for point in sorted(entry_points(group=COMPONENT_GROUP), key=lambda point: (point.value, point.name)):
        found.add_entry_point(point)
    return found


def register(name: str) -> Callable[[C], C]:
    """Decorator: make an annotated callable available to configurations of this process as ``name``."""

    def add(component: C) -> C:
        registry().add(name, component)
        return component

    return add
