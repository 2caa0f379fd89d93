"""Geometry of the models we know: one frozen record per model, nothing derived from a file name."""

from __future__ import annotations

from dataclasses import dataclass, fields

from cspd.engines.errors import CspdError

PUBLISHED = ("mar-b", "mar-l", "mar-h")
HEAD_STEPS = 100  # denoising steps, the default of a bundle of published models
MAX_DEPTH, MAX_SIZE = 256, 1 << 20


@dataclass(frozen=True)
class MarConfig:
    """Shape of one MAR model: a square grid of tokens, a masked transformer, a diffusion head.

    `grid` tokens per side, `token_dim` channels per token, `buffer_size` class tokens in front of
    the sequence. `head_width` and `head_depth` belong to the diffusion head.
    """

    grid: int
    embed_dim: int
    encoder_depth: int
    decoder_depth: int
    num_heads: int
    head_width: int
    head_depth: int
    token_dim: int = 16
    buffer_size: int = 64
    num_classes: int = 1000
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            limit = MAX_DEPTH if field.name.endswith("depth") else MAX_SIZE
            if field.name != "norm_eps" and not 1 <= value <= limit:
                raise CspdError(f"model: {field.name} is {value}, expected 1..{limit}")
        if self.embed_dim % self.num_heads:
            raise CspdError(
                f"model: embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
            )

    @property
    def num_tokens(self) -> int:
        """Image tokens of one image, without the class buffer."""
        return self.grid * self.grid


# mar-b, mar-l, mar-h: sizes of the published checkpoints (LTH14/mar, shapes of the files).
PRESETS: dict[str, MarConfig] = {
    "mar-b": MarConfig(16, 768, 12, 12, 12, head_width=1024, head_depth=6),
    "mar-l": MarConfig(16, 1024, 16, 16, 16, head_width=1280, head_depth=8),
    "mar-h": MarConfig(16, 1280, 20, 20, 16, head_width=1536, head_depth=12),
    "fashion-target": MarConfig(
        7, 192, 5, 3, 6, head_width=192, head_depth=3, buffer_size=4, num_classes=10
    ),
    "fashion-draft": MarConfig(
        7, 96, 2, 2, 4, head_width=96, head_depth=2, buffer_size=4, num_classes=10
    ),
}
