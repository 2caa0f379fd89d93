"""What stands between the network and the server: key, host, size, queue, headers, log line."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cspd.runtime.serve.metrics import Metrics
from cspd.runtime.serve.models import Settings

log = logging.getLogger("ray.serve")
PAGE_FILES = ("app.js", "api.js", "card.js", "style.css")
# Readable without a key: whether the server lives, and the page that asks for the key.
OPEN_PATHS = frozenset(("/healthz", "/readyz", "/", *(f"/{name}" for name in PAGE_FILES)))
BODY_SECONDS = 10.0
# When to ask again a server that is stopping: another one may have taken its place.
STOPPED_SECONDS = 10
INTERNAL = "internal error; the log has this id"
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(
        self, status: int, code: str, message: str, retry_after: int = 0, field: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.field = status, code, message, field
        self.headers = {"Retry-After": str(retry_after)} if retry_after else {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def problem(self, request_id: str) -> dict[str, str | None]:
        """What the answer says."""
        return {
            "id": request_id, "code": self.code, "message": self.message, "field": self.field
        }  # fmt: skip


def error_response(refusal: Refusal, request_id: str) -> JSONResponse:
    """The answer to a refused request."""
    return JSONResponse({"error": refusal.problem(request_id)}, refusal.status, refusal.headers)


class Admission:
    """Bounds the images that are admitted and not finished; once it is `closed`, to none."""

    def __init__(self, limit: int) -> None:
        self.limit, self.images, self.closed = limit, 0, False
        self._seconds_per_image = 1.0

    def check(self, images: int) -> None:
        """Raise Refusal 429 unless there is room for `images`, 503 if none are admitted."""
        if self.closed:
            raise Refusal(503, "stopping", "the server is stopping", STOPPED_SECONDS)
        if self.images + images > self.limit:
            wait = math.ceil(min(60.0, max(1.0, self._seconds_per_image * self.images)))
            raise Refusal(
                429, "queue_full", f"{self.images} images wait, the limit is {self.limit}", wait
            )

    @contextmanager
    def admit(self, images: int) -> Iterator[None]:
        """Hold room for `images`; Refusal if there is none."""
        self.check(images)
        self.images += images
        try:
            yield
        finally:
            self.images -= images

    def learn(self, seconds: float, batch: int) -> None:
        """Remember what an image costs, for Retry-After."""
        self._seconds_per_image += 0.1 * (seconds / batch - self._seconds_per_image)


class Guard:
    """ASGI middleware around everything: no answer leaves without an id, and none with a trace."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request and pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = scope.setdefault("state", {})["request_id"] = uuid.uuid4().hex
        start, status, began = time.monotonic(), 499, False  # 499: the client left

        async def answer(message: Message) -> None:
            nonlocal status, began
            if message["type"] == "http.response.start":
                status, began = message["status"], True
                headers = MutableHeaders(scope=message)
                headers.update(SECURITY_HEADERS | {"X-Cspd-Id": request_id})
            await send(message)

        try:
            try:
                self._check(scope)
                await self.app(scope, await self._bounded(scope, receive), answer)
            except Refusal as refusal:
                await error_response(refusal, request_id)(scope, receive, answer)
            except Exception:
                log.exception("failed", extra={"cspd_id": request_id})
                if began:
                    raise
                broken = Refusal(500, "internal", INTERNAL)
                await error_response(broken, request_id)(scope, receive, answer)
        finally:
            self._note(scope, request_id, status, time.monotonic() - start)

    def _check(self, scope: Scope) -> None:
        """Refuse a wrong host or key."""
        headers, settings = Headers(scope=scope), self.settings
        host = re.sub(r":[0-9]+$", "", headers.get("host", ""))
        if settings.hosts and host not in settings.hosts:
            raise Refusal(421, "wrong_host", f"this server answers to {', '.join(settings.hosts)}")
        if settings.key_sha256 is None or scope["path"] in OPEN_PATHS:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).hexdigest()
        same = hmac.compare_digest(given, settings.key_sha256)
        if scheme.lower() != "bearer" or not same:
            raise Refusal(401, "no_key", "a valid key is needed: Authorization: Bearer KEY")

    async def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` with the whole body read, which may be neither too long nor too slow."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return receive
        limit = self.settings.max_body
        too_large = Refusal(413, "too_large", f"the body may have {limit} bytes")
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length[:20]) > limit:
            raise too_large
        body, more = b"", True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await receive()
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise Refusal(408, "too_slow", "the body did not arrive in time") from None
        first = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        return replay

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        """The log line and the counters of a request; neither its body nor its headers."""
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.answered(route, status, seconds)
        details = {
            "cspd_id": request_id, "cspd_route": route, "cspd_status": status,
            "cspd_seconds": round(seconds, 4),
        }  # fmt: skip
        log.info("answered", extra=details)
