"""Markdown of the reference pages: wrapped lists, fields of records, signatures."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
import typing
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

WIDTH = 120


def paragraph(text: str) -> str:
    """`text` in one paragraph of lines of at most WIDTH characters; its blank lines stay."""
    parts = re.split(r"\n\s*\n", inspect.cleandoc(text))
    return "\n\n".join(_wrapped(" ".join(part.split()), "") for part in parts)


def item(name: str, text: str, level: int = 0) -> str:
    """A line of a list, wrapped: the name as code, then what it is."""
    indent = "  " * level
    line = f"{indent}- `{name}`" + (f": {' '.join(text.split())}" if text.strip() else "")
    return _wrapped(line, indent + "  ")


def _wrapped(line: str, indent: str) -> str:
    """`line` cut at blanks alone, so that links and options stay whole."""
    return textwrap.fill(
        line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def comments(record: type) -> dict[str, str]:
    """The comments that stand above the fields of a class, by field."""
    found: dict[str, str] = {}
    waiting: list[str] = []
    for line in inspect.getsource(record).splitlines():
        text = line.strip()
        field = re.match(r"(\w+): ", text)
        if text.startswith("#"):
            waiting.append(text.lstrip("# "))
        elif field and waiting:
            found[field[1]] = " ".join(waiting)
            waiting = []
        else:
            waiting = []
    return found


def kind(schema: dict[str, Any]) -> str:
    """The type that a JSON schema stands for, with its bounds, in a few words."""
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "enum" in schema or "const" in schema:
        return " | ".join(map(json.dumps, schema.get("enum", [schema.get("const")])))
    for way in ("anyOf", "oneOf"):
        if way in schema:
            return " | ".join(dict.fromkeys(kind(part) for part in schema[way]))
    name = str(schema.get("type", "anything"))
    if name == "array":
        parts = schema.get("prefixItems", [schema.get("items", {})])
        return "list of " + ", ".join(dict.fromkeys(map(kind, parts)))
    values = schema.get("additionalProperties")
    if name == "object" and isinstance(values, dict):
        return f"object of {kind(values)}"
    return " ".join([name, *_bounds(schema)])


def _bounds(schema: dict[str, Any]) -> list[str]:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    found = [f"{sign} {_number(schema[key])}" for key, sign in signs.items() if key in schema]
    return [", ".join(found)] if found else []


def _number(value: float) -> str:
    """A bound; OpenAPI has every number as a float."""
    whole = isinstance(value, int) or (value.is_integer() and abs(value) < 2**53)
    return str(int(value)) if whole else f"{value:g}"


def schema_items(schema: dict[str, Any], notes: dict[str, str] | None = None) -> list[str]:
    """A line for every property of an object's JSON schema."""
    notes, needed, lines = notes or {}, schema.get("required", []), []
    for name, field in schema.get("properties", {}).items():
        parts = [kind(field)]
        if field.get("default") is not None:
            parts.append(f"default {json.dumps(field['default'])}")
        elif name not in needed and "default" not in field:
            parts.append("may be absent")
        text = notes.get(name) or field.get("description", "")
        lines.append(item(name, ", ".join(parts) + (f". {text}" if text else "")))
    return lines


def records(top: type[BaseModel], names: dict[str, type]) -> str:
    """The fields of a pydantic record and of all that it holds, a section each.

    `names` are the classes behind the names in the schema, whose comments explain fields.
    """
    schema = top.model_json_schema()
    sections = {top.__name__: schema, **schema.get("$defs", {})}
    parts = []
    for name, part in sections.items():
        if "properties" in part:
            notes = comments(names[name]) if name in names else {}
            about = paragraph(part.get("description", ""))
            parts.append("\n\n".join([f"## {name}", about, "\n".join(schema_items(part, notes))]))
    return "\n\n".join(parts)


def nested(top: type[BaseModel]) -> dict[str, type]:
    """A record and all records in its fields, by name."""
    found: dict[str, type] = {}
    waiting: list[Any] = [top]
    while waiting:
        value = waiting.pop()
        if isinstance(value, type) and issubclass(value, BaseModel):
            if value.__name__ not in found:
                found[value.__name__] = value
                waiting += [field.annotation for field in value.model_fields.values()]
        waiting += typing.get_args(value)
    return found


def signature(name: str, function: Callable[..., Any]) -> str:
    """A call as code, an argument a line where one line is not enough."""
    whole = inspect.signature(function)
    shown = whole.replace(parameters=[p for p in whole.parameters.values() if p.name != "self"])
    line = re.sub(r"(: |-> )'([^']*)'", r"\1\2", f"{name}{shown}")
    line = line.replace("pipeline.", "").replace("os.PathLike", "PathLike")
    if len(line) > 90:
        inside, _, result = line.partition("(")[2].rpartition(")")
        lines = re.split(r", (?=\*|\w+:|\w+ ?=)", inside)
        line = f"{name}(\n" + "".join(f"    {part},\n" for part in lines) + f"){result}"
    return f"```python\n{line}\n```"


def documented(name: str, thing: Any) -> str:
    """Signature and docstring of a function."""
    return f"{signature(name, thing)}\n\n{docstring(thing)}"


def docstring(thing: Any) -> str:
    """Its docstring, wrapped again."""
    return paragraph(inspect.getdoc(thing) or "")
