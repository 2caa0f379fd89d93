"""Prometheus metrics of the server, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cspd.runtime.serve.models import ImageAnswer

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)


class Metrics:
    """What `/metrics` shows. `queue` tells how many images are admitted and not finished."""

    def __init__(self, queue: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "cspd_requests", "Answered requests.", ["route", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "cspd_request_seconds", "From the request to the end of its answer.", ["route"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.images = Counter("cspd_images", "Finished images.", ["method"], registry=self.registry)
        self.judged = Counter(
            "cspd_tokens_judged", "Drafted tokens that the target judged.", registry=self.registry
        )
        self.accepted = Counter(
            "cspd_tokens_accepted", "Drafted tokens that were accepted.", registry=self.registry
        )
        self.rate = Gauge(
            "cspd_acceptance_rate", "Accepted per judged token, since the start.",
            registry=self.registry,
        )  # fmt: skip
        self.batches = Histogram(
            "cspd_batch_images", "Images in the batch of each finished image.",
            buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry,
        )  # fmt: skip
        self.waiting = Gauge(
            "cspd_queue_images", "Images admitted and not finished.", registry=self.registry
        )
        self.waiting.set_function(queue)
        self._counts = [0, 0]

    def finished(self, method: str, image: ImageAnswer) -> None:
        """Count a finished image."""
        self.images.labels(method).inc()
        self.batches.observe(image.batch)
        self.judged.inc(image.proposed)
        self.accepted.inc(image.accepted)
        self._counts = [self._counts[0] + image.proposed, self._counts[1] + image.accepted]
        if self._counts[0]:
            self.rate.set(self._counts[1] / self._counts[0])

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self.requests.labels(route, str(status)).inc()
        self.latency.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
