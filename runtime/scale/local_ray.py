"""Ray on this machine for one run or one server, closed to everybody else."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cspd.engines.errors import CspdError, MissingExtraError


def import_ray() -> Any:
    """The module `ray`; MissingExtraError if it is not installed."""
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise MissingExtraError("ray", "scale") from None


@contextlib.contextmanager
def local_ray(failure: str, **options: Any) -> Iterator[Any]:
    """Ray, started here and ended with the block; `failure` begins the message if it cannot start.

    Whoever reaches Ray's ports or sockets can run code as this user. So its ports listen on
    127.0.0.1, it has a token that only its own processes know, and a session folder that is gone
    afterwards. Ray makes its folders writable for all; the one around them (mode 0700) does not
    let anybody in.
    """
    ray = import_ray()
    around = tempfile.TemporaryDirectory(prefix="cspd-ray-", ignore_cleanup_errors=True)
    with around as folder, _closed(ray):
        begin_ray(
            ray, failure, "see whether this machine has memory, disk and processes left",
            address="local", include_dashboard=False, _node_ip_address="127.0.0.1",
            _temp_dir=str(Path(folder) / "ray"), **options,
        )  # fmt: skip
        try:
            yield ray
        finally:
            with quietly():
                ray.shutdown()


@contextlib.contextmanager
def unannounced(ray: Any) -> Iterator[None]:
    """Without Ray's own lines about workers that died: paragraphs that name no image.

    Ray prints them whatever `log_to_driver` says.
    """
    worker = ray._private.worker
    shown = worker.print_to_stdstream
    worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        worker.print_to_stdstream = shown


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without output: Ray reports the end of its own actors as failures."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _closed(ray: Any) -> Iterator[None]:
    """A new token, and no cluster, in the environment of this process, which Ray's inherit.

    Without a token Ray writes one into the home folder, where it stays. Unless clusters are off,
    Ray replaces 127.0.0.1 by an address that other machines can reach.
    """
    wanted = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # By default 15: beside other work a server would get next to none of the CPU.
        "RAY_worker_niceness": "0",
    }
    before = {name: os.environ.get(name) for name in wanted}
    constants = ray._private.ray_constants  # it read the environment when it was imported
    clusters = constants.ENABLE_RAY_CLUSTER
    os.environ.update(wanted)
    constants.ENABLE_RAY_CLUSTER = False
    _read_environment(ray)
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = clusters
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        _read_environment(ray)


def _read_environment(ray: Any) -> None:
    """Have Ray read mode and token again: it did so when it was imported, or last connected."""
    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


def begin_ray(ray: Any, failure: str, advice: str, **options: Any) -> None:
    """`ray.init`, or a CspdError from `failure`, the reason, and `advice` or a better one."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(**options, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        reason = str(error).strip().splitlines()[0]
        if "AF_UNIX" in reason:
            advice = "set TMPDIR to a folder with a short name, such as /tmp"
        raise CspdError(f"{failure}: {reason}; {advice}") from None
