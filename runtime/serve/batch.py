"""Images of many requests in one batch: a queue that groups what may be computed together.

Ray's `serve.batch` fills a batch with whatever comes next. Images can only share a batch if they
share their sampling settings, so this queue takes the oldest image and all that fit to it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from cspd.runtime.config import RunConfig
from cspd.runtime.pipeline import ImageId

GATHER_SECONDS = 0.02


class AbandonedError(Exception):
    """Every image of a batch was cancelled."""


def group_key(config: RunConfig) -> str:
    """Equal for configurations whose images may be computed in one batch."""
    return config.model_copy(update={"seed": 0, "labels": (0,), "num_images": 1}).model_dump_json()


@dataclass(eq=False)
class Ticket:
    """One image in the queue. Its `events` end with ("done", ...) or ("failed", error)."""

    config: RunConfig
    image: ImageId
    key: str
    since: float
    watched: bool = False
    cancelled: bool = False
    events: asyncio.Queue[tuple[str, Any]] = field(default_factory=asyncio.Queue)

    async def result(self) -> Any:
        """What the image came to; raises what its batch raised."""
        while True:
            kind, value = await self.events.get()
            if kind == "failed":
                raise value
            if kind == "done":
                return value


class BatchQueue:
    """Runs one batch at a time with `run(tickets)`, which must put a result into each of them."""

    def __init__(self, size: int, run: Callable[[list[Ticket]], Awaitable[None]]) -> None:
        self._size, self._run = size, run
        self._waiting: deque[Ticket] = deque()
        self._worker: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, tickets: list[Ticket]) -> None:
        """Add the images of a request."""
        self._waiting.extend(tickets)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())

    def drop(self, tickets: list[Ticket]) -> None:
        """Cancel images: those that wait are never started, those in work end at the next step."""
        for ticket in tickets:
            ticket.cancelled = True
        self._waiting = deque(t for t in self._waiting if not t.cancelled)

    async def _work(self) -> None:
        while self._waiting:
            if len(self._waiting) < self._size:
                await asyncio.sleep(GATHER_SECONDS)
            if batch := self._next():
                try:
                    await self._run(batch)
                except Exception as error:  # whatever it is, it belongs to these images
                    for ticket in batch:
                        ticket.events.put_nowait(("failed", error))

    def _next(self) -> list[Ticket]:
        """The oldest images with the settings of the oldest of all."""
        batch: list[Ticket] = []
        rest: deque[Ticket] = deque()
        for ticket in self._waiting:
            fits = not batch or ticket.key == batch[0].key
            (batch if fits and len(batch) < self._size else rest).append(ticket)
        self._waiting = rest
        return batch
