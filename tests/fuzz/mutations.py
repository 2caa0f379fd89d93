"""Strategies for hostile input: damaged JSON documents and damaged bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

NAMES = (
    "../../etc/passwd", "/etc/passwd", "..", ".", "", "a/../../b", "a\\..\\b", "a\nb", "\x1b[31m",
    "[/red]", "[bold]", "{0}", "%s", "NaN", "\u202eevil", "\ud800", "x" * 5000, "con", "~", "$HOME",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**18, -(10**18),
    10**30, 10**400, 0.0, -0.0, 0.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
ODD = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(NAMES), st.integers(),
    st.floats(), st.text(max_size=8), st.builds(list), st.builds(dict),
    st.lists(st.integers(-2, 300), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(-2, 2), max_size=2),
    st.integers(1, 400).map(lambda depth: nested(depth)),
)  # fmt: skip


def nested(depth: int) -> Any:
    """A list in a list, `depth` times."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


@dataclass(frozen=True)
class Edit:
    """One change of a JSON document: what `path` leads to is set, deleted or renamed."""

    path: tuple[str | int, ...]
    value: Any = None
    action: str = "set"


def apply(document: Any, edits: Sequence[Edit]) -> bytes:
    """`document` as JSON after `edits`; an edit whose place an earlier one took is skipped."""
    document = copy.deepcopy(document)
    for edit in edits:
        place = document
        try:
            for key in edit.path[:-1]:
                place = place[key]
            if not edit.path:
                document = edit.value
            elif edit.action == "delete":
                del place[edit.path[-1]]
            elif edit.action == "rename":
                place[edit.value] = place.pop(edit.path[-1])
            else:
                place[edit.path[-1]] = edit.value
        except (KeyError, IndexError, TypeError, AttributeError):
            continue
    return json.dumps(document).encode()


@st.composite
def edits(draw: st.DrawFn, document: Any, most: int = 2) -> list[Edit]:
    """One to `most` changes anywhere in `document`."""
    return [_edit(draw, document) for _ in range(draw(st.integers(1, most)))]


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple, Any]]:
    """Every path of a document and what it leads to."""
    yield path, value
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from places(inner, (*path, key))


def _edit(draw: st.DrawFn, document: Any) -> Edit:
    """A change of one of all places, or of one found by walking down, which prefers short paths."""
    path, value = draw(st.sampled_from(list(places(document))))
    if draw(st.booleans()):
        path, value = (), document
        while isinstance(value, dict | list) and value and draw(st.integers(0, 11)):
            keys = list(value) if isinstance(value, dict) else range(len(value))
            key = draw(st.sampled_from(keys))
            path, value = (*path, key), value[key]
    match draw(st.integers(0, 9)):
        case 0:
            return Edit(tuple(path), action="delete")
        case 1:
            return Edit(tuple(path), draw(st.sampled_from(NAMES)), "rename")
        case 2 if isinstance(value, dict):
            return Edit((*path, draw(st.sampled_from(NAMES))), draw(ODD))
        case _:
            return Edit(tuple(path), _leaf(draw, value))


def _leaf(draw: st.DrawFn, value: Any) -> Any:
    """Something else in place of `value`, mostly of the same type so that it passes for valid."""
    if draw(st.integers(0, 3)) == 0:
        return draw(ODD)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return draw(st.sampled_from((value + 1, value - 1, 0, 1, 2, -value, value * 1000, 2**40)))
    if isinstance(value, str):
        return draw(st.sampled_from((*NAMES, value[:-1], value + "0", value.upper())))
    return draw(ODD)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` cut, flipped in some bits, with bytes inserted, repeated or overwritten."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        # Headers are where parsers live, so half of the places lie in the first 512 bytes.
        end = min(len(data), 512) if draw(st.booleans()) else len(data)
        place = draw(st.integers(0, max(end - 1, 0)))
        match draw(st.integers(0, 4)):
            case 0:
                del data[place:]
            case 1 if data:
                data[place] ^= 1 << draw(st.integers(0, 7))
            case 2:
                data[place:place] = draw(st.binary(min_size=1, max_size=16))
            case 3:
                data[place : place + 8] = draw(st.sampled_from(WORDS))
            case _:
                data += data[place : place + 4096]
    return bytes(data)


WORDS = (b"\xff" * 8, bytes(8), b"\x7f" + b"\xff" * 7, (2**40).to_bytes(8, "little"), b"\x80" * 8)
