"""The server that the tests of this folder share, started when the first of them asks for it."""

import pytest


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    pytest.importorskip("ray.serve", reason="needs the extra scale")
    from running_server import running_server

    with running_server(tmp_path_factory.mktemp("serve")) as running:
        yield running
