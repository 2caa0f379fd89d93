"""A round of speculative denoising as one graph: draft, verify, accept and resample in one call.

The arithmetic is that of the runtime's reference, operation by operation, so that both agree to the
bit in PyTorch. It is arranged for few operations: on a CPU a small head costs what its calls and
its operations cost, not its products. No loop and no branch, so that any engine can take it; the
rare search of the residual law that no candidate ends is left to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from cspd.engines.schedule import COLUMNS
from cspd.engines.spec import Axis, GraphSpec, TensorSpec
from cspd.export.graphs import GRAPH_TOLERANCE, MAX_STEPS, denoise_rows
from cspd.export.mar import DiffusionLoss
from cspd.export.presets import MarConfig

CANDIDATES = 16
MAX_WINDOW = 32
FLOATS = (
    "next_x", "next_x0", "next_fraction", "mean", "log_std", "sum_log_std",
    "drafted_mean", "drafted_log_std",
)  # fmt: skip
INTEGERS = ("next_step", "accepted", "draws")


class SpeculativeRoundGraph(nn.Module):
    """Advances tokens, each at its own step, by up to a window of steps; see `round_spec`."""

    def __init__(self, diffloss: DiffusionLoss) -> None:
        super().__init__()
        # Held directly, so that parameters have the names of the weight file.
        self.diffloss = diffloss

    def forward(
        self, x: Tensor, step: Tensor, x0: Tensor, fraction: Tensor,
        conditions: Tensor, guidance: Tensor, temperature: Tensor,
        noise: Tensor, log_accept: Tensor, candidates: Tensor, log_keep: Tensor,
        schedule: Tensor, draft_state: Tensor, draft_noise: Tensor,
        row: Tensor, row_token: Tensor, slot: Tensor, length: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The outputs of `round_spec`, in its order."""
        tokens, window = slot.shape
        # Draft.
        offset = torch.arange(window, dtype=torch.int32, device=x.device)
        steps = (step[:, None] - offset).clamp(min=0)
        *_, mean_x0, mean_x, low, high = embedding(steps, schedule).split(1, dim=-1)
        wide = fraction[:, None]
        drafted_log_std = wide * high + (1 - wide) * low
        std = temperature[:, None, None] * drafted_log_std.exp()
        token = torch.arange(tokens, dtype=torch.int32, device=x.device)
        xi = embedding(token[:, None] * schedule.shape[0] + steps, noise.flatten(0, 1))
        start, ends = steps[:, 0], torch.stack([x, x0], dim=1)
        moved = embedding(start, draft_state.flatten(1)).unflatten(1, (window, 2)) @ ends
        added = embedding(start, draft_noise.flatten(1)).unflatten(1, (window, window)) @ (std * xi)
        reached = moved + added
        states = torch.cat([x[:, None], reached[:, :-1]], dim=1)
        drafted_mean = mean_x0 * x0[:, None] + mean_x * states
        # Verify.
        seen = denoise_rows(
            self.diffloss.net,
            embedding(row, states.flatten(0, 1)),
            steps.flatten().index_select(0, row),
            row_token,
            conditions,
            guidance.index_select(0, row_token),
            schedule,
        )
        target = embedding(slot, torch.cat(seen, dim=-1))
        mean, log_std, _, _ = target.chunk(4, dim=-1)
        # Accept.
        score = (reached - mean) / (temperature[:, None, None] * log_std.exp())
        exponent = 0.5 * (xi * xi - score * score)
        ratio = (exponent + (drafted_log_std - log_std)).sum(-1)
        noisy = steps > 0
        passed = (log_accept < ratio) & (offset < length[:, None] - 1) & noisy
        last = torch.where(passed, window, offset).amin(1)
        committed = (offset <= last[:, None]) & noisy
        sum_log_std = (log_std * committed[..., None]).sum(1)
        # The row where the round ends: draw from its kernel, or from the residual law.
        ends_at = token * window + last
        everything = torch.cat([target, drafted_mean, drafted_log_std, xi], dim=-1)
        at = embedding(ends_at, everything.flatten(0, 1)).chunk(7, dim=-1)
        mean, log_std, x0, fraction, drafted_mean, drafted_log_std, xi = at
        std = temperature[:, None] * log_std.exp()
        values = mean[:, None] + std[:, None] * candidates
        kept = ~(log_keep <= self._residual_ratio(values, candidates, temperature, at))
        order = torch.arange(candidates.shape[1], dtype=torch.int32, device=x.device)
        index = torch.where(kept, order, candidates.shape[1]).amin(1)
        chosen = token * candidates.shape[1] + index.clamp(max=candidates.shape[1] - 1)
        repaired = embedding(chosen, values.flatten(0, 1))
        step_at_end = step - last
        rejected = (last < length - 1) & (step_at_end > 0)
        x = torch.where(rejected[:, None], repaired, mean + std * xi)
        return (
            x, x0, fraction, mean, log_std, sum_log_std, drafted_mean, drafted_log_std,
            (step_at_end - 1).clamp(min=-1).int(), last.int(),
            torch.where(rejected, index + 1, 0).int(),
        )  # fmt: skip

    @staticmethod
    def _residual_ratio(
        values: Tensor, noise: Tensor, temperature: Tensor, at: tuple[Tensor, ...]
    ) -> Tensor:
        """Log density of the draft over that of the target at target draws `values` [N, K, C]."""
        _, log_std, _, _, drafted_mean, drafted_log_std, _ = (value[:, None] for value in at)
        score = (values - drafted_mean) / (temperature[:, None, None] * drafted_log_std.exp())
        exponent = 0.5 * (noise * noise - score * score)
        return (exponent + (log_std - drafted_log_std)).sum(-1)


def round_spec(config: MarConfig, max_rows: int) -> GraphSpec:
    """Contract of one round for N tokens, L drafted steps and R evaluated rows.

    Per token: the state (`x`, `step`, the frozen `x0` and `fraction`), its conditions, the noise of
    its chain by step (zero at step 0), the logarithms of uniform numbers for its tests and for the
    candidates of the residual law, and `length`, the number of its rows.
    `row` [R] names the evaluated rows among the N * L drafted states, `slot` [N, L] the way back.

    Out: the advanced state `next_*`; `mean` and `log_std` of the target at the last committed step,
    `sum_log_std` over the committed steps but step 0; `accepted` drafts; `draws` of the residual
    law (0: not needed; more than the candidates: none was kept, and the host goes on from the
    drafted kernel that `drafted_mean` and `drafted_log_std` describe).
    """
    channels, dim, per_token = config.token_dim, config.embed_dim, ("tokens",)
    state = ("tokens", channels)
    inputs = {
        "x": state, "step": per_token, "x0": state, "fraction": state,
        "conditions": ("branches", "tokens", dim), "guidance": per_token, "temperature": per_token,
        "noise": ("tokens", "steps", channels), "log_accept": ("tokens", "window"),
        "candidates": ("tokens", CANDIDATES, channels), "log_keep": ("tokens", CANDIDATES),
        "schedule": ("steps", len(COLUMNS)), "draft_state": ("steps", "window", 2),
        "draft_noise": ("steps", "window", "window"),
        "row": ("rows",), "row_token": ("rows",), "slot": ("tokens", "window"), "length": per_token,
    }  # fmt: skip
    indices = {
        "step": "steps", "row": "tokens", "row_token": "tokens", "slot": "rows", "length": "window",
    }  # fmt: skip
    return GraphSpec(
        name="speculative_round",
        inputs=tuple(_input(name, shape, indices) for name, shape in inputs.items()),
        outputs=(
            *(TensorSpec(name=name, shape=state, tolerance=GRAPH_TOLERANCE) for name in FLOATS),
            *(TensorSpec(name=n, dtype="int32", shape=per_token) for n in INTEGERS),
        ),
        axes={
            "tokens": Axis(min=1, opt=min(8, max_rows), max=max_rows),
            "rows": Axis(min=1, opt=min(64, max_rows), max=max_rows),
            "steps": Axis(min=2, opt=100, max=MAX_STEPS),
            "window": Axis(min=1, opt=8, max=MAX_WINDOW),
            "branches": Axis(min=1, opt=2, max=2),
        },
    )


def _input(name: str, shape: tuple[int | str, ...], indices: dict[str, str]) -> TensorSpec:
    """Spec of an input, an index tensor if it is among `indices`."""
    dtype = "int32" if name in indices else "float32"
    return TensorSpec(name=name, dtype=dtype, shape=shape, below=indices.get(name))
