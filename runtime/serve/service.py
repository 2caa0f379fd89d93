"""Answers requests: admits them, passes them to the engines, counts what comes back."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any, NoReturn, cast

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from cspd.engines.errors import BundleError, CspdError, MissingExtraError
from cspd.runtime.config import RunConfig
from cspd.runtime.serve.bundle import configuration, describe
from cspd.runtime.serve.limits import INTERNAL, Admission, Refusal
from cspd.runtime.serve.metrics import Metrics
from cspd.runtime.serve.models import ImageAnswer, ImageRequest, Settings
from cspd.runtime.serve.words import of_request
from cspd.runtime.settings import usable_bundle
from cspd.runtime.store.outputs import distribution

log = logging.getLogger("ray.serve")
READY_SECONDS = 5.0
RETRY_SECONDS = 5


class Service:
    """Answers requests with the engines behind `engine`."""

    def __init__(self, settings: Settings, engine: DeploymentHandle) -> None:
        self.settings, self.engine = settings, engine
        self.bundle = usable_bundle(settings.bundle)
        self.model = describe(self.bundle, settings)
        self.admission = Admission(settings.max_queue)
        self.metrics = Metrics(lambda: self.admission.images)

    def configuration(self, request: ImageRequest) -> RunConfig:
        """The run of `request`; Refusal 422 if the bundle cannot do it."""
        try:
            return configuration(request, self.bundle, self.settings)
        except CspdError as error:
            raise invalid(error) from None

    async def images(self, config: RunConfig) -> list[ImageAnswer]:
        """All images of `config`."""
        with self.admission.admit(config.num_images):
            call = self.engine.generate.remote(config)
            try:
                async with asyncio.timeout(self.settings.timeout):
                    made = await call
            except Exception as error:
                refuse(error)
            finally:
                call.cancel()  # without effect on what is finished
        for image in made:
            self._count(config, image)
        return made

    async def events(self, config: RunConfig, request_id: str) -> AsyncIterator[str]:
        """Server-sent events of the making of one image."""
        yield _event("accepted", {"id": request_id, "distribution": distribution(config)})
        try:
            with self.admission.admit(1):
                watch = self.engine.options(stream=True).watch
                call = cast(DeploymentResponseGenerator[Any], watch.remote(config))
                try:
                    async with asyncio.timeout(self.settings.timeout):
                        async for kind, value in call:
                            if kind == "done":
                                self._count(config, value)
                                value = value.model_dump()
                            yield _event(kind, value)
                except Exception as error:
                    refuse(error)
                finally:
                    call.cancel()
        except Refusal as refusal:
            yield _problem(refusal, request_id)
        except Exception:
            log.exception("failed", extra={"cspd_id": request_id})
            yield _problem(Refusal(500, "internal", INTERNAL), request_id)

    async def ready(self) -> bool:
        """Whether an engine answers."""
        try:
            async with asyncio.timeout(READY_SECONDS):
                return bool(await self.engine.identify.remote())
        except (TimeoutError, RayActorError, RayServeException):
            return False

    def _count(self, config: RunConfig, image: ImageAnswer) -> None:
        self.metrics.finished(config.method, image)
        self.admission.learn(image.seconds, image.batch)


def invalid(error: CspdError) -> Refusal:
    """The answer to a request that cannot be done."""
    problem = of_request(error)
    return Refusal(422, "invalid", problem.message, field=problem.field)


def refuse(error: Exception) -> NoReturn:
    """Raise the answer to an engine that did not deliver.

    What a request can do something about is said to it; a bundle or an installation that is
    broken is not, and stays our fault.
    """
    cause = getattr(error, "cause", error)  # Ray wraps what an engine raised
    if isinstance(cause, CspdError) and not isinstance(cause, BundleError | MissingExtraError):
        raise invalid(cause) from None
    if isinstance(error, TimeoutError):
        raise Refusal(504, "timeout", "the image was not finished in time") from None
    if isinstance(error, RayActorError | RayServeException | BackPressureError):
        message = "the engine was lost or is not ready; ask again"
        raise Refusal(503, "unavailable", message, RETRY_SECONDS) from None
    raise error


def _problem(refusal: Refusal, request_id: str) -> str:
    return _event("error", refusal.problem(request_id))


def _event(kind: str, value: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps(value)}\n\n"
