"""Weights by rule, as the vectors of the decoder were made with."""

from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_weight(index: int, name: str, shape: list[int]) -> torch.Tensor:
    """The rule of tests/golden/kl16_decoder.json, field `weights`."""
    generator = np.random.Generator(np.random.PCG64(index))
    normal = generator.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        normal = np.float32(0.05) * normal + np.float32(name.endswith("weight"))
    else:
        normal /= np.sqrt(np.float32(np.prod(shape[1:])))
    return torch.from_numpy(normal)


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()
