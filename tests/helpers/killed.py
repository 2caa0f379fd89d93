"""Runs of the command line in forked processes, which can be killed without killing the tests."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from cspd.runtime.commands.cli import main


def start(arguments: list, errors: Path) -> int:
    """Id of a child that runs `cspd-run ARGUMENTS`; its stderr goes to the file `errors`."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        descriptor = os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """Exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def send_after(child: int, seconds: float, number: int = signal.SIGKILL) -> int:
    """Send the signal after some time; returns what `wait` does."""
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)
    return wait(child)


def contents(folder: Path, *leave: str) -> dict[str, bytes]:
    """Every file of a run by name, but for those in `leave`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in leave
    }
