"""A component's signature is its schema: parameters with types, defaults and help, read from the code itself."""

from __future__ import annotations

import inspect
import json
import operator
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache, reduce
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from modalities_core.config.deferred import DeferredArgument
from modalities_core.errors import ConfigError

REQUIRED: Any = inspect.Parameter.empty
_PLAIN = (bool, int, float, str, Path, types.NoneType)


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a component.

    annotation: its type; of a deferred argument, the type of what the callable builds.
    """

    name: str
    annotation: Any
    default: Any
    help: str
    deferred: bool

    @property
    def required(self) -> bool:
        """Whether a configuration has to give it."""
        return self.default is REQUIRED


@dataclass(frozen=True, slots=True)
class Signature:
    """What a component takes, what it builds, and the first paragraph of its docstring."""

    arguments: dict[str, Argument]
    returns: Any
    help: str


@cache
def signature(component: Callable[..., Any]) -> Signature:
    """Read the signature of a class or function.

    Raises:
        ConfigError: it cannot be a component: unannotated, positional-only or variadic parameters, or, for a
            function, no return type.
    """
    where = f"{component.__module__}:{component.__qualname__}"
    is_class = inspect.isclass(component)
    try:
        hints = typing.get_type_hints(component.__init__ if is_class else component, include_extras=True)
    except NameError as error:
        raise ConfigError(f"component {where}: an annotation cannot be resolved: {error}") from None
    docs = _argument_help(component)
    arguments: dict[str, Argument] = {}
    for name, parameter in inspect.signature(component).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(f"component {where}: `{parameter}` cannot be given by name; spell its arguments out")
        if name not in hints:
            raise ConfigError(f"component {where}: the parameter `{name}` has no type annotation")
        annotation, deferred = _deferred(hints[name])
        arguments[name] = Argument(name, annotation, parameter.default, docs.get(name, ""), deferred)
    returns = component if is_class else hints.get("return", REQUIRED)
    if returns is REQUIRED:
        raise ConfigError(f"component {where}: the function has no return annotation")
    summary = inspect.getdoc(component) or ""
    return Signature(arguments, returns, summary.partition("\n\n")[0].replace("\n", " "))


def _deferred(annotation: Any) -> tuple[Any, bool]:
    """The type a deferred annotation builds, and whether it is one."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *extras = typing.get_args(annotation)
        if any(isinstance(extra, DeferredArgument) for extra in extras):
            return typing.get_args(inner)[1], True
    return annotation, False


def _argument_help(component: Callable[..., Any]) -> dict[str, str]:
    """The ``Args:`` lines (Google style) of a callable's docstring, and of ``__init__`` for a class."""
    found: dict[str, str] = {}
    sources = [component.__init__, component] if inspect.isclass(component) else [component]
    for source in sources:
        text = inspect.getdoc(source) or ""
        section = re.search(r"^(?:Args|Attributes):\n((?:[ \t]+.*\n?|\n)+)", text, re.MULTILINE)
        if not section:
            continue
        block = inspect.cleandoc("\n" + section.group(1))
        for match in re.finditer(r"^(\w+)(?: \([^)]*\))?: (.*(?:\n[ \t]+.*)*)", block, re.MULTILINE):
            found[match.group(1)] = re.sub(r"\s+", " ", match.group(2)).strip()
    return found


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone; ``Annotated`` is looked through."""
    if typing.get_origin(annotation) is typing.Annotated:
        return alternatives(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(inner for member in typing.get_args(annotation) for inner in alternatives(member))
    return (annotation,)


def is_object(annotation: Any) -> bool:
    """Whether values of this one type are built by components, not written as plain data."""
    if (origin := typing.get_origin(annotation)) is not None:
        return origin is Callable
    return (
        inspect.isclass(annotation)
        and annotation not in (*_PLAIN, list, dict, tuple, set, object)
        and not issubclass(annotation, (Enum, BaseModel))
        and annotation.__module__ != "typing"
    )


def list_item(annotation: Any) -> Any | None:
    """The item type of a list-like annotation, or None."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (list, Sequence, set, frozenset) and args:
        return args[0]
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return args[0]
    return None


def mapping_item(annotation: Any) -> Any | None:
    """The value type of a mapping annotation with text keys, or None."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    return args[1] if origin in (dict, Mapping) and len(args) == 2 and args[0] is str else None


def takes_objects(annotation: Any) -> bool:
    """Whether an object can stand somewhere in a value of this type."""
    for member in alternatives(annotation):
        item = list_item(member) or mapping_item(member)
        if is_object(member) or (item is not None and takes_objects(item)):
            return True
    return False


def plain_part(annotation: Any) -> Any | None:
    """The union of the members that are written as plain data; None where there is no such member."""
    members = [member for member in alternatives(annotation) if not takes_objects(member)]
    return reduce(operator.or_, members) if members else None


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)


def convert(value: Any, annotation: Any) -> Any:
    """Plain YAML data as a value of the type; strict, so that text never passes for a number.

    Raises:
        ValidationError: the data does not fit.
    """
    part = annotation if plain_part(annotation) in (None, annotation) else plain_part(annotation)
    return _adapter(part).validate_json(json.dumps(value), strict=True)


def convert_schema(annotation: Any) -> dict[str, Any]:
    """The JSON Schema of plain data of this type, with nothing to look up elsewhere."""
    schema = _adapter(annotation).json_schema()
    return _inlined(schema, schema.pop("$defs", {}))


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """Definitions put where they are referred to, since the whole would look for them at its own root."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(name := schema.get("$ref"), str):
        return _inlined(definitions[name.rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items()}


def type_name(annotation: Any) -> str:
    """A type as a reader writes it: ``tuple[float, float]``, ``Model | None``."""
    if annotation is types.NoneType:
        return "None"
    if len(members := alternatives(annotation)) > 1:
        return " | ".join(type_name(member) for member in members)
    if inspect.isclass(annotation) and typing.get_origin(annotation) is None:
        return annotation.__name__
    return re.sub(r"(?:[\w-]+\.)+(?=\w)", "", str(annotation))


def fits(returns: Any, annotation: Any) -> bool:
    """Whether what a component returns can be used where ``annotation`` is asked for.

    A protocol is matched by its methods: each must exist and take as many arguments. Data members are checked on the
    built object.
    """
    wanted = [member for member in alternatives(annotation) if is_object(member) or member in (Any, object)]
    return any(_fits_one(given, member) for given in alternatives(returns) for member in wanted)


def _fits_one(given: Any, wanted: Any) -> bool:
    if wanted in (Any, object) or given is Any or given is wanted or typing.get_origin(wanted) is Callable:
        return True
    if not inspect.isclass(given) or not inspect.isclass(wanted):
        return False
    if not is_protocol(wanted):
        return issubclass(given, wanted)
    if is_protocol(given):
        return wanted in given.__mro__
    members = {name: member for base in reversed(given.__mro__) for name, member in vars(base).items()}
    return all(_callable_like(members.get(name), method) for name, method in protocol_methods(wanted).items())


def is_protocol(annotation: Any) -> bool:
    """Whether a type is itself a Protocol, not a class that implements one."""
    return bool(getattr(annotation, "_is_protocol", False))


def protocol_methods(protocol: type) -> dict[str, Callable[..., Any]]:
    """The methods a protocol asks for, special ones included."""
    skipped = {"__init__", "__subclasshook__", "__init_subclass__", "__class_getitem__"}
    return {
        name: member
        for base in reversed(protocol.__mro__)
        if is_protocol(base) and base is not typing.Protocol
        for name, member in vars(base).items()
        if inspect.isfunction(member) and name not in skipped and not name.startswith("_abc")
    }


def protocol_members(protocol: type) -> list[str]:
    """The methods and data members a protocol asks for."""
    bases = [base for base in reversed(protocol.__mro__) if is_protocol(base) and base is not typing.Protocol]
    data = [name for base in bases for name in inspect.get_annotations(base) if not name.startswith("_")]
    return [*data, *protocol_methods(protocol)]


def _callable_like(candidate: Any, method: Callable[..., Any]) -> bool:
    """Whether ``candidate`` can be called with the arguments of ``method``."""
    if not callable(candidate):
        return False
    try:
        inspect.signature(candidate).bind(*inspect.signature(method).parameters)
    except (TypeError, ValueError):
        return False
    return True
