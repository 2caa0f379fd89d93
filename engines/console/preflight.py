"""What would stop a command, looked at before its work: the part that builds and runs share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cspd.engines.console.commands import human_bytes
from cspd.engines.errors import CspdError
from cspd.engines.memory import available_memory

Check = Callable[[], object]  # raises CspdError


def problems(checks: Iterable[Check]) -> list[str]:
    """What the checks that fail say, in their order."""
    found = []
    for check in checks:
        try:
            check()
        except CspdError as error:
            found.append(str(error))
    return found


def check_disk(what: str, size: int, free: int, fix: str) -> None:
    """Raise CspdError unless `size` bytes fit into `free`; `what` takes them, `fix` helps."""
    if size > free:
        raise CspdError(
            f"{what} about {human_bytes(size)}, {human_bytes(free)} of disk are free there; {fix}"
        )


def check_memory(what: str, size: int, fix: str) -> None:
    """Raise CspdError unless `size` bytes of memory are available, which `what` takes."""
    available = available_memory()
    if available is not None and size > available:
        raise CspdError(
            f"memory: {what} {human_bytes(size)}, {human_bytes(available)} are available; {fix}"
        )
