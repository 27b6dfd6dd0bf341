"""YAML text to plain values with positions: read safely, merged from ``extends``, changed by overrides.

The dialect is the YAML 1.2 core schema: ``1e-4`` is a number, ``yes`` is text. Duplicate keys, tags, merge keys,
documents over 1 MiB, deeper than 32 levels or grown beyond 100,000 values by aliases are refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modalities_core.config.positions import DocumentError, NodePath, Position, Problem, dotted
from modalities_core.errors import ConfigError
from modalities_core.spelling import did_you_mean

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """Composes nodes only; scalars are resolved by the YAML 1.2 core schema."""


_Loader.yaml_implicit_resolvers = {}


_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)|()\.(nan|NaN|NAN)")
_WORDS: dict[str, Any] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(("false", "False", "FALSE"), False)


def scalar(text: str) -> Any:
    """An unquoted YAML 1.2 scalar as None, bool, int, float or str."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text


class _Dumper(yaml.SafeDumper):
    """Writes text in quotes where our dialect would read something else, such as ``1e5``."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = None if isinstance(scalar(text), str) else "'"
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def dump(tree: Any) -> str:
    """Plain values as YAML that :func:`parse` reads back as the same values."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


@dataclass(slots=True)
class Document:
    """A configuration as plain values, and where each of them stands.

    tree: the top-level mapping.
    positions: of every key and list item, by path; the empty path is the document itself.
    folder: relative paths in the document are relative to it.
    text: the main file as the user wrote it.
    """

    tree: dict[str, Any]
    positions: dict[NodePath, Position]
    folder: Path
    text: str = ""
    overrides: list[str] = field(default_factory=list)

    def position(self, path: NodePath) -> Position | None:
        """The position of ``path``, or of the nearest ancestor that has one."""
        for end in range(len(path), -1, -1):
            if found := self.positions.get(path[:end]):
                return found
        return None

    def get(self, path: NodePath) -> Any:
        """The raw value at ``path``.

        Raises:
            KeyError: there is none.
        """
        value: Any = self.tree
        for part in path:
            if isinstance(value, list):
                part = list_index(part, len(value))
            elif not isinstance(value, dict) or part not in value:
                raise KeyError(dotted(path))
            value = value[part]
        return value

    def dump(self) -> str:
        """The document with ``extends`` and overrides applied, references kept, runnable from any folder."""
        tree = {key: value for key, value in self.tree.items() if key != "extends"}
        return dump({**tree, "relative_to": str(self.folder)})


def load(file: Path, overrides: Sequence[str] = ()) -> Document:
    """Read ``file``, what it extends, and apply ``path=value`` overrides.

    Raises:
        ConfigError: the file cannot be read, or the text is not valid.
    """
    document = _merged(file, ())
    folder = document.tree.get("relative_to", ".")
    if not isinstance(folder, str):
        raise DocumentError([Problem(("relative_to",), "must be a folder's name", document.position(("relative_to",)))])
    document.folder = (file.parent / folder).resolve()
    for override in overrides:
        apply_override(document, override)
    return document


def parse(text: str, name: str, folder: Path) -> Document:
    """Read one YAML document from ``text``; ``name`` stands in error messages."""
    problems: list[Problem] = []
    if len(text.encode()) > MAX_BYTES:
        raise ConfigError(f"{name}: larger than {MAX_BYTES >> 20} MiB", hint="a configuration is a page or two of text")
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        message = " ".join(part for part in (error.context, error.problem) if part)
        if "\\t" in message:
            message = "a tab where YAML allows only spaces"
        elif mark and "${" in text.splitlines()[min(mark.line, text.count("\n"))] and "flow" in message:
            message += '; inside { } and [ ] a reference needs quotes: "${...}"'
        position = Position(name, mark.line + 1) if mark else None
        raise DocumentError([Problem((), message, position)]) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: {error}") from None
    document = Document({}, {(): Position(name, 1)}, folder, text)
    if node is None:
        raise ConfigError(f"{name}: the document is empty", hint="`modalities quickstart` leaves one to start from")
    reader = _Reader(document, name, problems)
    tree = reader.value(node, (), 0)
    if not isinstance(tree, dict):
        problems.append(Problem((), "the document must be a mapping of names to parts", Position(name, 1)))
    if problems:
        raise DocumentError(problems)
    document.tree = tree
    return document


@dataclass(slots=True)
class _Reader:
    """Turns composed nodes into values; counts them so that aliases cannot explode."""

    document: Document
    name: str
    problems: list[Problem]
    values: int = 0

    def value(self, node: yaml.Node, path: NodePath, depth: int) -> Any:
        position = Position(self.name, node.start_mark.line + 1)
        self.values += 1
        if depth > MAX_DEPTH or self.values > MAX_VALUES:
            limit = f"deeper than {MAX_DEPTH} levels" if depth > MAX_DEPTH else f"more than {MAX_VALUES} values"
            raise DocumentError([Problem(path, f"the document is {limit}; aliases may repeat too much", position)])
        self.document.positions.setdefault(path, position)
        if isinstance(node, yaml.MappingNode):
            self.check_tag(node, path, position, "map")
            return self.mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            self.check_tag(node, path, position, "seq")
            return [self.value(item, (*path, index), depth + 1) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        self.check_tag(node, path, position, "str")
        return node.value if node.style in ("'", '"', "|", ">") else scalar(node.value)

    def mapping(self, node: yaml.MappingNode, path: NodePath, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            position = Position(self.name, key_node.start_mark.line + 1)
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                self.problems.append(Problem(path, "a key must be text", position))
            elif key in result:
                first = self.document.positions[(*path, key)]
                self.problems.append(
                    Problem((*path, key), f"the key stands twice, first in line {first.line}", position)
                )
            elif key == "<<":
                self.problems.append(Problem((*path, key), "merge keys are not supported; use `extends`", position))
            else:
                self.document.positions[(*path, key)] = position
                result[key] = self.value(value_node, (*path, key), depth + 1)
        return result

    def check_tag(self, node: yaml.Node, path: NodePath, position: Position, kind: str) -> None:
        if node.tag not in (f"tag:yaml.org,2002:{kind}", "!"):
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            self.problems.append(
                Problem(path, f"the tag `{tag}` is refused: only registered components are built", position)
            )


def _merged(file: Path, seen: tuple[Path, ...]) -> Document:
    """``file`` over everything it extends."""
    real = file.resolve()
    if real in seen:
        chain = " -> ".join(path.name for path in (*seen, real))
        raise ConfigError(f"{file}: `extends` goes round in a circle: {chain}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = did_you_mean(file.name, [path.name for path in file.parent.glob("*.y*ml")])
        raise ConfigError(f"no such configuration file: {file}{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
    document = parse(text, str(file), real.parent)
    bases = document.tree.get("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise DocumentError(
            [Problem(("extends",), "must be a file name or a list of them", document.position(("extends",)))]
        )
    for base in reversed(bases):
        below = _merged(file.parent / base, (*seen, real))
        _merge_into(below, document, ())
        document.tree, document.positions = below.tree, below.positions
    return document


def _merge_into(below: Document, above: Document, path: NodePath) -> None:
    """Lay the mapping at ``path`` of ``above`` over that of ``below``; another component replaces the whole node."""
    under, over = below.get(path), above.get(path)
    for key, value in over.items():
        here = (*path, key)
        old = under.get(key)
        same = isinstance(old, dict) and isinstance(value, dict)
        if same and value.get("component", old.get("component")) == old.get("component"):
            below.positions[here] = above.positions[here]
            _merge_into(below, above, here)
            continue
        under[key] = value
        below.positions = {at: p for at, p in below.positions.items() if at[: len(here)] != here}
        below.positions |= {at: p for at, p in above.positions.items() if at[: len(here)] == here}


def apply_override(document: Document, override: str) -> None:
    """Set one value from ``path=value``; the value is YAML.

    Only what exists can be set, or an argument of a component that exists: a misspelt path is refused.

    Raises:
        ConfigError: the override is malformed or names nothing.
    """
    path_text, equals, value_text = override.partition("=")
    if not equals or not path_text.strip():
        raise ConfigError(f"override `{override}` is not of the form path=value", hint="for example optimizer.lr=1e-3")
    path: NodePath = tuple(path_text.strip().split("."))
    position = Position(f"override {override}", 0)
    value = parse(f"value: {value_text}", f"override {override}", document.folder).tree["value"]
    parent: Any = None
    with suppress(KeyError):
        parent = document.get(path[:-1])
    last: Any = path[-1]
    if isinstance(parent, list):
        try:
            last = list_index(last, len(parent))
        except KeyError:
            parent = None
    if isinstance(parent, list) or (isinstance(parent, dict) and (last in parent or "component" in parent)):
        parent[last] = value
        where = (*path[:-1], last)
        document.positions = {at: p for at, p in document.positions.items() if at[: len(where)] != where}
        document.positions[where] = position
        document.overrides.append(override)
        return
    paths = [dotted(at) for at in document.positions if at]
    raise ConfigError(f"override `{override}`: there is no `{dotted(path)}`{did_you_mean(dotted(path), paths)}")


def list_index(part: str | int, length: int) -> int:
    """A path part as an index into a list of ``length`` items.

    Raises:
        KeyError: it is not one.
    """
    if isinstance(part, str) and not part.isdigit():
        raise KeyError(part)
    index = int(part)
    if index >= length:
        raise KeyError(part)
    return index
