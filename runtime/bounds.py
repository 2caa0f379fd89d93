"""What a field of a record may hold, in words: read off the field, so that it stands once."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "a text",
    "array": "a list",
}


def expected(model: type[BaseModel], name: str, value: object) -> str:
    """What field `name` of `model` takes: "1..64", "one of linear, constant", "a whole number".

    `value` is what it got instead: its kind is only named if that is what is wrong.
    """
    schema: dict[str, Any] = model.model_json_schema()["properties"][name]
    choices = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    part = choices[0]
    if "enum" in part:
        return f"one of {', '.join(part['enum'])}"
    kind = " or ".join(KINDS.get(choice.get("type"), "something else") for choice in choices)
    bounds = _bounds(part)
    if not bounds:
        return kind
    numeric = isinstance(value, int if part["type"] == "integer" else int | float)
    return bounds if numeric and not isinstance(value, bool) else f"{kind}, {bounds}"


def _bounds(part: dict[str, Any]) -> str:
    low, above, high = (part.get(k) for k in ("minimum", "exclusiveMinimum", "maximum"))
    if low is not None:
        return f"{low:g} or more" if high is None else f"{_plain(low)}..{_plain(high)}"
    if "minItems" in part:
        return f"{part['minItems']} entry or more"
    if above is not None:
        return f"more than {above:g}" + ("" if high is None else f", at most {high:g}")
    return ""


def _plain(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else str(bound)
