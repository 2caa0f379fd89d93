"""The part of the server that computes: one pipeline, one batch at a time, on one replica."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cspd.engines.cpus import limit_torch_threads
from cspd.engines.words import speaking
from cspd.runtime.config import RunConfig
from cspd.runtime.decode.canvas import ACCEPTED, REJECTED, Canvas
from cspd.runtime.decode.stats import Statistics
from cspd.runtime.pipeline import GeneratedImage, ImageId
from cspd.runtime.serve.batch import AbandonedError, BatchQueue, Ticket, group_key
from cspd.runtime.serve.bundle import configuration, methods_of
from cspd.runtime.serve.heads import CountingPipeline
from cspd.runtime.serve.models import ImageAnswer, ImageRequest, Settings
from cspd.runtime.serve.words import in_request
from cspd.runtime.sessions import Sessions
from cspd.runtime.settings import usable_bundle
from cspd.runtime.store.images import encode_png
from cspd.runtime.store.outputs import image_metadata


class Engine:
    """Deployment: opens and verifies all networks before it takes the first request."""

    def __init__(self, settings: Settings) -> None:
        limit_torch_threads(settings.threads)
        self.bundle = usable_bundle(settings.bundle)
        self.identity = self.bundle.sha256
        self.pipeline = CountingPipeline(
            Sessions(self.bundle, settings.backend, settings.device, settings.threads)
        )
        for method in methods_of(self.bundle):
            request = ImageRequest(label=0, method=method)
            self.pipeline.open(configuration(request, self.bundle, settings))
        self._queue = BatchQueue(settings.batch_size, self._run)
        self._thread = ThreadPoolExecutor(1)

    async def identify(self) -> str:
        """Identity of the bundle that is loaded."""
        return self.identity

    async def generate(self, config: RunConfig) -> list[ImageAnswer]:
        """All images of `config`."""
        tickets = self._tickets(config, watched=False)
        self._queue.put(tickets)
        try:
            return [await ticket.result() for ticket in tickets]
        finally:
            self._queue.drop(tickets)

    async def watch(self, config: RunConfig) -> AsyncIterator[tuple[str, Any]]:
        """What happens to the first image of `config`, step by step."""
        tickets = self._tickets(config, watched=True)[:1]
        self._queue.put(tickets)
        try:
            kind = ""
            while kind != "done":
                kind, value = await tickets[0].events.get()
                if kind == "failed":
                    raise value
                yield kind, value
        finally:
            self._queue.drop(tickets)

    def _tickets(self, config: RunConfig, watched: bool) -> list[Ticket]:
        key, now = group_key(config), time.monotonic()
        return [
            Ticket(config, ImageId(config.seed, i, config.label_of(i)), key, now, watched)
            for i in range(config.num_images)
        ]

    async def _run(self, tickets: list[Ticket]) -> None:
        batch = RunningBatch(self.pipeline, tickets, asyncio.get_running_loop())
        await asyncio.get_running_loop().run_in_executor(self._thread, batch.run)


class RunningBatch:
    """One batch on the computing thread; tells the event loop what happens to its images."""

    def __init__(
        self, pipeline: CountingPipeline, tickets: list[Ticket], loop: asyncio.AbstractEventLoop
    ) -> None:
        self.pipeline, self.tickets, self.loop = pipeline, tickets, loop
        self.start = time.monotonic()
        self.watching = 0.0
        self.known = [0] * len(tickets)

    def run(self) -> None:
        """Compute, then put an answer into every ticket; AbandonedError if nobody waits."""
        for ticket in self.tickets:
            waited = self.start - ticket.since
            self.tell(ticket, "started", {"batch": len(self.tickets), "waited": waited})
        self.pipeline.head_calls.clear()
        config, rows = self.tickets[0].config, [ticket.image for ticket in self.tickets]
        with speaking(in_request):
            made, statistics = self.pipeline.generate_rows(config, rows, self.on_step)
        seconds = time.monotonic() - self.start - self.watching
        for ticket, image in zip(self.tickets, made, strict=True):
            self.tell(ticket, "done", self.answer(ticket, image, statistics, seconds))

    def on_step(self, canvas: Canvas, statistics: Statistics) -> None:
        """After every autoregressive step: stop if nobody waits, show the rest to who watches."""
        if all(ticket.cancelled for ticket in self.tickets):
            raise AbandonedError
        start = time.monotonic()
        for row, ticket in enumerate(self.tickets):
            if ticket.watched and not ticket.cancelled:
                self.tell(ticket, "step", self.progress(canvas, statistics, row, start))
        self.known = canvas.known[: len(self.tickets)]
        self.watching += time.monotonic() - start

    def progress(
        self, canvas: Canvas, statistics: Statistics, row: int, now: float
    ) -> dict[str, Any]:
        """What one row gained in this step, positions in reading order, and how it looks."""
        new = canvas.sequence[row, self.known[row] : canvas.known[row]].tolist()
        fates = canvas.fates[row].tolist()
        return {
            "known": canvas.known[row],
            "total": canvas.sequence.shape[1],
            "new": new,
            "accepted": [p for p in new if fates[p] == ACCEPTED],
            "rejected": [p for p in new if fates[p] == REJECTED],
            "target_rounds": statistics.target_rounds,
            "target_calls": statistics.target_calls,
            "draft_calls": statistics.draft_calls,
            **self.pipeline.head_calls.as_dict(),
            "seconds": now - self.start - self.watching,
            "preview": _base64(encode_png(self.pipeline.preview(canvas, row), {})),
        }

    def answer(
        self, ticket: Ticket, image: GeneratedImage, statistics: Statistics, seconds: float
    ) -> ImageAnswer:
        """The finished image as `cspd-run generate` would write it, and its costs."""
        metadata = image_metadata(ticket.config, self.pipeline.bundle, image)
        return ImageAnswer(
            index=image.index,
            label=image.label,
            class_name=metadata["class"],
            png=_base64(encode_png(image.pixels, metadata)),
            seconds=seconds,
            waited=self.start - ticket.since,
            batch=len(self.tickets),
            proposed=image.verdicts.proposed - image.verdicts.discarded,
            accepted=image.verdicts.accepted,
            acceptance_rate=image.verdicts.acceptance_rate,
            target_rounds=statistics.target_rounds,
            target_calls=statistics.target_calls,
            draft_calls=statistics.draft_calls,
            **self.pipeline.head_calls.as_dict(),
        )

    def tell(self, ticket: Ticket, kind: str, value: Any) -> None:
        """Put an event into `ticket` from this thread."""
        self.loop.call_soon_threadsafe(ticket.events.put_nowait, (kind, value))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
