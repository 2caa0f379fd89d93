"""Weights for the tests of their intake: a small MAR model, and files in every layout."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cspd.engines.errors import CspdError
from cspd.export.mar.model import Mar
from cspd.export.mar.presets import PRESETS
from cspd.export.mar.vae import VaeDecoder
from cspd.export.weights.random import random_state


@functools.cache
def draft_state() -> Mapping[str, Tensor]:
    """Random weights of the preset fashion-draft; do not change them."""
    return random_state(Mar(PRESETS["fashion-draft"]), seed=0)


def other_state() -> dict[str, Tensor]:
    """Weights of the same shapes, all of them others."""
    return {name: tensor + 1 for name, tensor in draft_state().items()}


def decoder_zeros() -> dict[str, Tensor]:
    """Zeros in the shapes of the KL-16 decoder, of which a pickle stores one element each."""
    with torch.device("meta"):
        shapes = VaeDecoder().state_dict()
    return {name: torch.zeros(1).expand(tensor.shape) for name, tensor in shapes.items()}


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` as a wrapper names it."""
    return {prefix + name: tensor for name, tensor in state.items()}


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether two states have the same names and numbers."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def write_sparse_safetensors(
    path: Path, state: Mapping[str, Tensor], dtype: str, item: int
) -> None:
    """A file with the shapes of `state` whose zeros take no room on the disk."""
    header, end = {}, 0
    for name, tensor in state.items():
        start, end = end, end + tensor.numel() * item
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    packed = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(packed)) + packed)
        file.truncate(8 + len(packed) + end)


def error_of(call: Callable[[], object]) -> str:
    """The message of the CspdError that `call` raises, which is one line."""
    with pytest.raises(CspdError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message
