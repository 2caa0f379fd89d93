"""Words of messages: what a setting is called by whom, and what a mistyped name may stand for."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Literal

# Of the command line, of Python, or whatever names a setting, and its value unless that is None.
Language = Literal["options", "python"] | Callable[[str, object], str]
_language: ContextVar[Language] = ContextVar("language", default="options")


@contextlib.contextmanager
def speaking(language: Language) -> Iterator[None]:
    """Messages made in this block, by this thread, name settings in `language`."""
    token = _language.set(language)
    try:
        yield
    finally:
        _language.reset(token)


def shell(*words: object) -> str:
    r"""A command as it can be typed; bytes of names that are no text as $'\xff'."""
    return " ".join(_word(str(word)) for word in words)


def _word(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    shown = (chr(b) if b in range(32, 127) and b not in b"\\'" else f"\\x{b:02x}"
             for b in os.fsencode(word))  # fmt: skip
    return f"$'{''.join(shown)}'"


def setting(name: str, value: object = None) -> str:
    """The setting `name` of RunConfig or `load` in the words of whoever reads the message.

    `setting("num_iter")` is "--num-iter" or "num_iter"; `setting("method", "cspd")` is
    "--method cspd" or 'method="cspd"'. True and False are flags: "--align", "--no-align".
    """
    language = _language.get()
    if callable(language):
        return language(name, value)
    if language == "python":
        shown = json.dumps(value) if isinstance(value, str) else repr(value)
        return name if value is None else f"{name}={shown}"
    option = "--" + ("no-" if value is False else "") + name.replace("_", "-")
    if value is None or isinstance(value, bool):
        return option
    return f"{option} {value:g}" if isinstance(value, float) else f"{option} {value}"


def counted(number: int, noun: str) -> str:
    """Such as "1 image" and "8 images"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name that `word` may stand for: one it begins, one with a word it begins, the most like.

    Case does not count. None if `word` holds no letter or no name is like it by `cutoff`, 0 to 1.
    """
    word = word[:60].lower()
    if not re.search(r"[^\W\d_]", word):
        return None
    by_name = {name.lower(): name for name in known}
    names = sorted(by_name, key=len)
    begun = [name for name in names if name.startswith(word)]
    begun += [name for name in names if any(part.startswith(word) for part in name.split())]
    found = begun or difflib.get_close_matches(word, names, n=1, cutoff=cutoff)
    return by_name[found[0]] if found else None
