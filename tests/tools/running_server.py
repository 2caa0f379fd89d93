"""A server as a process of its own, one for all tests that need one."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests

from cspd.runtime.cli import shipped_bundle
from cspd.tools.load import tree

KEY = "a-test-key-of-32-characters-0123"
MAX_QUEUE = 16


@dataclass
class Server:
    url: str
    process: subprocess.Popen
    bundle: Path
    logs: Path

    def post(self, body, path="/v1/images", key=KEY, **options):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        headers |= options.pop("headers", {})
        kind = {"json": body} if isinstance(body, dict | list) else {"data": body}
        return requests.post(self.url + path, headers=headers, timeout=60, **kind, **options)

    def get(self, path, key=KEY, **headers):
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        return requests.get(self.url + path, headers=headers, timeout=10)

    def metric(self, name) -> float:
        line = re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics").text, re.M)
        return float(line[1])

    def engine_pid(self) -> int:
        """The replica that computes, among the descendants of the server."""
        for pid in tree(self.process.pid):
            if b"Engine" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        raise AssertionError("no engine runs")

    def wait_until(self, condition, seconds=30.0):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.1)


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """A server of a copy of the shipped pair, with a key and a short queue."""
    shutil.copytree(shipped_bundle(), folder / "bundle")
    (folder / "key").write_text(KEY + "\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("cspd-run")), "serve", str(folder / "bundle"),
        "--port", str(port), "--api-key-file", str(folder / "key"), "--threads", "1",
        "--max-queue", str(MAX_QUEUE), "--logs", str(folder / "logs"),
    ]  # fmt: skip
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    made = Server(f"http://127.0.0.1:{port}", process, folder / "bundle", folder / "logs")
    try:
        made.wait_until(
            lambda: b"cspd serves" in (folder / "out").read_bytes() or process.poll(), 180
        )
        assert process.poll() is None, (folder / "out").read_text()
        yield made
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
