"""The networks of the contract as traceable modules: they own the tracing quirks.

`graph_specs` and the module classes stand side by side because the order of `forward`'s arguments
is the order of the spec's inputs.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import embedding

from cspd.engines.schedule import COLUMNS
from cspd.engines.spec import Axis, GraphSpec, TensorSpec
from cspd.export.mar.head import DiffusionHead
from cspd.export.mar.model import DiffusionLoss
from cspd.export.mar.presets import MarConfig

# Relative error of the norm that an output may have against PyTorch in float32. For float32 it is
# what the golden vectors ask for; below that, twenty units of rounding of the number format.
TOLERANCES = {"fp32": 1e-4, "fp16": 20 * 2.0**-11, "bf16": 20 * 2.0**-8}
GRAPH_TOLERANCE = TOLERANCES["fp32"]
MAX_STEPS = 1000


def guided_kernel(
    noise: Tensor, variance: Tensor, x: Tensor, guidance: Tensor, row: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One denoising step: mean, log_std (without temperature), x0 and variance fraction.

    `noise`, `variance` [G, R, C] are the head's outputs: first for the condition, then, if G = 2,
    without it. `x` [R, C]; `guidance` [R], without effect if G = 1; `row` [R, K] or [1, K] of the
    schedule table. All float32. (MAR, forward_with_cfg and p_mean_variance.)
    """
    eps = noise[-1] + guidance[:, None] * (noise[0] - noise[-1])
    coefficients = {name: row[:, i, None] for i, name in enumerate(COLUMNS)}
    x0 = coefficients["x0_from_x"] * x - coefficients["x0_from_noise"] * eps
    mean = coefficients["mean_x0"] * x0 + coefficients["mean_x"] * x
    fraction = (variance[0] + 1) / 2
    low, high = coefficients["log_std_min"], coefficients["log_std_max"]
    return mean, low + fraction * (high - low), x0, fraction


class DenoiserGraph(nn.Module):
    """One denoising step for rows that may be at different steps of different tokens."""

    def __init__(self, diffloss: DiffusionLoss) -> None:
        super().__init__()
        self.diffloss = diffloss

    def forward(
        self, x: Tensor, step: Tensor, token: Tensor, conditions: Tensor, guidance: Tensor,
        schedule: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """See `denoiser_spec` for shapes; returns mean, log_std, x0, fraction, each [R, C]."""
        return denoise_rows(self.diffloss.net, x, step, token, conditions, guidance, schedule)


def denoise_rows(
    head: DiffusionHead, x: Tensor, step: Tensor, token: Tensor, conditions: Tensor,
    guidance: Tensor, schedule: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Mean, log_std, x0 and fraction, each [R, C], of one denoising step; see `denoiser_spec`."""
    row = embedding(step, schedule)
    time = head.time_embed(row[:, 0])
    condition = head.cond_embed(conditions).transpose(0, 1)
    branches, width = conditions.shape[0], condition.shape[-1]
    flat = embedding(token, condition.reshape(-1, branches * width))
    condition = flat.reshape(-1, branches, width).transpose(0, 1)
    noise, variance = head.denoise(x.expand(branches, -1, -1), head.modulations(condition + time))
    return guided_kernel(noise, variance, x, guidance, row)


class PixelDecoder(nn.Module):
    """Decoder of pixel-space models: latents [B, p * p, h, w] are patches of a grey image."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, latents: Tensor) -> Tensor:
        """Images [B, 1, h * p, w * p] in [-1, 1]."""
        return nn.functional.pixel_shuffle(latents, self.patch).clamp(-1, 1)


def backbone_spec(config: MarConfig, max_batch: int) -> GraphSpec:
    """Contract of the masked transformer."""
    length, dim = config.num_tokens, config.embed_dim
    return GraphSpec(
        name="backbone",
        inputs=(
            TensorSpec(name="tokens", shape=("batch", length, config.token_dim)),
            TensorSpec(
                name="visible",
                dtype="int32",
                shape=("batch", "visible"),
                below=length,
                distinct=True,
            ),
            TensorSpec(name="visible_len", dtype="int32", shape=("batch",), below="visible"),
            TensorSpec(
                name="labels", dtype="int32", shape=("batch",), below=config.num_classes + 1
            ),
            TensorSpec(name="positions", dtype="int32", shape=("batch", "positions"), below=length),
        ),
        outputs=(
            TensorSpec(name="z", shape=("batch", "positions", dim), tolerance=GRAPH_TOLERANCE),
        ),
        axes={
            "batch": Axis(min=1, opt=max_batch, max=max_batch),
            "visible": Axis(min=0, opt=length // 2, max=length),
            "positions": Axis(min=1, opt=min(8, length), max=length),
        },
        independent="batch",
    )


def head_axes(max_rows: int, **more: Axis) -> dict[str, Axis]:
    """Ranges of the axes that all graphs of the head have, and of `more`."""
    return {
        "rows": Axis(min=1, opt=min(64, max_rows), max=max_rows),
        "branches": Axis(min=1, opt=2, max=2),
        "steps": Axis(min=2, opt=100, max=MAX_STEPS),
        **more,
    }


def head_outputs(config: MarConfig, *names: str) -> tuple[TensorSpec, ...]:
    """Outputs `names` of a graph of the head, each [rows, C]."""
    shape = ("rows", config.token_dim)
    return tuple(TensorSpec(name=name, shape=shape, tolerance=GRAPH_TOLERANCE) for name in names)


def denoiser_spec(config: MarConfig, max_rows: int) -> GraphSpec:
    """Contract of one denoising step; branch 0 is conditional, branch 1 unconditional."""
    return GraphSpec(
        name="denoiser",
        inputs=(
            TensorSpec(name="x", shape=("rows", config.token_dim)),
            TensorSpec(name="step", dtype="int32", shape=("rows",), below="steps"),
            TensorSpec(name="token", dtype="int32", shape=("rows",), below="tokens"),
            TensorSpec(name="conditions", shape=("branches", "tokens", config.embed_dim)),
            TensorSpec(name="guidance", shape=("rows",)),
            TensorSpec(name="schedule", shape=("steps", len(COLUMNS))),
        ),
        outputs=head_outputs(config, "mean", "log_std", "x0", "fraction"),
        axes=head_axes(max_rows, tokens=Axis(min=1, opt=min(64, max_rows), max=max_rows)),
        independent="rows",
    )


def decoder_spec(grid: int, channels: int, image: tuple[int, int], max_batch: int) -> GraphSpec:
    """Contract of the image decoder; `image` is (colour channels, pixels per side)."""
    colours, side = image
    return GraphSpec(
        name="decoder",
        inputs=(TensorSpec(name="latents", shape=("batch", channels, grid, grid)),),
        outputs=(
            TensorSpec(
                name="images", shape=("batch", colours, side, side), tolerance=GRAPH_TOLERANCE
            ),
        ),
        axes={"batch": Axis(min=1, opt=max_batch, max=max_batch)},
        independent="batch",
    )
