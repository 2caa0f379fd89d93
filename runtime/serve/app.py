"""The routes of the server: images, their making step by step, models, health, metrics, page."""

from __future__ import annotations

import base64
import importlib.resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from cspd.runtime.serve.limits import PAGE_FILES, Guard, Refusal, error_response
from cspd.runtime.serve.models import (
    ErrorAnswer,
    HealthAnswer,
    ImageAnswer,
    ImageRequest,
    ImagesAnswer,
    ModelsAnswer,
    Settings,
)  # fmt: skip
from cspd.runtime.serve.service import Service
from cspd.runtime.serve.words import explain
from cspd.runtime.store.outputs import distribution, tool_version

Responses = dict[int | str, dict[str, Any]]
PAGE = {"/": "index.html"} | {f"/{name}": name for name in PAGE_FILES}
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
ERRORS: Responses = {
    status: {"model": ErrorAnswer, "description": text}
    for status, text in {
        400: "The body is not JSON.", 401: "A key is needed.", 408: "The body came too slowly.",
        413: "The body is too large.", 421: "Another host was asked for.",
        422: "A field is wrong.", 429: "The queue is full; see Retry-After.",
        500: "Our fault; the log has the id.", 504: "It took too long.",
        503: "The engine restarts, or the server stops; see Retry-After.",
    }.items()
}  # fmt: skip
PNG: Responses = {200: {"content": {"image/png": {}, "application/json": {}}}}


def make_app(settings: Settings, service: Service) -> FastAPI:
    """The application of one server."""
    app = FastAPI(title="cspd", version=tool_version(), docs_url=None, redoc_url=None)
    add_errors(app, service)
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
            distribution=distribution(config),
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
            message = f"n is {body.n}, expected 1: a stream shows one image"
            raise Refusal(422, "invalid", message, field="n")
        service.admission.check(1)  # while the answer can still be a 429
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

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", responses=host)
    async def healthz() -> HealthAnswer:
        """The server lives."""
        return HealthAnswer(status="ok")

    starting: Responses = {503: {"model": HealthAnswer, "description": "No engine is ready."}}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", responses={**host, **starting})
    async def readyz(response: Response) -> HealthAnswer:
        """An engine is ready to make images, and they are admitted."""
        if not service.admission.closed and await service.ready():
            return HealthAnswer(status="ok")
        response.status_code = 503
        return HealthAnswer(status="stopping" if service.admission.closed else "starting")

    plain: Responses = {
        200: {"content": {"text/plain": {}}, "description": "Prometheus text format."}
    }

    @app.get("/metrics", response_class=Response, responses={**errors, **plain})
    async def metrics() -> Response:
        """Counters and histograms for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def add_page(app: FastAPI) -> None:
    """The gallery: files read once, so that no path of a request reaches the file system."""
    folder = importlib.resources.files("cspd.runtime.serve") / "gallery"
    for path, name in PAGE.items():
        content, kind = (folder / name).read_bytes(), TYPES[name.rpartition(".")[2]]

        def page(_: Request, content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind)

        app.add_route(path, page, methods=["GET"])


def add_errors(app: FastAPI, service: Service) -> None:
    """One form for all errors: an id, a code, a message, a field, never a trace."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        return error_response(refusal, request.state.request_id)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        problem = explain(error.errors()[0], service.model.bounds)
        refusal = Refusal(422, "invalid", problem.message, field=problem.field)
        return error_response(refusal, request.state.request_id)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        refusal = Refusal(error.status_code, "http", str(error.detail))
        response = error_response(refusal, request.state.request_id)
        response.headers.update(error.headers or {})
        return response
