"""Everything that is wrong with a document's form, found at once and without building anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from modalities_core.config import references
from modalities_core.config.arguments import (
    Signature,
    alternatives,
    convert,
    fits,
    is_object,
    list_item,
    mapping_item,
    plain_part,
    signature,
    takes_objects,
    type_name,
)
from modalities_core.config.document import Document
from modalities_core.config.positions import DocumentError, NodePath, Problem, dotted
from modalities_core.errors import ConfigError
from modalities_core.registry import Registry
from modalities_core.spelling import did_you_mean, nearest

VERSION = 1
RESERVED = ("version", "settings", "extends", "relative_to")


def check(document: Document, registry: Registry, roots: Mapping[str, Any]) -> None:
    """Check every component reachable from ``roots``, and that nothing else stands in the document.

    Raises:
        DocumentError: with one line per problem, in the order of the document.
    """
    checker = _Checker(document, registry, roots)
    checker.run()
    if checker.problems:
        unique = list(dict.fromkeys(checker.problems))
        raise DocumentError(sorted(unique, key=lambda p: (p.position.line if p.position else 0, dotted(p.path))))


class _Checker:
    """One pass over a document, collecting problems."""

    def __init__(self, document: Document, registry: Registry, roots: Mapping[str, Any]) -> None:
        self.document = document
        self.registry = registry
        self.roots = roots
        self.problems: list[Problem] = []
        self._checked: set[NodePath] = set()
        self._open: list[NodePath] = []
        self._used: set[NodePath] = set()
        self._dangling: list[str] = []

    def run(self) -> None:
        """Check the version, then what the roots reach, then that nothing is left over."""
        self._check_version()
        missing = False
        for name, annotation in self.roots.items():
            if name in self.document.tree:
                self._used.add((name,))
                self._check_value((name,), annotation)
            elif type(None) not in alternatives(annotation):
                missing = True
                self._problem((), f"`{name}` is missing{did_you_mean(name, self._strangers())}")
        self._check_unused(missing)

    def _check_version(self) -> None:
        version = self.document.tree.get("version")
        if version is None:
            near = nearest("version", self._strangers())
            self._problem(
                (), f"`version: {VERSION}` is missing" + (f"; did you mean `version` by `{near}`?" if near else "")
            )
        elif version != VERSION:
            self._problem(("version",), f"version {version} is not known to this release, which reads {VERSION}")

    def _strangers(self) -> list[str]:
        return [name for name in self.document.tree if name not in (*RESERVED, *self.roots)]

    def _check_unused(self, missing_root: bool) -> None:
        """Report top-level names and settings nothing refers to: they are misspelt or left over."""
        settings = self.document.tree.get("settings", {})
        if not isinstance(settings, dict):
            self._problem(("settings",), "must be a mapping of names to values")
            settings = {}
        unused = [(name,) for name in self._strangers()] + [("settings", name) for name in settings]
        wanted = [*RESERVED, *self.roots]
        for path in unused:
            if any(used[: len(path)] == path for used in self._used):
                continue
            dangling = [text if len(path) > 1 else text.partition(".")[0] for text in self._dangling]
            near = nearest(dotted(path), [*dangling, *(wanted if len(path) == 1 else [])])
            if near:
                self._problem(path, f"nothing refers to this name; did you mean `{near}`?")
            elif not missing_root:
                self._problem(path, f"nothing refers to this name; remove it, or refer to it with ${{{dotted(path)}}}")

    def _problem(self, path: NodePath, message: str) -> None:
        self.problems.append(Problem(path, message, self.document.position(path)))

    def _refused(self, path: NodePath, error: ConfigError) -> None:
        """Report what a reference or a component's import said."""
        if isinstance(error, references.DanglingReference):
            self._dangling.append(error.text)
        self._problem(path, error.message + (f" ({error.hint})" if error.hint else ""))

    def _check_value(self, path: NodePath, annotation: Any) -> None:
        """Check that what stands at ``path`` can become a value of type ``annotation``."""
        try:
            target = references.target(self.document, path)
        except ConfigError as error:
            self._refused(path, error)
            return
        if target is None:
            self._check_plain(path, annotation)
            return
        self._used |= references.followed(self.document, path)
        value = self.document.get(target)
        if isinstance(value, dict) and "component" in value:
            self._check_component(target)
            self._check_fits(path, target, annotation)
        elif takes_objects(annotation) and self._check_items(target, annotation):
            return
        elif plain_part(annotation) is None or (plain_part(annotation) is type(None) and value is not None):
            self._wrong_plain(path, target, value, annotation)
        else:
            self._check_plain(path, annotation)

    def _check_items(self, target: NodePath, annotation: Any) -> bool:
        """Check a list or mapping of objects item by item; False if value or annotation is neither."""
        value = self.document.get(target)
        if not isinstance(value, (list, dict)):
            return False
        for member in alternatives(annotation):
            item = list_item(member) if isinstance(value, list) else mapping_item(member)
            if item is not None:
                for key in range(len(value)) if isinstance(value, list) else value:
                    self._check_value((*target, key), item)
                return True
        return False

    def _wrong_plain(self, path: NodePath, target: NodePath, value: Any, annotation: Any) -> None:
        """Plain data where an object is needed."""
        if isinstance(value, dict) and (near := nearest("component", [key for key in value if isinstance(key, str)])):
            self._problem((*target, near), f"unknown key `{near}`; did you mean `component`?")
            return
        names = [type_name(member) for member in alternatives(annotation) if is_object(member)]
        kind = _snake(names[0]) if names else ""
        known = [entry.name for entry in self.registry if entry.kind == kind]
        what = f"expected {' or '.join(names) or 'a list of objects'}, built by a mapping with the key `component`"
        what += f" (one of {', '.join(known)})" if known else ""
        self._problem(path, f"{what}, but found plain data: {_shown(value)}")

    def _check_component(self, path: NodePath) -> None:
        """Check a component's name and arguments, once."""
        if path in self._open:
            circle = " -> ".join(dotted(step) for step in (*self._open[self._open.index(path) :], path))
            self._problem(path, f"the object is needed to build itself: {circle}")
        if path in self._checked:
            return
        self._checked.add(path)
        if found := self._signature(path):
            self._open.append(path)
            self._check_arguments(path, found)
            self._open.pop()

    def _check_arguments(self, path: NodePath, found: Signature) -> None:
        """Check that a component gets what it takes, and nothing else."""
        node = self.document.get(path)
        for key in node:
            if key != "component" and key not in found.arguments:
                takes = f" (it takes {', '.join(found.arguments)})" if found.arguments else " (it takes none)"
                near = did_you_mean(str(key), found.arguments)
                self._problem((*path, key), f"`{node['component']}` has no argument `{key}`{near or takes}")
        for argument in found.arguments.values():
            if argument.name in node:
                self._check_value((*path, argument.name), argument.annotation)
            elif argument.required:
                near = nearest(
                    argument.name, [key for key in node if key not in found.arguments and key != "component"]
                )
                by = f"; did you mean `{argument.name}` by `{near}`?" if near else ""
                self._problem(path, f"`{node['component']}` needs the argument `{argument.name}`{by}")

    def _signature(self, path: NodePath) -> Signature | None:
        """The signature of the component at ``path``; None after reporting why there is none."""
        name = self.document.get(path)["component"]
        if not isinstance(name, str) or references.has_reference(name):
            self._problem((*path, "component"), "must be the name of a component, written out")
            return None
        try:
            return signature(self.registry.entry(name).load())
        except ConfigError as error:
            self._refused((*path, "component"), error)
            return None

    def _check_fits(self, path: NodePath, target: NodePath, annotation: Any) -> None:
        """Check that the object built at ``target`` has the type asked for at ``path``."""
        name = self.document.get(target)["component"]
        if not isinstance(name, str) or name not in self.registry:
            return
        try:
            returns = signature(self.registry.entry(name).load()).returns
        except ConfigError:
            return
        if not fits(returns, annotation):
            wanted = " or ".join(type_name(member) for member in alternatives(annotation))
            self._problem(path, f"needs {wanted}, but `{name}` builds {type_name(returns)}")

    def _check_plain(self, path: NodePath, annotation: Any) -> None:
        """Check plain data, references inside it included, against its type."""
        try:
            convert(references.plain(self.document, path, self._used), annotation)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                inner = tuple(part for part in detail["loc"] if isinstance(part, (int, str)))
                at = (*path, *inner) if (*path, *inner) in self.document.positions else path
                self._problem(at, f"{_sentence(detail['msg'])}, but found {_shown(detail['input'])}")
        except ConfigError as error:
            self._refused(path, error)


def _shown(value: Any) -> str:
    """A value for a message, shortened."""
    text = json.dumps(value, default=str)
    return text if len(text) < 60 else text[:57] + "..."


def _sentence(text: str) -> str:
    """What pydantic found, as a part of our sentence."""
    return (text[0].lower() + text[1:]).replace("input should be", "must be")


def _snake(name: str) -> str:
    return "".join("_" + letter.lower() if letter.isupper() else letter for letter in name).lstrip("_")
