"""What could hang or fill the memory before a pickle's restricted loader refuses anything.

The restricted loader executes nothing, but it hashes the keys of dictionaries. A tuple that holds
the same tuple twice, sixty times over, is 200 bytes in a file and takes for ever to hash. Archives
may unpack to a thousand times their size. A program of ten million operations takes minutes.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO

from cspd.engines.errors import CspdError

MAX_ELEMENTS = 1_000  # of a tuple and of all tuples in it, repeated or not; torch.save needs 30
MAX_OPERATIONS = 300_000  # a training checkpoint of mar-h with its optimizer has 91,000
OLD_FORMAT_PICKLES = 5  # magic number, protocol, system, content, names of the storages
# What torch.save writes into the old format, although torch.load cannot read it there.
UNREADABLE = {
    "torch._utils _rebuild_tensor_v3": "numbers of a format such as float8 or uint16",
    "torch._utils _rebuild_nested_tensor": "a nested tensor",
}
MARK = -1
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def scan_zip(path: Path) -> None:
    """Raise CspdError if the zip checkpoint `path` is compressed, or its pickles could hang."""
    left = MAX_OPERATIONS
    with zipfile.ZipFile(path) as archive:
        for item in archive.infolist():
            if item.compress_type != zipfile.ZIP_STORED:
                raise CspdError(
                    f"{path}: {item.filename[:60]} is compressed, which torch.save never does; "
                    "get the file from its authors"
                )
            if item.filename.endswith(".pkl"):
                with archive.open(item) as file:
                    left = _scan(file, path, left)


def scan_old(path: Path) -> None:
    """Raise CspdError if a pickle in front of the old format's tensors could hang or is too new."""
    left = MAX_OPERATIONS
    with path.open("rb") as file:
        for _ in range(OLD_FORMAT_PICKLES):
            left = _scan(file, path, left, UNREADABLE)


def _scan(
    file: IO[bytes], path: Path, left: int, unreadable: Mapping[str, str] = MappingProxyType({})
) -> int:
    """Follow the pickle's stack with the size of tuples in place of values.

    `unreadable` are globals to refuse, and what asks for them. Returns how many of the `left`
    operations remain.
    """
    stack: list[int] = []
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(file):
        left -= 1
        if left < 0:
            raise CspdError(
                f"{path}: refused, its pickles have more than {MAX_OPERATIONS:,} operations, "
                "which no checkpoint needs; get the file from its authors"
            )
        name = opcode.name
        if name == "GLOBAL" and (what := unreadable.get(str(argument))):
            raise CspdError(
                f"{path}: holds {what}, which PyTorch cannot read from its format "
                "before 1.6; save the weights as dense float32 tensors by name"
            )
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else int(argument)] = stack[-1] if stack else 0
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo.get(int(argument or 0), 0))
        elif name == "TUPLE" or name in TUPLES:
            items = _to_mark(stack) if name == "TUPLE" else _last(stack, TUPLES[name])
            size = len(items) + sum(max(item, 0) for item in items)
            if size > MAX_ELEMENTS:
                raise CspdError(
                    f"{path}: refused, its pickle nests tuples of more than {MAX_ELEMENTS:,} "
                    "elements, which could take for ever to load; get the file from its authors"
                )
            stack.append(size)
        else:
            _apply(opcode, stack)
    return left


def _apply(opcode: pickletools.OpcodeInfo, stack: list[int]) -> None:
    """Any other operation: what it leaves is no tuple."""
    if opcode.name == "DUP":
        stack.append(stack[-1] if stack else 0)
        return
    before = opcode.stack_before
    if pickletools.markobject in before:
        _to_mark(stack)
        before = before[: before.index(pickletools.markobject)]
    _last(stack, len(before))
    marks = opcode.name == "MARK"
    stack.extend([MARK] if marks else [0] * len(opcode.stack_after))


def _to_mark(stack: list[int]) -> list[int]:
    """Take everything above the last mark, and the mark."""
    items = []
    while stack and (item := stack.pop()) != MARK:
        items.append(item)
    return items


def _last(stack: list[int], count: int) -> list[int]:
    """Take the last `count` items, or what is there."""
    items = stack[len(stack) - min(count, len(stack)) :]
    del stack[len(stack) - len(items) :]
    return items
