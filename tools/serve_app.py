"""The routes of the server: images, their making step by step, models, health, metrics, page."""

from __future__ import annotations

import asyncio
import base64
import importlib.resources
import json
import logging
from collections.abc import AsyncIterator
from typing import Any, NoReturn, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from cspd.engines.bundle import open_bundle
from cspd.engines.errors import CspdError
from cspd.runtime.config import RunConfig
from cspd.runtime.outputs import law, tool_version
from cspd.tools.serve_limits import INTERNAL, Admission, Guard, Refusal, error_response
from cspd.tools.serve_metrics import Metrics
from cspd.tools.serve_models import (
    ErrorAnswer,
    HealthAnswer,
    ImageAnswer,
    ImageRequest,
    ImagesAnswer,
    ModelsAnswer,
    Settings,
    configuration,
    describe,
)  # fmt: skip

log = logging.getLogger("ray.serve")
Responses = dict[int | str, dict[str, Any]]
READY_SECONDS = 5.0
RETRY_SECONDS = 5
PAGE = {"/": "index.html", "/app.js": "app.js", "/style.css": "style.css"}
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
ERRORS: Responses = {
    status: {"model": ErrorAnswer, "description": text}
    for status, text in {
        400: "The body is not JSON.", 401: "A key is needed.", 408: "The body came too slowly.",
        413: "The body is too large.", 421: "Another host was asked for.",
        422: "A field is wrong.", 429: "The queue is full; see Retry-After.",
        500: "Our fault; the log has the id.", 503: "The engine is restarting; see Retry-After.",
        504: "It took too long.",
    }.items()
}  # fmt: skip
PNG: Responses = {200: {"content": {"image/png": {}, "application/json": {}}}}


class Service:
    """Answers requests with the engines behind `engine`."""

    def __init__(self, settings: Settings, engine: DeploymentHandle) -> None:
        self.settings, self.engine = settings, engine
        self.bundle = open_bundle(settings.bundle)
        self.model = describe(self.bundle, settings)
        self.admission = Admission(settings.max_queue)
        self.metrics = Metrics(lambda: self.admission.images)

    def configuration(self, request: ImageRequest) -> RunConfig:
        """The run of `request`; Refusal 422 if the bundle cannot do it."""
        try:
            return configuration(request, self.bundle, self.settings)
        except CspdError as error:
            raise Refusal(422, "invalid", str(error)) from None

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
        yield _event("accepted", {"id": request_id, "law": law(config)})
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


def refuse(error: Exception) -> NoReturn:
    """Raise the answer to an engine that did not deliver."""
    if isinstance(error, TimeoutError):
        raise Refusal(504, "timeout", "the image was not finished in time") from None
    if isinstance(error, RayActorError | RayServeException | BackPressureError):
        message = "the engine was lost or is not ready; ask again"
        raise Refusal(503, "unavailable", message, RETRY_SECONDS) from None
    raise error


def make_app(settings: Settings, engine: DeploymentHandle) -> FastAPI:
    """The application of one server."""
    service = Service(settings, engine)
    app = FastAPI(title="cspd", version=tool_version(), docs_url=None, redoc_url=None)
    add_errors(app)
    add_images(app, service)
    add_information(app, service)
    add_page(app)
    app.add_middleware(Guard, settings=settings, metrics=service.metrics)
    return app


def add_images(app: FastAPI, service: Service) -> None:
    """The routes that make images."""

    @app.post("/v1/images", response_model=ImagesAnswer, responses={**ERRORS, **PNG})
    async def images(body: ImageRequest, request: Request) -> Any:
        """Images of one class: PNG for a single one, JSON with base64 for more or by Accept."""
        config = service.configuration(body)
        made = await service.images(config)
        if body.n == 1 and "application/json" not in request.headers.get("accept", ""):
            return png_response(made[0])
        return ImagesAnswer(
            id=request.state.request_id,
            law=law(config),
            config=config.model_dump(mode="json"),
            bundle=service.model.id,
            images=made,
        )

    stream: Responses = {
        200: {"content": {"text/event-stream": {}}, "description": "Server-sent events."}
    }

    @app.post("/v1/images/stream", response_class=StreamingResponse, responses={**ERRORS, **stream})
    async def watch(body: ImageRequest, request: Request) -> StreamingResponse:
        """One image in the making: events accepted, started, step, then done or error."""
        if body.n != 1:
            raise Refusal(422, "invalid", "n: a stream shows one image")
        events = service.events(service.configuration(body), request.state.request_id)
        return StreamingResponse(events, media_type="text/event-stream")


def png_response(image: ImageAnswer) -> Response:
    """The file that `cspd-run generate` would write, its costs in headers."""
    timing = f"wait;dur={image.waited * 1e3:.1f}, batch;dur={image.seconds * 1e3:.1f}"
    headers = {"Server-Timing": timing, "X-Cspd-Batch": str(image.batch)}
    if image.acceptance_rate is not None:
        headers["X-Cspd-Acceptance"] = f"{image.acceptance_rate:.4f}"
    return Response(base64.b64decode(image.png), media_type="image/png", headers=headers)


def add_information(app: FastAPI, service: Service) -> None:
    """The routes about the server itself."""
    host: Responses = {421: ERRORS[421]}
    errors: Responses = {status: ERRORS[status] for status in (401, 421, 500)}

    @app.get("/v1/models", responses=errors)
    async def models() -> ModelsAnswer:
        """The bundle that is served."""
        return ModelsAnswer(data=[service.model])

    @app.get("/healthz", responses=host)
    async def healthz() -> HealthAnswer:
        """The server lives."""
        return HealthAnswer(status="ok")

    starting: Responses = {503: {"model": HealthAnswer, "description": "No engine is ready."}}

    @app.get("/readyz", responses={**host, **starting})
    async def readyz(response: Response) -> HealthAnswer:
        """An engine is ready to make images."""
        if await service.ready():
            return HealthAnswer(status="ok")
        response.status_code = 503
        return HealthAnswer(status="starting")

    plain: Responses = {
        200: {"content": {"text/plain": {}}, "description": "Prometheus text format."}
    }

    @app.get("/metrics", response_class=Response, responses={**errors, **plain})
    async def metrics() -> Response:
        """Counters and histograms for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def add_page(app: FastAPI) -> None:
    """The gallery: files read once, so that no path of a request reaches the file system."""
    folder = importlib.resources.files("cspd.tools") / "gallery"
    for path, name in PAGE.items():
        content, kind = (folder / name).read_bytes(), TYPES[name.rpartition(".")[2]]

        def page(_: Request, content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind)

        app.add_route(path, page, methods=["GET"])


def add_errors(app: FastAPI) -> None:
    """One form for all errors: an id, a code, a message, never a trace or what was sent."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        return error_response(refusal, request.state.request_id)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part)[:80] for part in first["loc"][1:]) or "body"
        refusal = Refusal(422, "invalid", f"{where}: {first['msg']}")
        return error_response(refusal, request.state.request_id)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        refusal = Refusal(error.status_code, "http", str(error.detail))
        response = error_response(refusal, request.state.request_id)
        response.headers.update(error.headers or {})
        return response


def _problem(refusal: Refusal, request_id: str) -> str:
    problem = {"id": request_id, "code": refusal.code, "message": refusal.message}
    return _event("error", problem)


def _event(kind: str, value: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps(value)}\n\n"
