"""The denoising loop of some tokens: the reference, and the two parts that are exported.

`scan_loop` joins prelude and step into one ONNX graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, silu

from cspd.engines.schedule import COLUMNS
from cspd.engines.spec import GraphSpec, TensorSpec
from cspd.export.graphs.denoiser import guided_kernel, head_axes, head_outputs
from cspd.export.mar.head import DiffusionHead
from cspd.export.mar.model import DiffusionLoss
from cspd.export.mar.presets import MarConfig


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
        return *indices, weight, *steps, *modulations(self.diffloss.net, conditions, schedule)


def modulations(head: DiffusionHead, conditions: Tensor, schedule: Tensor) -> list[Tensor]:
    """Shift, 1 + scale and gate of every block, shift and 1 + scale of the last layer."""
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
        outputs=head_outputs(config, "sample", "mean", "log_std", "sum_log_std"),
        axes=head_axes(max_rows),
        capturable=False,
        independent="rows",
        scratch=modulation_width(config),
    )
