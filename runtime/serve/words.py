"""What is wrong with a request, in the words of the API: field, got, expected, nearest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from cspd.engines.errors import CspdError
from cspd.engines.spec import Record
from cspd.engines.words import nearest
from cspd.runtime.serve.models import Bound, ImageRequest, Served

# Settings that have another name in a request.
RENAMED = {"labels": "label", "num_images": "n"}
OPTION = re.compile(r"--([a-z]+(?:-[a-z]+)*)")
COMMAND = re.compile(r"--[a-z]|\bcspd-(run|export)\b")


class FieldProblem(Record):
    """A sentence, and the field of the request that it is about, if it is about one."""

    field: str | None
    message: str


def explain(error: dict[str, Any], bounds: dict[str, Bound]) -> FieldProblem:
    """The first of pydantic's complaints about a body, in our words.

    `bounds` are those of `GET /v1/models`.
    """
    location = [part for part in error["loc"] if part != "body"]
    if not location or not isinstance(location[0], str):
        return FieldProblem(field=None, message="body: expected a JSON object")
    field = location[0]
    if error["type"] == "extra_forbidden":
        hint = near(field, ImageRequest.model_fields)
        return FieldProblem(field=None, message=f"there is no field {field!r:.60}{hint}")
    if error["type"] == "missing":
        return FieldProblem(field=field, message=f"{field} is missing, expected {ask(field)}")
    got, choices = error["input"], choices_of(field)
    hint = near(got, choices) if isinstance(got, str) else ""
    outside = field in bounds and _is_number(got) and not error["type"].startswith("int_")
    expected = str(bounds[field]) if outside else ask(field)
    return FieldProblem(field=field, message=f"{field} is {_shown(got)}, expected {expected}{hint}")


def ask(field: str) -> str:
    """What a field may be, without a bundle."""
    if field == "label":
        return "the number or the name of a class"
    if choices := choices_of(field):
        return f"one of {', '.join(choices)}"
    kinds = _kinds(field)
    if bool in kinds:
        return "true or false"
    return "a whole number" if int in kinds else "a number"


def choices_of(field: str) -> tuple[str, ...]:
    """The values of a field that has a list of them."""
    annotation = ImageRequest.model_fields[field].annotation
    options = (annotation, *get_args(annotation))
    literal = next((o for o in options if get_origin(o) is Literal), None)
    return get_args(literal) if literal else ()


def near(word: str, known: Iterable[str]) -> str:
    """The end of a sentence, "; did you mean 'cspd'?", or "" if no known word is like `word`."""
    found = nearest(word, known)
    return f"; did you mean {found!r}?" if found else ""


def in_request(name: str, value: object = None) -> str:
    """The setting `name` as a request has it, with JSON of its value: `method "cspd"`.

    What no request holds comes from the bundle.
    """
    if name == "head" and value in get_args(Served):
        name = "method"  # which is how a request asks for it
    field = RENAMED.get(name, name)
    owner = "" if field in ImageRequest.model_fields else "the bundle's "
    return f"{owner}{field}" if value is None else f"{owner}{field} {json.dumps(value)}"


def of_request(error: CspdError) -> FieldProblem:
    """A message in the words of the API, whoever it was written for.

    Options that are fields are named as these; what advises other options, or commands, is for
    those who run the server and left out.
    """

    def field(match: re.Match[str]) -> str:
        name = match[1].replace("-", "_")
        name = RENAMED.get(name, name)
        return name if name in ImageRequest.model_fields else match[0]

    parts = re.split(r"(?<=[;.]) ", OPTION.sub(field, str(error)))
    kept = " ".join(part for part in parts if not COMMAND.search(part))
    message = kept.rstrip(";") or "this server cannot do what the request asks for"
    begin = re.match(r"[a-z_]+", message)
    named = begin[0] if begin and begin[0] in ImageRequest.model_fields else None
    return FieldProblem(field=named, message=message)


def _kinds(field: str) -> set[Any]:
    annotation = ImageRequest.model_fields[field].annotation
    return {annotation, *get_args(annotation)}


def _shown(value: Any) -> str:
    """A value as it was sent, cut; lists and objects, which may be deep, by their name only."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return f"{value!r:.60}" if isinstance(value, str) else f"{json.dumps(value):.60}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
