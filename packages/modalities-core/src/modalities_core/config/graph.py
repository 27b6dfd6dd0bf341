"""The graph of a document: built depth first, every object once.

``Graph.check`` finds all problems of a document's form without building anything. ``Graph.build`` calls the
components; whatever they refuse is reported with its config path and line.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modalities_core.config import references
from modalities_core.config.arguments import (
    Argument,
    alternatives,
    convert,
    is_object,
    is_protocol,
    list_item,
    mapping_item,
    protocol_members,
    signature,
    takes_objects,
    type_name,
)
from modalities_core.config.checking import check
from modalities_core.config.document import Document
from modalities_core.config.positions import NodePath, dotted, located
from modalities_core.errors import ConfigError, ModalitiesError
from modalities_core.registry import Registry


class Graph:
    """A document whose components can be checked and built.

    Args:
        document: the values and their positions.
        registry: the names that may be built.
        roots: the top-level names the program will build, each with the type it must have; a type that admits None
            makes the name optional. Every other top-level name must be reachable from these.
    """

    def __init__(self, document: Document, registry: Registry, roots: Mapping[str, Any]) -> None:
        self.document = document
        self.registry = registry
        self.roots = roots
        self._built: dict[NodePath, Any] = {}
        self._origins: dict[int, NodePath] = {}

    def check(self) -> None:
        """Find everything that is wrong with the document's form.

        Raises:
            DocumentError: with one line per problem, in the order of the document.
        """
        check(self.document, self.registry, self.roots)

    def build(self, name: str) -> Any:
        """The object at a dotted path, with all it needs; None for a root the document does not have.

        Raises:
            ModalitiesError: a component refused its arguments; it names the config path and the line.
        """
        if name in self.roots and name not in self.document.tree:
            return None
        path = references.resolve(self.document, name)
        return self._value(path, Argument(name, self.roots.get(name, object), None, "", deferred=False))

    def path_of(self, built: object) -> NodePath | None:
        """Where ``built`` stands in the document."""
        return self._origins.get(id(built))

    def _value(self, path: NodePath, argument: Argument) -> Any:
        """The value of an argument: an object, a container of them, a callable for a deferred one, or plain data."""
        target = references.target(self.document, path)
        value = self.document.get(target) if target is not None else None
        if target is not None and isinstance(value, dict) and "component" in value:
            if argument.deferred:
                return lambda: self._object(path, target, argument.annotation)
            return self._object(path, target, argument.annotation)
        if target is not None and isinstance(value, (list, dict)) and takes_objects(argument.annotation):
            return self._container(target, value, argument)
        plain = convert(references.plain(self.document, path, set()), argument.annotation)
        return _absolute(plain, self.document.folder)

    def _container(self, target: NodePath, value: Any, argument: Argument) -> Any:
        for member in alternatives(argument.annotation):
            item = list_item(member) if isinstance(value, list) else mapping_item(member)
            if item is None:
                continue
            keys = range(len(value)) if isinstance(value, list) else value
            built = {key: self._value((*target, key), Argument(str(key), item, None, "", False)) for key in keys}
            return list(built.values()) if isinstance(value, list) else built
        raise AssertionError(f"unchecked container at {dotted(target)}")

    def _object(self, path: NodePath, target: NodePath, annotation: Any) -> Any:
        """Build the component at ``target`` for use at ``path``."""
        built = self._node(target)
        if not any(_is_instance(built, member) for member in alternatives(annotation)):
            lacks = [name for member in alternatives(annotation) for name in _lacking(built, member)]
            message = f"a {type(built).__name__} is not a {type_name(annotation)}" + (
                f": it lacks {', '.join(lacks)}" if lacks else ""
            )
            raise located(ConfigError(message), path, self.document.position(path))
        return built

    def _node(self, path: NodePath) -> Any:
        if path in self._built:
            return self._built[path]
        node = self.document.get(path)
        component = self.registry.entry(node["component"]).load()
        arguments = signature(component).arguments
        given = {key: self._value((*path, key), arguments[key]) for key in node if key != "component"}
        try:
            built = component(**given)
        except ModalitiesError as error:
            raise self._place(error, path) from error
        except ValueError as error:
            raise located(ConfigError(str(error)), path, self.document.position(path)) from error
        self._built[path] = built
        self._origins.setdefault(id(built), path)
        return built

    def _place(self, error: ModalitiesError, path: NodePath) -> ModalitiesError:
        """Turn what an error is about into a config path: the object it names, or the node under construction."""
        about, argument = error.about if isinstance(error.about, tuple) else (error.about, None)
        found = self._origins.get(id(about), path) if about is not None else path
        if argument and argument in self._arguments(found):
            found = (*found, argument)
        return located(error, found, self.document.position(found))

    def place(self, error: ModalitiesError) -> ModalitiesError:
        """Give an error raised while running the config path of the object it is about, if it names one."""
        about = error.about[0] if isinstance(error.about, tuple) else error.about
        return self._place(error, ()) if about is not None and id(about) in self._origins else error

    def _arguments(self, path: NodePath) -> Mapping[str, Argument]:
        return signature(self.registry.entry(self.document.get(path)["component"]).load()).arguments if path else {}


def _absolute(value: Any, folder: Path) -> Any:
    """Paths in ``value`` taken relative to ``folder``."""
    if isinstance(value, Path):
        return folder / value.expanduser()
    if isinstance(value, (list, tuple)):
        return type(value)(_absolute(item, folder) for item in value)
    if isinstance(value, dict):
        return {key: _absolute(item, folder) for key, item in value.items()}
    return value


def _is_instance(built: Any, annotation: Any) -> bool:
    if annotation in (Any, object):
        return True
    if not inspect.isclass(annotation):
        return not is_object(annotation) or callable(built)
    return not _lacking(built, annotation) if is_protocol(annotation) else isinstance(built, annotation)


def _lacking(built: Any, annotation: Any) -> list[str]:
    """The members of a protocol that an object does not have."""
    return (
        [name for name in protocol_members(annotation) if not hasattr(built, name)] if is_protocol(annotation) else []
    )
