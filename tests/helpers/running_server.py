"""A server as a process of its own, one for all tests that need one."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests

from cspd.runtime.commands.cli import shipped_bundle
from cspd.tools.load import tree

KEY = "a-test-key-of-32-characters-0123"
MAX_QUEUE = 16
BATCH = 8  # so that requests share one; by default they do not on a CPU


@dataclass
class Server:
    port: int
    process: subprocess.Popen
    bundle: Path
    logs: Path
    out: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

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
        "--max-queue", str(MAX_QUEUE), "--batch-size", str(BATCH), "--logs", str(folder / "logs"),
    ]  # fmt: skip
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    made = Server(port, process, folder / "bundle", folder / "logs", folder / "out")
    try:
        made.wait_until(
            lambda: b"cspd serves" in (folder / "out").read_bytes() or process.poll(), 180
        )
        assert process.poll() is None, (folder / "out").read_text()
        yield made
        stop_in_work(made)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def stop_in_work(server: Server) -> None:
    """SIGTERM while images are made: they are finished, streams too, and nothing is admitted.

    It stands at the end of every run, because a server of its own would take half a minute.
    """
    slow = {"label": 1, "method": "target", "num_iter": 49, "head_steps": 50}
    paths = ["/v1/images"] * 3 + ["/v1/images/stream"]
    with ThreadPoolExecutor(len(paths)) as pool:
        work = [pool.submit(server.post, slow | {"seed": i}, p) for i, p in enumerate(paths)]
        server.wait_until(lambda: server.metric("cspd_queue_images") == len(paths))
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: server.get("/readyz").status_code == 503)
        for path in set(paths):
            refused = server.post(slow, path)
            assert refused.status_code == 503, refused.text
            assert refused.json()["error"]["code"] == "stopping"
            assert int(refused.headers["Retry-After"]) > 0
        answers = [answer.result() for answer in work]
    assert [answer.status_code for answer in answers] == [200] * len(paths)
    assert all(answer.content.startswith(b"\x89PNG") for answer in answers[:3])
    assert answers[3].text.rstrip().rpartition("\n\n")[2].startswith("event: done")
    assert server.process.wait(60) == 0
    # Ray tells of an engine that a test killed when it likes; nothing else of Ray's is there.
    lines = server.out.read_text().splitlines()
    last = [line for line in lines if "A worker died or was killed" not in line][-1]
    assert last == "finishing the images in flight; once more stops at once"
