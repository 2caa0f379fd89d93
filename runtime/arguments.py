"""Arguments of the Python entry that are no fields of RunConfig: what they are, or a SettingError.

A library would take a wrong one for something else, or fail at it much later.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cspd.engines.errors import SettingError
from cspd.engines.words import setting

DEVICES = ("cpu", "cuda")


def path(name: str, value: object) -> Path:
    """The path of a folder, given as text or as a path."""
    if isinstance(value, str | os.PathLike) and isinstance(text := os.fspath(value), str):
        return Path(text)
    raise refusal(name, value, "the path of a folder")


def whole(name: str, value: object, limits: range) -> int:
    """A whole number within `limits`, Python's, NumPy's or PyTorch's."""
    number = whole_number(value)
    if number is None:
        raise refusal(name, value, f"a whole number, {limits[0]}..{limits[-1]}")
    if number not in limits:
        raise SettingError(f"{setting(name)} is {number}, expected {limits[0]}..{limits[-1]}")
    return number


def whole_number(value: Any) -> int | None:
    """`value` as Python's int if it is a whole number, which True and 2.0 are not."""
    if isinstance(value, bool | np.bool_):
        return None
    if isinstance(value, torch.Tensor) and (value.ndim or value.dtype == torch.bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def switch(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        raise refusal(name, value, "True or False")
    return bool(value)


def device(value: object) -> str:
    """The name of a device, or PyTorch's object for it."""
    text = str(value) if isinstance(value, torch.device) else value
    if not isinstance(text, str) or text not in DEVICES:
        raise refusal("device", text, " or ".join(DEVICES))
    return text


def function(name: str, value: Any, takes: str) -> Any:
    """Something that can be called with `takes`, or None."""
    if value is not None and not callable(value):
        raise refusal(name, value, f"a function of {takes}")
    return value


def classes(value: Any) -> list[Any]:
    """A list of labels from one or from several; whether they are classes is checked later."""
    if isinstance(value, np.ndarray | torch.Tensor):
        value = value.tolist()
    if isinstance(value, bytes | bytearray | dict):
        raise refusal("labels", value, "numbers or names of classes")
    one = isinstance(value, str) or not isinstance(value, Iterable)
    labels = [value] if one else list(value)
    return [label if isinstance(label, str) else _number_or_same(label) for label in labels]


def seeds(value: Any) -> int | list[int]:
    """One seed for all images, or a list of one for each."""
    if isinstance(value, np.ndarray | torch.Tensor):
        value = value.tolist()
    if isinstance(value, str | bytes | bytearray) or not isinstance(value, Sequence):
        return _seed(value)
    if not value:
        raise SettingError(f"{setting('seed')} is an empty list, expected one per image")
    return [_seed(each) for each in value]


def _seed(value: Any) -> int:
    number = whole_number(value)
    if number is None:
        raise refusal("seed", value, "a whole number, or a list of one per image")
    return number


def _number_or_same(value: Any) -> Any:
    number = whole_number(value)
    return value if number is None else number


def refusal(name: str, value: object, expected: str) -> SettingError:
    """What argument `name` got, and what it takes."""
    return SettingError(f"{setting(name)} is {value!r:.60}, expected {expected}")
