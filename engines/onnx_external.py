"""Which files an ONNX model wants to read beside itself, told without the onnx library.

A graph whose hash was checked may still name any file for its weights. Only the messages that can
hold tensors are looked into; everything else is skipped unread.
"""

from __future__ import annotations

from collections.abc import Iterator

from cspd.engines.errors import CspdError

# Field numbers of onnx.proto: by kind of message, the fields to look into and their kind.
MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
FIXED_SIZES = {1: 8, 5: 4}  # bytes by wire type


def external_locations(model: bytes) -> set[str]:
    """File names of all external data in a serialized ModelProto; CspdError if it is none."""
    found = set()
    waiting = [("model", memoryview(model))]
    while waiting:
        kind, content = waiting.pop()
        if kind == "entry":
            found |= _location(content)
            continue
        inner = MESSAGES[kind]
        waiting += [(inner[n], value) for n, value in _fields(content) if n in inner]
    return found


def _location(entry: memoryview) -> set[str]:
    """The values of a key-value pair if its key is "location"."""
    fields = [(number, bytes(value)) for number, value in _fields(entry)]
    if (1, b"location") not in fields:
        return set()
    return {value.decode(errors="replace") for number, value in fields if number == 2}


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of every field that holds bytes."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        match tag & 7:
            case 0:
                _, place = _varint(message, place)
            case 2:
                size, place = _varint(message, place)
                if size > len(message) - place:
                    raise CspdError("not an ONNX model: a field is cut off")
                yield tag >> 3, message[place : place + size]
                place += size
            case wire if wire in FIXED_SIZES:
                place += FIXED_SIZES[wire]
            case wire:
                raise CspdError(f"not an ONNX model: wire type {wire}")


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """A number of up to ten bytes at `place`, and where it ends."""
    value = 0
    for index, byte in enumerate(message[place : place + 10]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, place + index + 1
    raise CspdError("not an ONNX model: a number is cut off")
