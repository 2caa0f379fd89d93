"""A running server, from outside: bytes, bounds, streams, cancelling, faults, the page."""

import base64
import json
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from running_server import BATCH, KEY, MAX_QUEUE

from cspd.engines.bundle import open_bundle
from cspd.runtime.commands.cli import configure, main, shipped_bundle
from cspd.runtime.costs.sizes import DEFAULT_WINDOW
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.sessions import Sessions
from cspd.runtime.store.images import encode_png
from cspd.runtime.store.outputs import image_metadata

QUICK = {"num_iter": 6, "head_steps": 8}
BATCHED = {**QUICK, "batch_size": BATCH}
SLOW = {"num_iter": 49, "head_steps": 200, "method": "target"}


@pytest.fixture(scope="module")
def offline():
    """`offline(label, **options)`: the PNG of image 0, made without a server."""
    bundle = open_bundle(shipped_bundle())
    pipeline = Pipeline(Sessions(bundle, threads=1))
    made = {}

    def png(label: int, **options) -> bytes:
        key = (label, *sorted(options.items()))
        if key not in made:
            if options.get("method") == "lossless":
                options["window"] = DEFAULT_WINDOW  # the server speculates with a fixed window
            config = configure(bundle, str(label), {**BATCHED, "num_images": 1, **options})
            ((images, _),) = pipeline.generate(config)
            metadata = image_metadata(config, bundle, images[0])
            made[key] = encode_png(images[0].pixels, metadata)
        return made[key]

    return png


def problem(response, status, code):
    """The error of a refused request, after checking its form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"id", "code", "message", "field"} and error["code"] == code
    assert re.fullmatch("[0-9a-f]{32}", error["id"])
    assert error["id"] == response.headers["X-Cspd-Id"]
    assert "Traceback" not in response.text and ".py" not in response.text
    return error["message"]


@pytest.mark.parametrize("method", ["target", "cspd", "lossless", "draft"])
def test_bytes_are_those_of_generate(server, offline, method):
    response = server.post({"label": 7, "seed": 2**40 + 1, "method": method, **QUICK})
    assert response.headers["Content-Type"] == "image/png"
    assert response.content == offline(7, seed=2**40 + 1, method=method)


def test_lossless_says_what_it_saves(server):
    """Plain stepping evaluates the head once per denoising step of every autoregressive step."""
    images = {}
    for method in ("target", "lossless"):
        body = {"label": 7, "method": method, "n": 2, **QUICK}
        images[method] = server.post(body).json()["images"][0]
        assert images[method]["plain_head_calls"] == QUICK["num_iter"] * QUICK["head_steps"]
    assert images["target"]["head_calls"] == images["target"]["plain_head_calls"]
    assert QUICK["num_iter"] <= images["lossless"]["head_calls"]
    assert images["lossless"]["head_calls"] < images["lossless"]["plain_head_calls"]


def test_several_images_are_the_files_of_the_command(server, tmp_path):
    answer = server.post({"label": "bag", "n": 2, "seed": 3, "method": "cspd", **QUICK}).json()
    options = ["--labels", "bag", "--num-images", "2", "--seed", "3", "--method", "cspd"]
    options += ["--num-iter", "6", "--head-steps", "8", "--threads", "1", "--out", str(tmp_path)]
    options += ["--batch-size", str(BATCH)]
    main(["generate", *options, "--quiet", "--json"], standalone_mode=False)
    for index, image in enumerate(answer["images"]):
        written = (tmp_path / f"{index:05d}.png").read_bytes()
        assert base64.b64decode(image["png"]) == written
    assert "approximate" in answer["distribution"]
    assert [image["class_name"] for image in answer["images"]] == ["bag", "bag"]


def test_requests_of_several_seeds_and_classes_share_a_batch(server, offline):
    cases = [(label, seed) for seed in (5, 6) for label in (1, 4, 8)]

    def ask(case):
        return server.post({"label": case[0], "seed": case[1], "method": "target", **QUICK})

    with ThreadPoolExecutor(6) as pool:
        responses = list(pool.map(ask, cases))
    for (label, seed), response in zip(cases, responses, strict=True):
        assert response.content == offline(label, seed=seed, method="target")
    assert max(int(response.headers["X-Cspd-Batch"]) for response in responses) > 1


def events_of(response):
    """Kind and data of every server-sent event."""
    for block in response.content.decode().strip().split("\n\n"):
        kind, data = re.fullmatch(r"event: (\w+)\ndata: (.*)", block).groups()
        yield kind, json.loads(data)


def test_stream_shows_every_token_once_and_ends_with_the_image(server, offline):
    body = {"label": 0, "seed": 11, "method": "cspd", **QUICK}
    events = list(events_of(server.post(body, "/v1/images/stream")))
    kinds = [kind for kind, _ in events]
    assert kinds[:2] == ["accepted", "started"] and kinds[-1] == "done"
    steps = [data for kind, data in events if kind == "step"]
    assert len(steps) == len(kinds) - 3
    assert sorted(position for step in steps for position in step["new"]) == list(range(49))
    done = events[-1][1]
    assert sum(len(step["accepted"]) for step in steps) == done["accepted"]
    judged = sum(len(step["accepted"] + step["rejected"]) for step in steps)
    assert judged == done["proposed"]
    assert all(set(step["accepted"] + step["rejected"]) <= set(step["new"]) for step in steps)
    assert base64.b64decode(steps[-1]["preview"])[:4] == b"\x89PNG"
    assert base64.b64decode(done["png"]) == offline(0, seed=11, method="cspd")


BAD = {
    "unknown field": ({"label": 1, "methode": "cspd"}, None, "did you mean 'method'?"),
    "no label": ({}, "label", "label is missing"),
    "class": ({"label": 10}, "label", "expected 0..9"),
    "class name": ({"label": "snekers"}, "label", "did you mean 'sneaker'?"),
    "true is no number": ({"label": 1, "n": True}, "n", "n is true, expected a whole number"),
    "too many": ({"label": 1, "n": 17}, "n", "n is 17, expected 1..16"),
    "method": ({"label": 1, "method": "cpsd"}, "method", "did you mean 'cspd'?"),
    "steps": ({"label": 1, "num_iter": 50}, "num_iter", "num_iter is 50, expected 1..49"),
    "window": ({"label": 1, "method": "lossless", "window": 33}, "window", "expected 1..32"),
    "guidance": (b'{"label": 1, "cfg": NaN}', "cfg", "cfg is NaN, expected 0..100"),
    "list": ([1], None, "body"),
    "not json": (b"\x80\x04\x95pickle", None, "body"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("path", ["/v1/images", "/v1/images/stream"])
def test_bad_request(server, case, path):
    body, field, fragment = BAD[case]
    response = server.post(body, path, headers={"Content-Type": "application/json"})
    status, code = response.status_code, response.json()["error"]["code"]
    assert (status, code) in {(422, "invalid"), (400, "http")}
    assert response.json()["error"]["field"] == field
    message = problem(response, status, code)
    assert fragment in message and "--" not in message


def test_bounds_around_the_request(server):
    problem(server.post({"label": 1}, key=None), 401, "no_key")
    problem(server.post({"label": 1}, key="x" + KEY[1:]), 401, "no_key")
    problem(server.get("/metrics", key=None), 401, "no_key")
    problem(server.post(b"[" * 2**17), 413, "too_large")
    problem(server.post(iter([b" " * 2**15] * 4)), 413, "too_large")
    problem(server.get("/v1/models", Host="evil.example"), 421, "wrong_host")
    problem(server.get("/../../etc/passwd"), 404, "http")
    assert server.get("/healthz", Host="localhost:1").status_code == 200
    problem(server.get("/v1/images"), 405, "http")


def test_headers_are_bounded_and_cleaned(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        try:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + b"X: 1\r\n" * 10**6)
            assert not client.recv(99).startswith(b"HTTP/1.1 200")
        except ConnectionError:
            pass  # closed while it was sending
    for given, kept in (("an-id.7", True), ("x" * 65, False), ("forged<b>", False)):
        headers = {"X-Request-Id": given, "X-Request-Timeout-Seconds": "0.0001"}
        response = server.get("/healthz", **headers)
        assert response.status_code == 200
        assert (response.headers["X-Request-Id"] == given) is kept


def test_serve_answers_for_itself_what_the_documentation_says(server):
    """Routes of Ray Serve's own, without a key: the name of the application, and that it lives."""
    assert server.get("/-/routes", key=None).json() == {"/": "cspd"}
    assert server.get("/-/healthz", key=None).text == "success"


def test_the_terminal_shows_no_lines_of_ray(server):
    assert server.out.read_text() == (
        f"cspd serves {server.bundle.resolve()} at {server.url}/\n"
        f"next: open it in a browser, or curl {server.url}/v1/models; Ctrl-C stops\n"
    )


def test_information(server):
    assert server.get("/healthz", key=None).json() == {"status": "ok"}
    assert server.get("/readyz", key=None).json() == {"status": "ok"}
    for path in ("/healthz", "/readyz"):
        head = requests.head(server.url + path, timeout=10)
        assert head.status_code == 200 and head.content == b""
    (model,) = server.get("/v1/models").json()["data"]
    assert model["id"] == open_bundle(shipped_bundle()).sha256
    assert model["methods"] == ["target", "cspd", "lossless", "draft"]
    paths = server.get("/openapi.json").json()["paths"]
    assert {"/v1/images", "/v1/images/stream", "/v1/models", "/metrics"} <= set(paths)
    page = server.get("/", key=None)
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "unsafe" not in page.headers["Content-Security-Policy"]
    assert page.headers["X-Content-Type-Options"] == "nosniff"


def test_metrics_count(server):
    before = server.metric('cspd_images_total{method="cspd"}')
    server.post({"label": 2, "n": 3, "method": "cspd", **QUICK})
    assert server.metric('cspd_images_total{method="cspd"}') == before + 3
    assert 0 < server.metric("cspd_acceptance_rate") < 1
    assert server.metric("cspd_queue_images") == 0
    for name in (
        'cspd_requests_total{route="/v1/images",status="200"}',
        'cspd_request_seconds_count{route="/v1/images"}', "cspd_batch_images_count",
    ):  # fmt: skip
        assert server.metric(name) > 0


@pytest.mark.parametrize("path", ["/v1/images", "/v1/images/stream"])
def test_a_client_that_leaves_frees_its_rows(server, offline, path):
    """The abandoned image would take far longer than the next one is given."""
    body = json.dumps({"label": 1, **SLOW})
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        client.sendall((head + body).encode())
        server.wait_until(lambda: server.metric("cspd_queue_images") == 1)
        time.sleep(0.3)
    left = time.monotonic()
    server.wait_until(lambda: server.metric("cspd_queue_images") == 0, 5)
    response = server.post({"label": 3, "method": "draft", **QUICK})
    assert response.content == offline(3, method="draft")
    assert time.monotonic() - left < 5


def test_a_full_queue_refuses_at_once(server):
    body = {"label": 5, "n": MAX_QUEUE, "method": "target", "num_iter": 12, "head_steps": 50}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.post, body)
        server.wait_until(lambda: server.metric("cspd_queue_images") == MAX_QUEUE)
        for path in ("/v1/images", "/v1/images/stream"):
            problem(server.post({"label": 5}, path), 429, "queue_full")
        assert first.result().status_code == 200


def test_what_a_queue_takes_is_right(server, offline):
    def ask(seed):
        return server.post({"label": 5, "n": 4, "seed": seed, "method": "draft", **QUICK})

    with ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(ask, range(12)))
    refused = [response for response in responses if response.status_code == 429]
    assert refused and len(refused) < 12
    for response in refused:
        problem(response, 429, "queue_full")
        assert 1 <= int(response.headers["Retry-After"]) <= 60
    for seed, response in enumerate(responses):
        if response not in refused:
            first = base64.b64decode(response.json()["images"][0]["png"])
            assert response.status_code == 200
            assert first == offline(5, num_images=4, seed=seed, method="draft")
    assert server.metric("cspd_queue_images") == 0


def test_a_file_that_changes_under_the_server_changes_no_image(server, offline):
    """Networks are loaded and verified before the first request; files are not read again."""
    weights = server.bundle / "target" / "weights.safetensors"
    intact = weights.read_bytes()
    with weights.open("r+b") as file:  # in place: what was mapped would change too
        file.write(bytes(len(intact)))
    try:
        for method in ("target", "lossless"):
            response = server.post({"label": 6, "seed": 99, "method": method, **QUICK})
            assert response.content == offline(6, seed=99, method=method)
    finally:
        weights.write_bytes(intact)


def test_a_killed_engine_under_load(server, offline):
    """Every request gets the right bytes or a 503 with an id; then the engine is back."""
    old = server.engine_pid()

    def ask(seed):
        time.sleep(seed * 0.05)
        return server.post({"label": 9, "seed": seed, "method": "target", **QUICK})

    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(ask, seed) for seed in range(12)]
        server.wait_until(lambda: server.metric("cspd_queue_images") >= 4)
        os.kill(old, signal.SIGKILL)
        responses = [answer.result() for answer in answers]
    lost = [response for response in responses if response.status_code != 200]
    assert lost
    for response in lost:
        problem(response, 503, "unavailable")
        assert int(response.headers["Retry-After"]) > 0
    server.wait_until(lambda: server.get("/readyz", key=None).status_code == 200)
    assert server.engine_pid() != old
    for seed, response in enumerate(responses):
        if response in lost:
            response = server.post({"label": 9, "seed": seed, "method": "target", **QUICK})
        assert response.content == offline(9, seed=seed, method="target")


def test_logs_are_json_and_hold_no_key(server):
    text = "".join(path.read_text() for path in server.logs.glob("*.log"))
    lines = [json.loads(line) for line in text.splitlines() if "cspd_status" in line]
    assert {200, 401, 429, 503} <= {line["cspd_status"] for line in lines}
    assert all(re.fullmatch("[0-9a-f]{32}", line["cspd_id"]) for line in lines)
    assert KEY not in text
