"""Which JSON types a tool's schema allows for an argument, and a text made one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.text.tool_calls.json_text import quoted_inside, whole_value

_PYTHON_LITERALS = {"True": "true", "False": "false", "None": "null"}
_FIRST_CHARS = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean"}
_PYTHON_TYPES = {
    str: "string", bool: "boolean", int: "number", float: "number", type(None): "null",
    dict: "object", list: "array",
}  # fmt: skip


def types_of_property(schema: Mapping[str, Any], name: str) -> frozenset[str]:
    """The types ("number" for "integer" too) of one property of an object's schema. What has no
    schema, or one that names no type, is taken for a string."""
    properties = schema.get("properties")
    found = properties.get(name) if isinstance(properties, Mapping) else None
    types: set[str] = set()
    waiting, seen = [found], set[int]()  # each schema once: references may form a circle
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping) and id(part) not in seen:
            seen.add(id(part))
            types |= _named_types(part)
            waiting += _alternatives(part, schema)
    return frozenset(types)


def _named_types(schema: Mapping[str, Any]) -> set[str]:
    named = schema.get("type")
    if named is not None:
        names = named if isinstance(named, list) else [named]
        return {"number" if name == "integer" else str(name) for name in names}
    values = schema["enum"] if isinstance(schema.get("enum"), list) else []
    if "const" in schema:
        values = [schema["const"]]
    return {_PYTHON_TYPES[type(value)] for value in values if type(value) in _PYTHON_TYPES}


def _alternatives(schema: Mapping[str, Any], root: Mapping[str, Any]) -> list[Any]:
    found = []
    if isinstance(schema.get("$ref"), str):
        found.append(_resolve(schema["$ref"], root))
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(key), list):
            found += schema[key]
    return found


def _resolve(reference: str, root: Mapping[str, Any]) -> Any:
    """What "#/$defs/Unit" points to in the same schema; None for anything else."""
    place: Any = root
    path = reference.split("/")
    if path[0] != "#":
        return None
    for part in path[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        place = place.get(key) if isinstance(place, Mapping) else None
    return place


def json_of_text(text: str, types: frozenset[str]) -> str:
    """The text as JSON of one of the types, or else as a string."""
    stripped = text.strip()
    value = whole_value(_PYTHON_LITERALS.get(stripped, stripped))
    if value is not None and value[0] != '"' and _type_of(value) in types:
        return value
    return f'"{quoted_inside(text)}"'


def _type_of(value: str) -> str:
    if value[0] == "n":
        return "null"
    return _FIRST_CHARS.get(value[0], "number")
