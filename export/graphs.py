"""The networks of the contract as traceable modules: they own the tracing quirks.

`graph_specs` and the module classes stand side by side because the order of `forward`'s arguments
is the order of the spec's inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, silu

from cspd.engines.schedule import COLUMNS
from cspd.engines.spec import Axis, GraphSpec, TensorSpec
from cspd.export.diffusion_head import DiffusionHead
from cspd.export.mar import DiffusionLoss
from cspd.export.presets import MarConfig

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
    return mean, fraction * high + (1 - fraction) * low, x0, fraction


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


class LoopPrelude(nn.Module):
    """What the denoising loop computes once for all steps, ahead of it.

    That is most of the head: 3 of 5 matrices per block do not depend on the noisy token.
    """

    def __init__(self, diffloss: DiffusionLoss) -> None:
        super().__init__()
        self.diffloss = diffloss

    def forward(
        self, noise: Tensor, conditions: Tensor, guidance: Tensor, temperature: Tensor,
        schedule: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Constants of all steps, then what each step takes, see `LoopStep`.

        With N = G * R: `tile` [N], `first`, `last` [R], `weight` [R, 2C]; by step: added noise
        [S, R, C], `from_x` [S, 1], `scale` and `offset` [S, 2C], the modulations [S, N, w] each.
        """
        branches, rows, _ = conditions.shape
        channels = noise.shape[-1]
        first = torch.arange(rows, dtype=torch.int32, device=noise.device)
        indices = first.repeat(branches), first, first + (branches - 1) * rows
        weight = torch.cat([guidance[:, None].expand(-1, channels), torch.ones_like(noise[0])], 1)
        # The last step adds no noise: its mean is the sample.
        added = torch.cat([torch.zeros_like(noise[:1]), noise[1:]]) * temperature[:, None]
        steps = added, *step_coefficients(schedule, channels)
        return *indices, weight, *steps, *self.modulations(conditions, schedule)

    def modulations(self, conditions: Tensor, schedule: Tensor) -> list[Tensor]:
        """Shift, 1 + scale and gate of every block, shift and 1 + scale of the last layer."""
        head = self.diffloss.net
        width = head.cond_embed.out_features
        time = head.time_embed(schedule[:, 0])[:, None]
        active = silu(time + head.cond_embed(conditions).flatten(0, 1)).flatten(0, 1)
        active = active.to(head.cond_embed.weight.dtype)
        parts = []
        for whole in head.modulation_layers:
            pieces = zip(whole.weight.split(width), whole.bias.split(width), strict=True)
            for kind, (matrix, bias) in enumerate(pieces):
                # Whole matrices of few columns: cutting the products up would copy all of them.
                parts.append(linear(active, matrix, bias + 1 if kind == 1 else bias).float())
        return [part.unflatten(0, (schedule.shape[0], -1)) for part in parts]


def step_coefficients(schedule: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Step as mean = from_x * x + scale * eps, log_std = scale * variance + offset.

    Returns `from_x` [S, 1], `scale`, `offset` [S, 2C] for outputs [eps, variance]: `guided_kernel`
    with its coefficients multiplied out, which the loop can do before it starts.
    """
    column = {name: schedule[:, i, None] for i, name in enumerate(COLUMNS)}
    from_x = column["mean_x0"] * column["x0_from_x"] + column["mean_x"]
    from_noise = -column["mean_x0"] * column["x0_from_noise"]
    low, high = column["log_std_min"], column["log_std_max"]
    pairs = ((from_noise, (high - low) / 2), (torch.zeros_like(low), (high + low) / 2))
    scale, offset = (torch.cat([v.expand(-1, channels) for v in pair], 1) for pair in pairs)
    return from_x, scale, offset


class LoopStep(nn.Module):
    """One iteration of the denoising loop, with as few operations as it can be written in.

    For a small head an operation costs more than its arithmetic: 100 steps run some 40 each.
    """

    def __init__(self, diffloss: DiffusionLoss) -> None:
        super().__init__()
        self.diffloss = diffloss

    def forward(
        self, x: Tensor, sum_log_std: Tensor, last_log_std: Tensor, last_mean: Tensor,
        tile: Tensor, first: Tensor, last: Tensor, weight: Tensor,
        added: Tensor, from_x: Tensor, scale: Tensor, offset: Tensor, *modulations: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Next (x, sum_log_std, log_std, mean), each [R, C].

        Carried from the step before: `x`, `sum_log_std`, `last_log_std`, `last_mean` (unused, it is
        carried so that the loop returns it). Constant: `tile` [N], the token of each head row;
        `first`, `last` [R], the rows of the conditional and of the unconditional branch; `weight`
        [R, 2C] of the former. Of this step: the rest. The sum runs one step late, so that it
        leaves out the final step.
        """
        out = self._head(x, tile, list(modulations))
        conditional, unconditional = embedding(first, out), embedding(last, out)
        kernel = unconditional + weight * (conditional - unconditional)
        shift, log_std = (kernel * scale + offset).chunk(2, dim=-1)
        mean = from_x * x + shift
        return mean + log_std.exp() * added, sum_log_std + last_log_std, log_std, mean

    def _head(self, x: Tensor, tile: Tensor, modulations: list[Tensor]) -> Tensor:
        head = self.diffloss.net
        hidden = embedding(tile, head.input_proj(x))
        for block in head.blocks:
            shift, scale, gate, *modulations = modulations
            hidden = hidden + gate * block.mlp(block.in_ln(hidden) * scale + shift)
        shift, scale = modulations
        return head.final_layer.linear(head.final_layer.norm_final(hidden) * scale + shift)


class ReferenceStep(nn.Module):
    """One iteration of the denoising loop, written as the model is defined."""

    def __init__(self, diffloss: DiffusionLoss) -> None:
        super().__init__()
        self.diffloss = diffloss

    def forward(
        self, x: Tensor, row: Tensor, conditions: Tensor, guidance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and log_std [R, C] of the step `row` [1, K] of the schedule at `x` [R, C]."""
        rows = x.expand(len(conditions), -1, -1)
        eps, variance = self.diffloss.net(rows, row[:, 0], conditions)
        mean, log_std, _, _ = guided_kernel(eps, variance, x, guidance, row)
        return mean, log_std


class DenoiserLoopGraph(nn.Module):
    """The whole denoising loop of some tokens.

    Called, it takes one `reference` step after another. Exported, it is `prelude` and an ONNX Scan
    over `step`, with all that can be done once ahead of the loop; so that a comparison of both is
    one of two ways to compute the same.
    """

    def __init__(self, diffloss: DiffusionLoss) -> None:
        super().__init__()
        self.reference = ReferenceStep(diffloss)
        self.prelude, self.step = LoopPrelude(diffloss), LoopStep(diffloss)

    def forward(
        self, noise0: Tensor, noise: Tensor, conditions: Tensor, guidance: Tensor,
        temperature: Tensor, schedule: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """See `denoiser_loop_spec`; returns sample, mean, log_std, sum_log_std, each [R, C]."""
        sample = mean = noise0
        log_std = sum_log_std = torch.zeros_like(noise0)
        for step in reversed(range(len(schedule))):
            sum_log_std = sum_log_std + log_std
            mean, log_std = self.reference(sample, schedule[step, None], conditions, guidance)
            # The last step adds no noise: its mean is the sample.
            sample = mean + temperature[:, None] * log_std.exp() * noise[step] if step else mean
        return sample, mean, log_std, sum_log_std


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


def _head_axes(max_rows: int, **more: Axis) -> dict[str, Axis]:
    return {
        "rows": Axis(min=1, opt=min(64, max_rows), max=max_rows),
        "branches": Axis(min=1, opt=2, max=2),
        "steps": Axis(min=2, opt=100, max=MAX_STEPS),
        **more,
    }


def _head_outputs(config: MarConfig, *names: str) -> tuple[TensorSpec, ...]:
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
        outputs=_head_outputs(config, "mean", "log_std", "x0", "fraction"),
        axes=_head_axes(max_rows, tokens=Axis(min=1, opt=min(64, max_rows), max=max_rows)),
        independent="rows",
    )


def modulation_width(config: MarConfig) -> int:
    """Modulations per row and step: three vectors per block, two for the last layer."""
    return (3 * config.head_depth + 2) * config.head_width


def denoiser_loop_spec(config: MarConfig, max_rows: int) -> GraphSpec:
    """Contract of the whole denoising loop; noise is indexed by the step, 0 being the last."""
    row, channels = ("rows",), config.token_dim
    return GraphSpec(
        name="denoiser_loop",
        inputs=(
            TensorSpec(name="noise0", shape=("rows", channels)),
            TensorSpec(name="noise", shape=("steps", "rows", channels)),
            TensorSpec(name="conditions", shape=("branches", "rows", config.embed_dim)),
            TensorSpec(name="guidance", shape=row),
            TensorSpec(name="temperature", shape=row),
            TensorSpec(name="schedule", shape=("steps", len(COLUMNS))),
        ),
        outputs=_head_outputs(config, "sample", "mean", "log_std", "sum_log_std"),
        axes=_head_axes(max_rows),
        capturable=False,
        independent="rows",
        scratch=modulation_width(config),
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
