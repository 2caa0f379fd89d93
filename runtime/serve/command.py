"""`cspd-run serve`: a server for images on Ray Serve."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from cspd.engines.console.commands import OUTPUT, SPEED, Verb, finish, json_option, option
from cspd.engines.cpus import available_cpus
from cspd.engines.errors import CspdError, MissingExtraError, SettingError
from cspd.engines.machine import check_machine
from cspd.runtime.commands.options import FOLDER, backend_option, machine_options
from cspd.runtime.scale.local_ray import local_ray, quietly
from cspd.runtime.scale.stopping import StopWish
from cspd.runtime.serve.models import MAX_IMAGES, Settings
from cspd.runtime.settings import shipped_bundle, usable_bundle

HTTP = "HTTP"  # heading of the help
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
SHORTEST_KEY = 16
POLL_SECONDS = 0.2
# A padded batch costs as much as a full one, and on a CPU a full one gains little.
USUAL_BATCH = {"cpu": 1, "cuda": 8}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_key(path: Path | None, host: str) -> str | None:
    """SHA-256 of the API key in `path`; CspdError if a key is needed and there is none."""
    if path is None:
        if is_loopback(host):
            return None
        raise SettingError(
            f"--host {host}: others can reach it, so a key is needed; write one of at least "
            f"{SHORTEST_KEY} characters to a file and add --api-key-file FILE"
        )
    try:
        key = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CspdError(f"{path}: the API key cannot be read: {error}") from None
    if len(key) < SHORTEST_KEY or not key.isascii() or len(key.split()) != 1:
        raise CspdError(
            f"{path}: the API key has {len(key)} characters, expected at least {SHORTEST_KEY} "
            "ASCII characters without spaces"
        )
    return hashlib.sha256(key.encode()).hexdigest()


def check_port(host: str, port: int) -> None:
    """Raise CspdError if `port` cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CspdError(
                f"{host}:{port}: cannot listen there: {error.strerror}; choose another --port"
            ) from None


@contextlib.contextmanager
def running(settings: Settings, host: str, port: int, logs: Path | None) -> Iterator[Any]:
    """The handle of the gate of a server in a Ray of its own, ready; both end with the block."""
    os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "cspd.runtime.serve.proxy.bounds"
    try:
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.config import HTTPOptions
        from ray.serve.schema import LoggingConfig
    except ImportError as error:
        raise MissingExtraError("ray[serve]", "scale") from error
    failure = "the server did not start"
    with local_ray(failure, num_cpus=max(available_cpus(), settings.replicas)):
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # of this process only
        logs_config = LoggingConfig(
            encoding="JSON", logs_dir=str(logs.resolve()) if logs else None, enable_access_log=False
        )
        http = HTTPOptions(host=host, port=port)
        try:
            try:
                serve.start(http_options=http, logging_config=logs_config)
                gate = serve.run(application(settings), name="cspd", logging_config=logs_config)
            except RayError as error:
                # Ray gives its parts some seconds to answer.
                reason = str(error).splitlines()[0]
                raise CspdError(f"{failure}: {reason} Is this machine too busy?") from None
            except RuntimeError as error:
                raise CspdError(f"{failure}: {error}") from None
            yield gate
        finally:
            with quietly():
                serve.shutdown()


def application(settings: Settings) -> Any:
    """The deployments: one gate that checks and counts, behind it the engines that compute."""
    from ray import serve

    from cspd.runtime.serve.engine import Engine
    from cspd.runtime.serve.gate import Gate

    gpus = 1 if settings.device == "cuda" else 0
    # The gate bounds the queue, so that nothing may be refused or held back behind it.
    unbounded = 100_000
    engine = serve.deployment(
        num_replicas=settings.replicas, max_ongoing_requests=unbounded,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus}, health_check_period_s=2,
        graceful_shutdown_timeout_s=5,
    )(Engine)  # fmt: skip
    gate = serve.deployment(
        max_ongoing_requests=unbounded,
        ray_actor_options={"num_cpus": 0}, graceful_shutdown_timeout_s=5,
    )(serve.ingress()(Gate))  # fmt: skip
    return gate.bind(settings, engine.bind(settings))


def serve_until_signal(gate: Any, seconds: float) -> int:
    """Wait for a signal, then have `gate` admit nothing more and finish what it admitted.

    Returns how many images are left after `seconds`. A second signal raises KeyboardInterrupt.
    """
    with StopWish() as stop:
        while stop.number is None:
            time.sleep(POLL_SECONDS)
        end = time.monotonic() + seconds
        while (left := gate.close.remote().result()) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
    return left


@click.command(
    "serve", cls=Verb,
    example="cspd-run serve --port 8000\n"
    "cspd-run serve bundles/mar-h-b --device cuda --host 0.0.0.0 --api-key-file key",
)  # fmt: skip
@click.argument("bundle", type=FOLDER, required=False)
@option("--host", default="127.0.0.1", group=HTTP, help="Address to listen on.")
@option(
    "--port", default=8000, type=click.IntRange(1, 65535), group=HTTP, help="Port to listen on."
)
@option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    group=HTTP,
    show_default="none, on this machine alone",
    help="File with the key that clients must send; needed beyond loopback.",
)
@option(
    "--timeout",
    default=120.0,
    type=click.FloatRange(1, 3600),
    group=HTTP,
    help="Seconds for one request.",
)
@option(
    "--max-queue",
    default=64,
    type=click.IntRange(MAX_IMAGES, 10**4),
    group=HTTP,
    help="Images in work or waiting; beyond it, 429.",
)
@option(
    "--replicas",
    default=1,
    type=click.IntRange(1, 64),
    group=SPEED,
    help="Engines; on CUDA one GPU each.",
)
@option(
    "--batch-size",
    type=click.IntRange(1, 512),
    group=SPEED,
    show_default="1 on a CPU, 8 on a GPU",
    help="Images computed together, whoever asks for them; fewer cost as much.",
)
@backend_option
@machine_options
@option("--logs", type=FOLDER, group=OUTPUT, show_default="Ray's", help="Folder of the JSON logs.")
@json_option
def command(
    bundle: Path | None, host: str, port: int, replicas: int, api_key_file: Path | None,
    logs: Path | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Answer requests for images of BUNDLE, by default the pair inside the package."""
    opened = usable_bundle(bundle or shipped_bundle())
    for name in opened.manifest.files:
        opened.file(name)  # a damaged bundle is refused here, not by every replica
    folder = opened.folder.resolve()
    if not options["threads"]:
        options["threads"] = max(1, available_cpus() // replicas)
    options["batch_size"] = options["batch_size"] or USUAL_BATCH[options["device"]]
    settings = Settings(
        bundle=folder, replicas=replicas, key_sha256=read_key(api_key_file, host),
        hosts=LOOPBACK if is_loopback(host) else (), **options,
    )  # fmt: skip
    check_machine(opened, settings.backend, settings.device)
    check_port(host, port)
    with running(settings, host, port, logs) as gate:
        url = f"http://{host}:{port}/"
        finish(
            as_json, {"url": url, "bundle": str(folder)}, [logs] if logs else [],
            f"cspd serves {folder} at {url}",
            f"next: open it in a browser, or curl {url}v1/models; Ctrl-C stops",
        )  # fmt: skip
        if left := serve_until_signal(gate, settings.timeout):
            click.echo(f"{left} images were not finished within --timeout", err=True)
