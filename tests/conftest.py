"""Shared fixtures: golden vectors, the tiny model, and its exported bundle (built once a run)."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden_settings() -> dict:
    return json.loads((Path(__file__).parent / "golden" / "mar_tiny.json").read_text())
