"""Errors that the user can act on. Anything else is a bug of ours and keeps its trace."""

from __future__ import annotations

from cspd.engines.words import setting

MAX_LINE = 1000  # characters of a message; longer ones come from a value that is no sane value


class CspdError(Exception):
    """A problem the user can fix: the message says what is, what should be, and what to do."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        # Lines of ours continue indented; any other newline came in with a value.
        super().__init__("\n  ".join(map(printable, str(message).split("\n  "))))


def printable(text: str) -> str:
    """`text` in one line a terminal can show: control characters escaped, the middle cut out."""
    if len(text) > MAX_LINE:
        text = f"{text[: MAX_LINE // 2]} ... {text[-MAX_LINE // 2 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class SettingError(CspdError):
    """A value that no setting takes, or settings that contradict each other: exit code 2."""

    exit_code = 2


class MissingExtraError(CspdError):
    """A library of an optional extra is not installed."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(
            f"{library} is not installed; install it with: pip install 'cspd[{extra}]'"
        )
        self.library, self.extra = library, extra


class BundleError(CspdError):
    """A bundle is missing, damaged, or was made for something else."""


class NonFiniteError(CspdError):
    """A network returned NaN or infinity."""


def overflow_advice() -> str:
    """What to do about a NonFiniteError, the likely cause first.

    Weights that are not finite are no cause: they are refused when they are opened.
    """
    return (
        f"Lower {setting('cfg')} or {setting('temperature')}; a model in fp16 holds larger numbers "
        "after cspd-export build --precision bf16 or fp32; if it is the same in fp32, its weights "
        "are too large: repeat cspd-export build with another checkpoint"
    )
