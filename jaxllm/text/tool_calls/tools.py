"""The tools of a request: OpenAI's list of functions, checked."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import Any

MAX_TOOLS = 128
MAX_TOOLS_CHARS = 256 * 1024  # of all tools as JSON
MAX_TOOLS_DEPTH = 32

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")
_JSON_TYPES = {"string", "number", "integer", "boolean", "object", "array", "null"}


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """A copy of a request's tools, with a schema of no parameters where there was none.

    Raises ValueError that says where: "tools[1].function.name must be ...".
    """
    if not isinstance(tools, list) or not 1 <= len(tools) <= MAX_TOOLS:
        got = f"{len(tools)} of them" if isinstance(tools, list) else type(tools).__name__
        raise ValueError(f"tools must be a list of 1 to {MAX_TOOLS} functions, got {got}")
    budget = _Budget()
    for i, tool in enumerate(tools):
        budget.check(tool, f"tools[{i}]")
    checked: list[dict[str, Any]] = []
    names: dict[str, int] = {}
    for i, tool in enumerate(tools):
        checked.append(_checked_tool(tool, f"tools[{i}]"))
        name = checked[-1]["function"]["name"]
        if name in names:
            raise ValueError(
                f"tools[{i}].function.name {name!r} is taken by tools[{names[name]}]; "
                "names must differ"
            )
        names[name] = i
    return checked


class _Budget:
    """What all tools together may cost. Checked first, and without recursion, so that what follows
    may trust the data."""

    def __init__(self) -> None:
        self._num_chars = 0

    def check(self, value: Any, place: str) -> None:
        waiting = [(value, 1)]
        while waiting:
            item, depth = waiting.pop()
            if depth > MAX_TOOLS_DEPTH:
                raise ValueError(f"{place} is nested more than {MAX_TOOLS_DEPTH} levels deep")
            self._spend(item, place)
            if isinstance(item, dict):
                for key in item:
                    if not isinstance(key, str):
                        raise ValueError(f"{place} has the key {key!r}, which is no string")
                    self._spend(key, place)
                waiting += [(part, depth + 1) for part in item.values()]
            elif isinstance(item, list):
                waiting += [(part, depth + 1) for part in item]

    def _spend(self, item: Any, place: str) -> None:
        if isinstance(item, str):
            self._num_chars += len(item)
            if not _is_unicode(item):
                raise ValueError(f"{place} has text with half of a surrogate pair")
        elif isinstance(item, float) and not math.isfinite(item):
            raise ValueError(f"{place} has the number {item}, which JSON does not know")
        elif not (item is None or isinstance(item, (bool, int, float, dict, list))):
            raise ValueError(f"{place} must be JSON data, got {type(item).__name__}")
        self._num_chars += 4  # quotes, comma, brackets
        if self._num_chars > MAX_TOOLS_CHARS:
            raise ValueError(f"tools must be at most {MAX_TOOLS_CHARS} characters of JSON")


def _checked_tool(tool: Any, place: str) -> dict[str, Any]:
    _check_fields(tool, place, ("type", "function"))
    if tool.get("type") != "function":
        raise ValueError(f"{place}.type must be 'function', got {_short(tool.get('type'))}")
    function, place = tool.get("function"), f"{place}.function"
    _check_fields(function, place, _FUNCTION_FIELDS)
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{place}.name must be 1 to 64 letters, digits, _ or -, got {_short(name)}"
        )
    checked: dict[str, Any] = {"name": name}
    if function.get("description") is not None:
        if not isinstance(function["description"], str):
            raise ValueError(f"{place}.description must be a string")
        checked["description"] = function["description"]
    if function.get("strict") not in (None, False):
        raise ValueError(f"{place}.strict must be false: arguments are not constrained")
    checked["parameters"] = _checked_schema(function.get("parameters"), f"{place}.parameters")
    return {"type": "function", "function": checked}


def _check_fields(value: Any, place: str, known: tuple[str, ...]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{place} must be an object, got {_short(value)}")
    for key in value:
        if key not in known:
            raise ValueError(
                f"{place} has the unknown field {_short(key)}; known: {', '.join(known)}"
            )


def _checked_schema(schema: Any, place: str) -> dict[str, Any]:
    """A JSON schema of an object, as far as templates and parsers rely on it."""
    if schema is None or schema == {}:
        return {"type": "object", "properties": {}}
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise ValueError(f"{place} must be a JSON schema of type 'object', got {_short(schema)}")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict):
        raise ValueError(f"{place}.properties must be an object, got {_short(properties)}")
    for name, part in properties.items():
        _check_property(part, f"{place}.properties[{_short(name)}]")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ValueError(f"{place}.required must be a list of strings, got {_short(required)}")
    return {"type": "object", "properties": {}} | copy.deepcopy(schema)


def _check_property(schema: Any, place: str) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise ValueError(f"{place} must be a JSON schema, got {_short(schema)}")
    types = schema.get("type", [])
    for name in types if isinstance(types, list) else [types]:
        if not isinstance(name, str) or name not in _JSON_TYPES:
            raise ValueError(
                f"{place}.type must be of {', '.join(sorted(_JSON_TYPES))}; got {_short(name)}"
            )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
