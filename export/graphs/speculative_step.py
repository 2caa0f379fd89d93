"""One round inside the speculative loop.

Whatever here does not depend on the carried state, all modulations of the head above all, is moved
out of the loop by `while_loop`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from cspd.export.graphs.denoiser_loop import modulations
from cspd.export.graphs.round import CANDIDATES, Chain, Kernel, State, advance, count
from cspd.export.mar.model import DiffusionLoss

CARRIED = (
    "x", "left", "x0", "fraction", "mean", "log_std", "sum_log_std", "used", "active",
)  # fmt: skip
LOGGED = ("moved", "drawn")


class SpeculativeStep(nn.Module):
    """Draft, verify, accept, resample: a round for tokens at their own steps."""

    def __init__(self, diffloss: DiffusionLoss) -> None:
        super().__init__()
        self.diffloss = diffloss

    def forward(
        self, x: Tensor, left: Tensor, x0: Tensor, fraction: Tensor, mean: Tensor,
        log_std: Tensor, sum_log_std: Tensor, used: Tensor, active: Tensor,
        conditions: Tensor, guidance: Tensor, temperature: Tensor, noise: Tensor,
        log_accept: Tensor, candidates: Tensor, choices: Tensor, schedule: Tensor,
        draft_state: Tensor, draft_noise: Tensor, last_row: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The next values of `CARRIED`, then those of `LOGGED` [N].

        Carried, with N tokens and C channels: `x`, `x0`, `fraction`, `mean`, `log_std`,
        `sum_log_std` [N, 1, C]; `left` [N, 1], how many steps are left; `used` [N, 1], how many
        candidates are taken; `active` [N, 1], bool. The rest is constant, as for
        `speculative_loop_spec`.
        """
        pool = candidates.shape[1]
        start = (left - 1).clamp(min=0)
        last = embedding(start.flatten(), last_row[:, None])
        token = count(noise.shape[1], x)[:, None]
        taken = token * pool + (used + count(CANDIDATES, x)).clamp(max=pool - 1)

        def verify(states: Tensor, steps: Tensor, columns: tuple[Tensor, ...]) -> Kernel:
            seen = count(steps.shape[1], x) <= last
            out = self._outputs(states, steps, seen, conditions, schedule)
            return _guided(out, states, guidance, columns)

        after = advance(
            State(x, start, x0, fraction),
            last,
            Chain(temperature, noise, log_accept, schedule, draft_state, draft_noise),
            embedding(taken, candidates.flatten(0, 1)),
            embedding(taken, choices.flatten(0, 1)),
            verify,
        )
        done = after.done & active
        moved, drawn = torch.where(done, after.moved, 0), torch.where(active, after.drawn, 0)
        left, used, wide = left - moved, used + drawn, done[..., None]
        kept = zip(
            (after.x, after.x0, after.fraction, after.mean, after.log_std),
            (x, x0, fraction, mean, log_std),
            strict=True,
        )
        x, *others = (torch.where(wide, new, old) for new, old in kept)
        return (
            x, left.int(), *others, sum_log_std + wide * after.sum_log_std, used.int(),
            (left > 0) & (used <= pool - CANDIDATES), moved.int().flatten(), drawn.int().flatten(),
        )  # fmt: skip

    def _outputs(
        self, states: Tensor, steps: Tensor, seen: Tensor, conditions: Tensor, schedule: Tensor
    ) -> Tensor:
        """Outputs [G, N, L, 2C] of the head at `states`, zero where not `seen` [N, L]."""
        branches, tokens, _ = conditions.shape
        window, channels = seen.shape[1], states.shape[-1]
        state = torch.arange(tokens * window, device=states.device).repeat(branches)
        owner = torch.arange(branches * tokens, device=states.device)
        owner = owner[:, None].expand(-1, window).flatten()
        rows = seen.flatten().index_select(0, state).nonzero().flatten()
        own = state.index_select(0, rows)
        at = steps.flatten().index_select(0, own) * (branches * tokens)
        at = at + owner.index_select(0, rows)
        out = self._head(embedding(own, states.flatten(0, 1)), at, conditions, schedule)
        blank = torch.zeros(branches * tokens * window, 2 * channels, device=states.device)
        return blank.index_put((rows,), out).unflatten(0, (branches, tokens, window))

    def _head(self, x: Tensor, at: Tensor, conditions: Tensor, schedule: Tensor) -> Tensor:
        """Outputs of the head for rows `x`, modulated as row `at` of the flattened tables says."""
        head = self.diffloss.net
        tables = [t.flatten(0, 1) for t in modulations(head, conditions, schedule)]
        hidden = head.input_proj(x)
        for block in head.blocks:
            shift, scale, gate = (embedding(at, table) for table in tables[:3])
            tables = tables[3:]
            hidden = hidden + gate * block.mlp(block.in_ln(hidden) * scale + shift)
        shift, scale = (embedding(at, table) for table in tables)
        return head.final_layer.linear(head.final_layer.norm_final(hidden) * scale + shift)


def _guided(out: Tensor, states: Tensor, guidance: Tensor, columns: tuple[Tensor, ...]) -> Kernel:
    """`graphs.guided_kernel` on outputs [G, N, L, 2C], with columns that are cut up already."""
    first, last, channels = out[0], out[-1], states.shape[-1]
    one = torch.ones_like(guidance)
    weight = torch.stack([guidance] * channels + [one] * channels, dim=-1)[:, None]
    eps, variance = (last + weight * (first - last)).chunk(2, dim=-1)
    x0_from_x, x0_from_noise, mean_x0, mean_x, low, freedom = columns
    x0 = x0_from_x * states - x0_from_noise * eps
    fraction = (variance + 1) / 2
    return Kernel(mean_x0 * x0 + mean_x * states, low + fraction * freedom, x0, fraction)
