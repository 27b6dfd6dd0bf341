"""The JSON Schema of the whole language, generated from the registry, for editors and other tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modalities_core.config.arguments import (
    Argument,
    Signature,
    alternatives,
    convert_schema,
    fits,
    is_object,
    list_item,
    mapping_item,
    plain_part,
    signature,
    takes_objects,
)
from modalities_core.config.checking import VERSION
from modalities_core.errors import ConfigError
from modalities_core.registry import Registry

REFERENCE = {"type": "string", "pattern": r"\$\{[^{}]+\}", "description": "A reference: ${path.to.it}"}


def json_schema(registry: Registry, roots: Mapping[str, Any]) -> dict[str, Any]:
    """The schema (draft 2020-12) of every document that may be written with the registered components."""
    signatures: dict[str, Signature] = {}
    for entry in registry:
        try:
            signatures[entry.name] = signature(entry.load())
        except ConfigError:
            # A component whose optional dependency is not installed cannot be described, and cannot be used either.
            continue
    properties: dict[str, Any] = {
        "version": {"const": VERSION, "description": "The version of the configuration language."},
        "settings": {"type": "object", "description": "Named values to refer to as ${settings.name}."},
        "extends": {"description": "A document or documents to start from.", "type": ["string", "array"]},
        "relative_to": {"type": "string", "description": "The folder that relative paths are relative to."},
    }
    properties |= {name: _argument_schema(annotation, signatures) for name, annotation in roots.items()}
    required = [name for name, annotation in roots.items() if type(None) not in alternatives(annotation)]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Modalities configuration",
        "type": "object",
        "properties": properties,
        "required": ["version", *required],
        "additionalProperties": {"$ref": "#/$defs/node"},
        "$defs": {
            "reference": REFERENCE,
            "component": _component_schema(signatures),
            "node": {
                "if": {"type": "object", "required": ["component"]},
                "then": {"$ref": "#/$defs/component"},
                "else": {"type": ["object", "array", "string", "number", "boolean", "null"]},
            },
        },
    }


def _component_schema(signatures: Mapping[str, Signature]) -> dict[str, Any]:
    """A mapping with ``component``; which keys may follow depends on its name."""
    branches = []
    for name, found in signatures.items():
        properties = {argument.name: _described(argument, signatures) for argument in found.arguments.values()}
        branch = {
            "description": found.help,
            "properties": {"component": {"const": name}, **properties},
            "required": ["component", *(a.name for a in found.arguments.values() if a.required)],
            "additionalProperties": False,
        }
        branches.append(
            {"if": {"properties": {"component": {"const": name}}, "required": ["component"]}, "then": branch}
        )
    return {
        "type": "object",
        "properties": {"component": {"enum": list(signatures)}},
        "required": ["component"],
        "allOf": branches,
    }


def _described(argument: Argument, signatures: Mapping[str, Signature]) -> dict[str, Any]:
    schema = _argument_schema(argument.annotation, signatures)
    if argument.help:
        schema = {"description": argument.help, **schema}
    if not argument.required and isinstance(argument.default, (bool, int, float, str, type(None))):
        schema = {**schema, "default": argument.default}
    return schema


def _argument_schema(annotation: Any, signatures: Mapping[str, Signature]) -> dict[str, Any]:
    """What may stand where a value of this type is needed: a reference, plain data, or a component."""
    options: list[dict[str, Any]] = [{"$ref": "#/$defs/reference"}]
    part = plain_part(annotation)
    if part is not None:
        options.append(_with_references(convert_schema(part)))
    for member in alternatives(annotation):
        item = list_item(member)
        values = mapping_item(member)
        if is_object(member):
            names = [name for name, found in signatures.items() if fits(found.returns, member)]
            options.append({"$ref": "#/$defs/component", "properties": {"component": {"enum": names}}})
        elif item is not None and takes_objects(item):
            options.append({"type": "array", "items": _argument_schema(item, signatures)})
        elif values is not None and takes_objects(values):
            options.append({"type": "object", "additionalProperties": _argument_schema(values, signatures)})
    return {"anyOf": options}


def _with_references(schema: dict[str, Any]) -> dict[str, Any]:
    """Let a reference stand for any item of a list or mapping, and for any field of a group of settings, too."""
    changed = dict(schema)
    for key in ("items", "additionalProperties"):
        if isinstance(changed.get(key), dict):
            changed[key] = {"anyOf": [{"$ref": "#/$defs/reference"}, _with_references(changed[key])]}
    if isinstance(fields := changed.get("properties"), dict):
        any_of = {name: [{"$ref": "#/$defs/reference"}, _with_references(inner)] for name, inner in fields.items()}
        changed["properties"] = {name: {"anyOf": options} for name, options in any_of.items()}
    if isinstance(changed.get("prefixItems"), list):
        items = changed["prefixItems"]
        changed["prefixItems"] = [{"anyOf": [{"$ref": "#/$defs/reference"}, _with_references(i)]} for i in items]
    return changed
