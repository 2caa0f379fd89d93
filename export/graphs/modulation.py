"""The share of the head that does not depend on the noisy token, computed once before the loop.

All shifts, scales and gates follow from the condition and the time step alone, and they are most of
the head's weights: 3 of 5 matrices per block. `head_modulation` computes them for every token and
step in one large product; `denoiser_hoisted` then only looks them up, and so does
`speculative_round_hoisted` in `hoisted_round`. Exact up to rounding.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import embedding

from cspd.engines.schedule import COLUMNS
from cspd.engines.spec import Axis, GraphSpec, TensorSpec
from cspd.export.graphs.denoiser import GRAPH_TOLERANCE, guided_kernel
from cspd.export.graphs.denoiser_loop import modulation_width
from cspd.export.mar.head import DiffusionHead
from cspd.export.mar.model import DiffusionLoss
from cspd.export.mar.presets import MarConfig

# TensorRT keeps memory for the largest shapes of a profile, which is why a table is limited: to 22
# tokens of mar-h with guidance. Longer schedules and more tokens take the graphs with conditions.
MAX_TABLE_BYTES = 1 << 30
TABLE_STEPS = 100


def modulation_bytes(config: MarConfig, num_steps: int, branches: int) -> int:
    """Size in float32 of all modulations of one token, for chunking to a memory budget."""
    return 4 * num_steps * branches * modulation_width(config)


class HeadModulationGraph(nn.Module):
    """All modulations of some tokens over a whole schedule."""

    def __init__(self, diffloss: DiffusionLoss) -> None:
        super().__init__()
        self.diffloss = diffloss

    def forward(self, conditions: Tensor, schedule: Tensor) -> Tensor:
        """Modulations [N, S, G, M] for `conditions` [G, N, D] and a `schedule` [S, K]."""
        head = self.diffloss.net
        time = head.time_embed(schedule[:, 0])
        condition = head.cond_embed(conditions).transpose(0, 1)
        return head.modulations(condition[:, None] + time[:, None])


class HoistedDenoiserGraph(nn.Module):
    """One denoising step of rows at their own steps, with the modulations looked up."""

    def __init__(self, diffloss: DiffusionLoss) -> None:
        super().__init__()
        self.diffloss = diffloss

    def forward(
        self, x: Tensor, step: Tensor, token: Tensor, modulation: Tensor, guidance: Tensor,
        schedule: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """See `hoisted_spec` for shapes; returns mean, log_std, x0, fraction, each [R, C]."""
        return denoise_hoisted(self.diffloss.net, x, step, token, modulation, guidance, schedule)


def denoise_hoisted(
    head: DiffusionHead, x: Tensor, step: Tensor, token: Tensor, modulation: Tensor,
    guidance: Tensor, schedule: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `graphs.denoise_rows`, with the modulations looked up in the table of `hoisted_spec`."""
    tokens, steps, branches, width = modulation.shape
    table = modulation.reshape(tokens * steps, branches * width)
    looked_up = embedding(token * steps + step, table).unflatten(1, (branches, width))
    noise, variance = head.denoise(x.expand(branches, -1, -1), looked_up.transpose(0, 1))
    return guided_kernel(noise, variance, x, guidance, embedding(step, schedule))


def modulation_spec(config: MarConfig, max_rows: int) -> GraphSpec:
    """Contract of `head_modulation`; its output is large, see `modulation_bytes`."""
    return GraphSpec(
        name="head_modulation",
        inputs=(
            TensorSpec(name="conditions", shape=("branches", "tokens", config.embed_dim)),
            TensorSpec(name="schedule", shape=("steps", len(COLUMNS))),
        ),
        outputs=(
            TensorSpec(
                name="modulation",
                shape=("tokens", "steps", "branches", modulation_width(config)),
                tolerance=GRAPH_TOLERANCE,
            ),
        ),
        axes=table_axes(config, max_rows, "tokens"),
        scratch=modulation_width(config),
    )


def hoisted_spec(config: MarConfig, max_rows: int) -> GraphSpec:
    """Contract of `denoiser_hoisted`: as `denoiser`, with modulations in place of conditions."""
    row = ("rows", config.token_dim)
    table = ("tokens", "steps", "branches", modulation_width(config))
    return GraphSpec(
        name="denoiser_hoisted",
        inputs=(
            TensorSpec(name="x", shape=row),
            TensorSpec(name="step", dtype="int32", shape=("rows",), below="steps"),
            TensorSpec(name="token", dtype="int32", shape=("rows",), below="tokens"),
            TensorSpec(name="modulation", shape=table),
            TensorSpec(name="guidance", shape=("rows",)),
            TensorSpec(name="schedule", shape=("steps", len(COLUMNS))),
        ),
        outputs=tuple(
            TensorSpec(name=name, shape=row, tolerance=GRAPH_TOLERANCE)
            for name in ("mean", "log_std", "x0", "fraction")
        ),
        axes={
            "rows": Axis(min=1, opt=min(64, max_rows), max=max_rows),
            **table_axes(config, max_rows, "tokens"),
        },
    )


def table_axes(config: MarConfig, max_rows: int, tokens: str) -> dict[str, Axis]:
    """Ranges of a table of modulations whose axis of the tokens is called `tokens`."""
    limit = max(1, MAX_TABLE_BYTES // modulation_bytes(config, TABLE_STEPS, branches=2))
    limit = min(limit, max_rows)
    return {
        tokens: Axis(min=1, opt=min(8, limit), max=limit),
        "steps": Axis(min=2, opt=TABLE_STEPS, max=TABLE_STEPS),
        "branches": Axis(min=1, opt=2, max=2),
    }
