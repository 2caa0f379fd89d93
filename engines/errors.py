"""Errors that the user can act on. Anything else is a bug of ours and keeps its trace."""

from __future__ import annotations


class CspdError(Exception):
    """A problem the user can mend: the message says what is, what should be, and what to do."""

    exit_code = 1


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
