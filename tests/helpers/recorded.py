"""Golden vectors as inputs of our code: the authors' tiny model and their noise."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from cspd.export.mar.model import Mar
from cspd.export.mar.presets import MarConfig

GOLDEN = Path(__file__).parents[1] / "golden"
# The authors' constructor leaves the norm layers at PyTorch's epsilon; their presets pass 1e-6.
TINY = MarConfig(4, 32, 2, 2, 4, head_width=32, head_depth=2, buffer_size=4, norm_eps=1e-5)


def vectors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "mar_tiny.vectors.safetensors")


def tiny_state() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "mar_tiny.weights.safetensors")


def tiny_model() -> Mar:
    model = Mar(TINY).eval().requires_grad_(False)
    model.load_state_dict(tiny_state(), strict=True)
    return model


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


class RecordedNoise:
    """Noise source that plays back the recorded image run."""

    def __init__(self) -> None:
        self._vectors = vectors()

    def orders(self, images, num_tokens):
        # The authors mask the first tokens of their order longest.
        return self._vectors["image.orders"].flip(1)[images]

    def chain(self, purpose, images, positions, num_steps, channels):
        start = self._vectors["image.noise0"][images, positions]
        return start, self._vectors["image.noise"][images, positions].transpose(0, 1)
