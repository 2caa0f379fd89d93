"""The small graphs, exported once per session."""

from __future__ import annotations

import pytest
from tiny_graphs import GetGraph, Graph, export_tiny


@pytest.fixture(scope="session")
def graph(tmp_path_factory: pytest.TempPathFactory) -> GetGraph:
    """`graph(name, precision)`: a tiny graph, weights in the safetensors file beside it."""
    done: dict[tuple[str, str], Graph] = {}

    def get(name: str, precision: str = "fp32") -> Graph:
        if (name, precision) not in done:
            folder = tmp_path_factory.mktemp(f"{name}-{precision}")
            done[name, precision] = export_tiny(name, precision, folder)
        return done[name, precision]

    return get
