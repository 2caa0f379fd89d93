"""Which files an ONNX model wants to read beside itself, told without the onnx library.

A graph whose hash was checked may still name any file for its weights. Only the messages that can
hold tensors are looked into; everything else is skipped unread. What protobuf libraries read in
different ways, such as a number with needless bytes or bits that do not fit, is refused: a reader
that sees less than ONNX Runtime does would miss a file.
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
MAX_TAG, MAX_NUMBER = 2**32 - 1, 2**64 - 1


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
        if tag > MAX_TAG or tag >> 3 == 0:
            raise CspdError(f"not an ONNX model: field {tag >> 3}")
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
    """A number at `place`, written in as few bytes as it needs, and where it ends."""
    value = 0
    for index, byte in enumerate(message[place : place + 10]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            if (byte == 0 and index) or value > MAX_NUMBER:
                raise CspdError("not an ONNX model: a number is not in its shortest form")
            return value, place + index + 1
    raise CspdError("not an ONNX model: a number is cut off")
