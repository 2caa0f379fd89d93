"""What a setting is called in a message: an option on the command line, an argument in Python."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal

Language = Literal["options", "python"]
_language: ContextVar[Language] = ContextVar("language", default="options")


@contextlib.contextmanager
def speaking(language: Language) -> Iterator[None]:
    """Messages made in this block, by this thread, name settings in `language`."""
    token = _language.set(language)
    try:
        yield
    finally:
        _language.reset(token)


def setting(name: str, value: object = None) -> str:
    """The setting `name` of RunConfig or `load` in the words of whoever reads the message.

    `setting("num_iter")` is "--num-iter" or "num_iter"; `setting("method", "cspd")` is
    "--method cspd" or 'method="cspd"'. True and False are flags: "--align", "--no-align".
    """
    if _language.get() == "python":
        shown = json.dumps(value) if isinstance(value, str) else repr(value)
        return name if value is None else f"{name}={shown}"
    option = "--" + ("no-" if value is False else "") + name.replace("_", "-")
    if value is None or isinstance(value, bool):
        return option
    return f"{option} {value:g}" if isinstance(value, float) else f"{option} {value}"


def counted(number: int, noun: str) -> str:
    """Such as "1 image" and "8 images"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
