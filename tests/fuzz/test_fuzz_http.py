"""The server against its own OpenAPI document: requests of any form, sound and broken ones.

The application, its gate and its engine are the real ones; only Ray's transport between them is
left out. No answer may be a server error or differ from the document.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fuzz_counts import CASES
from harness import budget
from hypothesis import given
from hypothesis import strategies as st

from cspd.runtime.commands.cli import shipped_bundle

schemathesis = pytest.importorskip("schemathesis", reason="needs the extra test")
pytest.importorskip("ray", reason="the server needs the extra scale")
pytest.importorskip("cspd.runtime.serve.app", reason="the server is not in this version")

from schemathesis.checks import CHECKS as KNOWN  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from cspd.runtime.serve.app import make_app  # noqa: E402
from cspd.runtime.serve.engine import Engine  # noqa: E402
from cspd.runtime.serve.models import Settings  # noqa: E402
from cspd.runtime.serve.service import Service  # noqa: E402

SETTINGS = Settings(bundle=shipped_bundle(), threads=1, batch_size=1, timeout=20.0, max_queue=4)
ENGINE = Engine(SETTINGS)


class Stream:
    """An asynchronous generator that can be cancelled, as Ray's answers can."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def __aiter__(self) -> Any:
        return self._generator

    def cancel(self) -> None:
        """Without effect: the generator ends with the request."""


class Method:
    """A method of the engine behind `remote`, in this process."""

    def __init__(self, call: Any, stream: bool = False) -> None:
        self._call, self._stream = call, stream

    def remote(self, *arguments: Any) -> Any:
        made = self._call(*arguments)
        return Stream(made) if self._stream else asyncio.ensure_future(made)


class Handle:
    """A stand-in for Ray's handle of a deployment."""

    generate, identify = Method(ENGINE.generate), Method(ENGINE.identify)
    watch = Method(ENGINE.watch, stream=True)

    def options(self, **_: Any) -> Handle:
        return self


APP = make_app(SETTINGS, Service(SETTINGS, Handle()))
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)  # which also registers the checks
CHECKS = [
    KNOWN.get_one(name)
    for name in (
        "not_a_server_error", "status_code_conformance", "content_type_conformance",
        "response_schema_conformance", "response_headers_conformance",
    )
]  # fmt: skip


def cheap(body: Any) -> Any:
    """The same request with few steps: what is tested is the form, not the patience."""
    if isinstance(body, dict):
        for name, most in (("num_iter", 2), ("head_steps", 3), ("n", 2)):
            value = body.get(name)
            if value is None and name != "n":
                body[name] = most
            elif type(value) is int and value > most:
                body[name] = most
    return body


def openapi_test(number: int, label: str) -> None:
    """Define the test of one operation: schemathesis gives those of a schema one name."""

    def test(case):
        CASES["http: openapi"] += 1
        if case.body is not None:
            case.body = cheap(case.body)
        response = case.call()
        case.validate_response(response, checks=CHECKS)

    test.__name__ = f"test_openapi_{number}"
    bounded = budget(full=150, ci=5)(test)
    globals()[test.__name__] = SCHEMA.include(name=label).parametrize()(bounded)


OPERATIONS = [operation.ok().label for operation in SCHEMA.get_all_operations()]
for position, name in enumerate(OPERATIONS):
    openapi_test(position, name)


BODIES = [b"[" * 50_000, b'{"label":1' + b" " * 70_000, b'{"label": 1e999}', b'{"label": NaN}']
PATHS = ["/v1/images", "/v1/images/stream", "/v1/../etc/passwd", "/..%2f..%2fetc/passwd"]


@budget(full=300, ci=10)
@given(
    body=st.one_of(st.binary(max_size=200), st.sampled_from(BODIES)),
    path=st.sampled_from(PATHS),
    kind=st.sampled_from(["application/json", "text/plain", "", "multipart/form-data", "a\tb"]),
)
def test_bodies_of_bytes(body, path, kind):
    CASES["http: bytes"] += 1
    with TestClient(APP, raise_server_exceptions=False) as client:
        answer = client.post(path, content=body, headers={"content-type": kind})
    assert 400 <= answer.status_code < 500
    assert set(answer.json()["error"]) == {"id", "code", "message", "field"}
    assert "Traceback" not in answer.text
