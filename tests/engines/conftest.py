"""The small graphs, exported once per run."""

from __future__ import annotations

import pytest
from tiny_graphs import GetGraph, Graph, export_tiny, tiny_graph


@pytest.fixture(scope="session")
def graph(made_once) -> GetGraph:
    """`graph(name, precision)`: a tiny graph, weights in the safetensors file beside it."""
    done: dict[tuple[str, str], Graph] = {}

    def get(name: str, precision: str = "fp32") -> Graph:
        def make(folder) -> None:
            export_tiny(name, precision, folder)

        if (name, precision) not in done:
            folder = made_once(f"{name}-{precision}", make)
            done[name, precision] = tiny_graph(name, precision, folder)
        return done[name, precision]

    return get
