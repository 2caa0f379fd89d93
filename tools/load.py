"""Load on a running server, every answer compared with the offline image: `python -m ...load`."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import click
import numpy as np

from cspd.engines.bundle import Bundle
from cspd.engines.errors import CspdError
from cspd.runtime.commands.cli import FOLDER
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.serve.bundle import configuration
from cspd.runtime.serve.models import ImageRequest, Settings
from cspd.runtime.sessions import Sessions
from cspd.runtime.settings import shipped_bundle, usable_bundle
from cspd.runtime.store.images import encode_png
from cspd.runtime.store.outputs import image_metadata

METHODS = ("cspd", "target")
SAMPLE_SECONDS = 2.0


@dataclass(frozen=True)
class Case:
    """A request and the bytes that must come back."""

    body: dict[str, Any]
    png: bytes


@dataclass
class Tally:
    """What came back: answers by status, seconds of the good ones, wrong ones, memory in MB."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    memory: list[tuple[float, float]] = field(default_factory=list)

    def summary(self, wall: float) -> dict[str, Any]:
        """The figures of the run."""
        found = {"p50": 50, "p95": 95, "p99": 99} if self.seconds else {}
        tail = self.memory[len(self.memory) // 4 :]
        times, sizes = [t for t, _ in tail], [mb for _, mb in tail]
        slope = float(np.polyfit(times, sizes, 1)[0]) * 60 if len(tail) > 2 else None
        return {
            "seconds": round(wall, 1),
            "statuses": dict(sorted(self.statuses.items())),
            "wrong_images": self.wrong,
            "images_per_second": round(len(self.seconds) / wall, 2),
            **{k: round(float(np.percentile(self.seconds, q)), 2) for k, q in found.items()},
            "memory_mb": [round(mb) for _, mb in self.memory[:: max(1, len(self.memory) // 20)]],
            "memory_mb_per_minute": None if slope is None else round(slope, 2),
        }


def make_cases(bundle: Bundle, count: int, num_iter: int, head_steps: int) -> list[Case]:
    """Requests of two methods, each class and seed in turn, and their images made offline."""
    pipeline, settings, cases = Pipeline(Sessions(bundle)), Settings(bundle=bundle.folder), []
    for i in range(count):
        body = {
            "label": i % bundle.manifest.geometry.num_classes, "seed": i // 2,
            "method": METHODS[i % len(METHODS)], "num_iter": num_iter, "head_steps": head_steps,
        }  # fmt: skip
        config = configuration(ImageRequest.model_validate(body), bundle, settings)
        ((images, _),) = pipeline.generate(config)
        metadata = image_metadata(config, bundle, images[0])
        cases.append(Case(body, encode_png(images[0].pixels, metadata)))
    return cases


async def client(
    session: aiohttp.ClientSession, url: str, cases: list[Case], number: int, end: float,
    tally: Tally,
) -> None:  # fmt: skip
    """One client: asks, checks, asks again, waits when it is told to."""
    while time.monotonic() < end:
        case = cases[number % len(cases)]
        number += 1
        start = time.monotonic()
        try:
            async with session.post(f"{url}/v1/images", json=case.body) as response:
                body = await response.read()
                tally.statuses[str(response.status)] += 1
                retry = float(response.headers.get("Retry-After", 0))
        except (aiohttp.ClientError, TimeoutError) as error:
            tally.statuses[type(error).__name__] += 1
            retry = 1.0
        else:
            if response.status == 200:
                tally.seconds.append(time.monotonic() - start)
                tally.wrong += body != case.png
        if retry:
            await asyncio.sleep(max(0.0, min(retry, end - time.monotonic())))


def tree(root: int) -> set[int]:
    """Process ids of `root` and all that descend from it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found: set[int] = set()
    new = {root}
    while new:
        found |= new
        new = {pid for pid, parent in parents.items() if parent in found} - found
    return found


def memory_mb(root: int) -> float:
    """Memory of a process tree, shared pages counted once (PSS)."""
    total = 0
    for pid in tree(root):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


async def watch_memory(root: int, tally: Tally) -> None:
    """Note the memory of the server until cancelled."""
    start = time.monotonic()
    while True:
        mb = await asyncio.to_thread(memory_mb, root)
        tally.memory.append((time.monotonic() - start, mb))
        await asyncio.sleep(SAMPLE_SECONDS)


async def load(
    url: str, cases: list[Case], clients: int, seconds: float, pid: int | None
) -> dict[str, Any]:
    """Run all clients for `seconds`; requests on the way then are waited for."""
    tally, start = Tally(), time.monotonic()
    limit = aiohttp.ClientTimeout(total=seconds + 120)
    connector = aiohttp.TCPConnector(limit=clients)
    watcher = asyncio.create_task(watch_memory(pid, tally)) if pid else None
    async with aiohttp.ClientSession(timeout=limit, connector=connector) as session:
        ends = start + seconds
        tasks = (client(session, url, cases, i, ends, tally) for i in range(clients))
        await asyncio.gather(*tasks)
    if watcher:
        watcher.cancel()
    return {"clients": clients, **tally.summary(time.monotonic() - start)}


@click.command()
@click.argument("url")
@click.argument("bundle", type=FOLDER, required=False)
@click.option("--clients", default=200, show_default=True, type=click.IntRange(1, 1000))
@click.option("--seconds", default=60.0, show_default=True, type=click.FloatRange(1, 3600))
@click.option("--cases", default=32, show_default=True, type=click.IntRange(1, 1000),
              help="Different images that are asked for.")  # fmt: skip
@click.option("--num-iter", default=12, show_default=True, help="Autoregressive steps.")
@click.option("--head-steps", default=25, show_default=True, help="Denoising steps.")
@click.option("--server-pid", type=int, help="Also watch the memory of this process tree.")
def main(
    url: str, bundle: Path | None, clients: int, seconds: float, cases: int, num_iter: int,
    head_steps: int, server_pid: int | None,
) -> None:  # fmt: skip
    """Ask the server at URL for images of BUNDLE and compare every byte; exit 1 on a wrong one."""
    try:
        made = make_cases(usable_bundle(bundle or shipped_bundle()), cases, num_iter, head_steps)
    except CspdError as error:
        raise click.ClickException(str(error)) from None
    figures = asyncio.run(load(url.rstrip("/"), made, clients, seconds, server_pid))
    click.echo(json.dumps(figures, indent=1))
    failed = [status for status in figures["statuses"] if not status.startswith(("2", "4"))]
    if figures["wrong_images"] or failed:
        raise click.ClickException("wrong images or failed requests")


if __name__ == "__main__":
    main()
