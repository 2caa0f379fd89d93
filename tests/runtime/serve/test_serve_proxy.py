"""Bounds of the listening process, with a real uvicorn in this one: headers, connections, names."""

import asyncio
import socket
import threading

import pytest
import uvicorn

pytest.importorskip("ray.serve", reason="needs the extra scale")

from cspd.runtime.serve.proxy import BoundedProtocol, CleanHeaders, clean

PATIENCE = 5.0  # seconds in which what must happen happens


class Quick(BoundedProtocol):
    max_connections = 3
    header_seconds = 0.2


async def echo(scope, receive, send):
    """Answers with the names and values of the headers."""
    text = b"\n".join(b"=".join(pair) for pair in scope["headers"])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": text})


@pytest.fixture(scope="module")
def port():
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    server = uvicorn.Server(
        uvicorn.Config(CleanHeaders(echo), http=Quick, lifespan="off", log_config=None)
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join()


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)


def read(client) -> bytes:
    """What the server says until it closes the connection."""
    parts = []
    try:
        while part := client.recv(1 << 16):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost: x\r\nX-A: 1"])
def test_headers_that_do_not_arrive_end_the_connection(port, begun):
    with connect(port) as client:
        client.sendall(begun)
        assert read(client) == b""


def test_the_second_request_of_a_connection_may_not_dawdle_either(port):
    with connect(port) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\n")
        assert read(client).startswith(b"HTTP/1.1 200")


def test_headers_have_a_bound(port):
    with connect(port) as client:
        try:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-A: 1\r\n" * 200_000)
        except ConnectionError:
            return
        assert not read(client).startswith(b"HTTP/1.1 200")


def test_connections_have_a_bound(port):
    clients = [connect(port) for _ in range(Quick.max_connections)]
    for client in clients:  # they are open on the server's side too
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n")
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
    with connect(port) as late:
        assert read(late) == b""
    for client in clients:
        client.close()


def test_only_an_id_is_passed_on_as_the_id_of_a_request():
    good, bad = b"a-1.B_2", [b"", b"x" * 65, b"a b", b"a\x1b[31m", b'a","level":"', "ж".encode()]
    for value in (good, *bad):
        passed = clean([(b"x-request-id", value), (b"host", b"y")])
        assert ((b"x-request-id", value) in passed) == (value == good)
        assert (b"host", b"y") in passed


@pytest.mark.parametrize(
    "name",
    ["X-Request-Timeout-Seconds", "X-Request-Disconnect-Disabled", "X-Session-Id",
     "serve_multiplexed_model_id", "Serve-Multiplexed-Model-Id"],
)  # fmt: skip
def test_no_header_steers_ray_serve(name):
    assert clean([(name.lower().encode(), b"1"), (name.encode(), b"1")]) == []
