"""Runs one hostile case in a forked child and says how it ended.

The child has a memory limit, a time limit, and a guard that sees every file it opens for writing,
every process it would start and every connection it would make. Native code is not seen by the
guard; what it writes shows in the snapshot of the folder around the case.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from click import Command
from click.testing import CliRunner
from fuzz_counts import CASES, FULL
from hypothesis import HealthCheck, Phase, settings

from cspd.engines.errors import CspdError

MEMORY = 2 << 30  # bytes that a case may add to what the parent has mapped
FILE_SIZE = 64 << 20
SECONDS = 30
LONGEST = 2_000  # characters of an error, twice what a message of ours may have

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate",
    "os.chmod", "os.chown", "os.mkfifo", "os.mknod", "os.utime", "shutil.rmtree",
}  # fmt: skip
EXECUTES = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "os.forkpty", "pty.spawn", "socket.connect", "socket.bind", "socket.sendto",
}  # fmt: skip


def budget(*, full: int, ci: int) -> settings:
    """Hypothesis settings: `ci` examples, or `full` with CSPD_FUZZ=full in the environment."""
    return settings(
        max_examples=full if FULL else ci,
        derandomize=not FULL,
        database=None,
        deadline=None,  # the child's own time limit stands in
        phases=(Phase.explicit, Phase.generate),  # shrinking costs hundreds of forks per failure
        suppress_health_check=list(HealthCheck),
    )


class RefusedCommand(Exception):
    """A command ended with an error of one line; the text is that line."""


@dataclass(frozen=True)
class Ending:
    """How a case ended: "ok", "refused" (a CspdError or a usage error), or one of the failures."""

    kind: str
    text: str = ""


class Escape(BaseException):
    """The case tried what no input may bring about."""


class Guard:
    """Audit hook of the child: raises Escape, and remembers it in case somebody swallows it."""

    def __init__(self, allowed: Path) -> None:
        self.allowed = allowed.resolve()
        self.seen: list[str] = []

    def __call__(self, event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if flags is not None and flags & WRITES and not isinstance(path, int):
                self._check(event, path)
        elif event in CHANGES:
            # Names may be relative to an open folder, the last argument; rmtree does that.
            base = f"/proc/self/fd/{args[-1]}" if type(args[-1]) is int and args[-1] >= 0 else ""
            base = base if event in ("os.remove", "os.rmdir", "os.mkdir") else ""
            for path in args[:2]:
                if isinstance(path, str | bytes | os.PathLike):
                    self._check(event, os.path.join(base, os.fsdecode(path)))
        elif event in EXECUTES:
            self._refuse(f"{event} {args!r:.200}")

    def _check(self, event: str, path) -> None:
        name = os.fsdecode(path)
        folder, base = os.path.split(name)
        # Writing follows a link at the end of a path; the other changes act on the link itself.
        place = os.path.realpath(name if event == "open" else folder or ".")
        place = place if event == "open" else os.path.join(place, base)
        if name != os.devnull and not Path(place).is_relative_to(self.allowed):
            self._refuse(f"{event} {path!r:.200}")

    def _refuse(self, what: str) -> None:
        self.seen.append(what)
        raise Escape(what)


ACTIVE: list[Guard] = []


def _audit(event: str, args: tuple) -> None:
    if ACTIVE:
        ACTIVE[0](event, args)


# An audit hook cannot be removed, so there is one, which looks for the guard of the case.
sys.addaudithook(_audit)


def run_case(target: str, call: Callable[[], object], folder: Path) -> Ending:
    """Run `call` in a child that may write below `folder`; counts as one case of `target`."""
    CASES[target] += 1
    before = snapshot(folder.parent, folder)
    reader, writer = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _child(call, folder, writer)
    os.close(writer)
    ending = _wait(pid, reader)
    assert snapshot(folder.parent, folder) == before, "wrote beside its folder"
    return ending


def run_here(target: str, call: Callable[[], object], folder: Path) -> Ending:
    """Like `run_case`, in this process: for parsers, which need no child and are much quicker so.

    A hang in native code ends the whole run with a traceback, as a crash of native code does.
    """
    CASES[target] += 1
    before = snapshot(folder.parent, folder)
    here, limits = os.getcwd(), resource.getrlimit(resource.RLIMIT_AS)
    guard = Guard(folder)
    previous = signal.signal(signal.SIGALRM, _alarm)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (_mapped() + MEMORY, limits[1]))
        signal.alarm(SECONDS)
        faulthandler.dump_traceback_later(2 * SECONDS, exit=True)
        ACTIVE.append(guard)
        ending = _ending(call)
    finally:
        ACTIVE.clear()
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        os.chdir(here)
    assert snapshot(folder.parent, folder) == before, "wrote beside its folder"
    return Ending("escaped", "; ".join(guard.seen)) if guard.seen else ending


def _alarm(number: int, frame: object) -> None:
    raise TimeoutError(f"no end within {SECONDS} s")


def check(ending: Ending) -> Ending:
    """The property of every case: done, or refused in one printable line."""
    assert ending.kind in ("ok", "refused"), f"{ending.kind}: {ending.text}"
    if ending.kind == "refused":
        assert ending.text.isprintable() and 0 < len(ending.text) < LONGEST, repr(ending.text)
    return ending


def run_command(command: Command, arguments: list[str]) -> Callable[[], object]:
    """A call that runs a command line; its error must be one line on stderr, without a trace."""

    def call() -> object:
        done = CliRunner().invoke(command, arguments)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        if done.exit_code == 0:
            return None
        assert done.exit_code in (1, 2), done.exit_code
        *_, last = done.stderr.rstrip("\n").split("\n")
        assert last.startswith("Error: "), done.stderr
        raise RefusedCommand(last)

    return call


def snapshot(root: Path, without: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of everything below `root` except what lies below `without`."""
    found = {}
    for path in root.rglob("*"):
        if path != without and not path.is_relative_to(without):
            status = path.lstat()
            found[str(path)] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def _child(call: Callable[[], object], folder: Path, writer: int) -> None:
    """Body of the child; never returns."""
    guard = Guard(folder)
    try:
        sys.dont_write_bytecode = True
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
        resource.setrlimit(resource.RLIMIT_AS, (_mapped() + MEMORY, _mapped() + MEMORY))
        ACTIVE.append(guard)
        ending = _ending(call)
    except BaseException:
        ending = Ending("crashed", traceback.format_exc()[-3000:])
    if guard.seen:
        ending = Ending("escaped", "; ".join(guard.seen))
    os.write(writer, json.dumps([ending.kind, ending.text]).encode())
    os._exit(0)


def _ending(call: Callable[[], object]) -> Ending:
    try:
        call()
    except (CspdError, RefusedCommand) as error:
        return Ending("refused", str(error))
    except BaseException:
        return Ending("crashed", traceback.format_exc()[-3000:])
    return Ending("ok")


def _mapped() -> int:
    """Bytes of address space that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _wait(pid: int, reader: int) -> Ending:
    """The ending that the child reports, or what became of it."""
    received, end = b"", time.monotonic() + SECONDS
    while select.select([reader], [], [], max(end - time.monotonic(), 0))[0]:
        block = os.read(reader, 1 << 16)
        received += block
        if not block:
            break
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    if received:
        return Ending(*json.loads(received))
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return Ending("hung", f"no end within {SECONDS} s")
    return Ending("died", f"wait status {status}")


def quick(method: str) -> list[str]:
    """Options of a run of seconds by `method`; only lossless has a window."""
    options = ["--num-images", "1", "--num-iter", "2", "--head-steps", "3", "--threads", "1",
               "--quiet", "--batch-size", "1", "--method", method]  # fmt: skip
    return [*options, "--window", "4"] if method == "lossless" else options
