"""A round of speculative denoising as one graph: draft, verify, accept and resample in one call.

No loop and no branch, so that any engine can take it. A token none of whose candidates is kept, one
refusal in some hundred, stays where it is, and the round is done again with the next ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from cspd.engines.schedule import COLUMNS
from cspd.engines.spec import Axis, GraphSpec, TensorSpec
from cspd.export.graphs.denoiser import GRAPH_TOLERANCE, MAX_STEPS, denoise_rows
from cspd.export.graphs.round import CANDIDATES, Chain, Kernel, State, Verify, advance
from cspd.export.mar.model import DiffusionLoss
from cspd.export.mar.presets import MarConfig

MAX_WINDOW = 32
FLOATS = ("next_x", "next_x0", "next_fraction", "mean", "log_std", "sum_log_std")
INTEGERS = ("next_step", "moved", "drawn")
# From states [R, C] and their steps [R]: mean, log_std, x0 and fraction there, each [R, C].
Look = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class SpeculativeRoundGraph(nn.Module):
    """Advances tokens, each at its own step, by up to a window of steps; see `round_spec`."""

    def __init__(self, diffloss: DiffusionLoss) -> None:
        super().__init__()
        # Held directly, so that parameters have the names of the weight file.
        self.diffloss = diffloss

    def forward(
        self, x: Tensor, step: Tensor, x0: Tensor, fraction: Tensor,
        conditions: Tensor, guidance: Tensor, temperature: Tensor,
        noise: Tensor, log_accept: Tensor, candidates: Tensor, choices: Tensor,
        schedule: Tensor, draft_state: Tensor, draft_noise: Tensor,
        row: Tensor, row_token: Tensor, slot: Tensor, length: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The outputs of `round_spec`, in its order."""

        def look(states: Tensor, steps: Tensor) -> tuple[Tensor, ...]:
            weight = guidance.index_select(0, row_token)
            head = self.diffloss.net
            return denoise_rows(head, states, steps, row_token, conditions, weight, schedule)

        chain = Chain(temperature, noise, log_accept, schedule, draft_state, draft_noise)
        start = Start(x, step, x0, fraction)
        return play_round(start, length, chain, candidates, choices, on_rows(look, row, slot))


class Start(NamedTuple):
    """Tokens before a round, as they come in: see `round_spec`."""

    x: Tensor
    step: Tensor
    x0: Tensor
    fraction: Tensor


def on_rows(look: Look, row: Tensor, slot: Tensor) -> Verify:
    """The target's view of all drafted states from `look` at those of the evaluated rows."""

    def verify(states: Tensor, steps: Tensor, columns: tuple[Tensor, ...]) -> Kernel:
        at = steps.flatten().index_select(0, row)
        seen = torch.cat(look(embedding(row, states.flatten(0, 1)), at), dim=-1)
        return Kernel(*embedding(slot, seen).chunk(4, dim=-1))

    return verify


def play_round(
    start: Start, length: Tensor, chain: Chain, candidates: Tensor, choices: Tensor,
    verify: Verify,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The outputs of `round_spec`, in its order; `length` [N] rows are evaluated for a token."""
    x, step, x0, fraction = start
    state = State(x[:, None], step[:, None].clamp(min=0), x0[:, None], fraction[:, None])
    last_row = (length[:, None] - 1).clamp(min=0)
    after = advance(state, last_row, chain, candidates, choices, verify)
    wide = after.done[..., None]
    moved = torch.where(after.done, after.moved, 0)
    return (
        torch.where(wide, after.x, state.x)[:, 0],
        torch.where(wide, after.x0, state.x0)[:, 0],
        torch.where(wide, after.fraction, state.fraction)[:, 0],
        after.mean[:, 0], after.log_std[:, 0], (wide * after.sum_log_std)[:, 0],
        (step[:, None] - moved).clamp(min=-1)[:, 0].int(), moved[:, 0].int(),
        after.drawn[:, 0].int(),
    )  # fmt: skip


def round_spec(config: MarConfig, max_rows: int) -> GraphSpec:
    """Contract of one round for N tokens, L drafted steps and R evaluated rows.

    Per token: the state (`x`, `step`, the frozen `x0` and `fraction`), its conditions; by step, the
    noise of its chain (zero at step 0) and the logarithms of uniform numbers for its tests;
    candidates of the residual distribution; `length`, the number of its rows. `draft_state` and
    `draft_noise` map (x, x0) and the added noise to the drafted states and to their means. `row`
    [R] names the evaluated rows among the N * L drafted states, `slot` [N, L] the way back.

    Out: the advanced state `next_*`; `mean` and `log_std` of the target at the last committed step,
    `sum_log_std` over the committed steps but step 0; `moved`, the committed steps, 0 if no
    candidate was kept and nothing changed; `drawn` candidates, 0 if none was needed.
    """
    channels, dim, per_token = config.token_dim, config.embed_dim, ("tokens",)
    state = ("tokens", channels)
    inputs = {
        "x": state, "step": per_token, "x0": state, "fraction": state,
        "conditions": ("branches", "tokens", dim), "guidance": per_token, "temperature": per_token,
        "noise": ("steps", "tokens", channels), "log_accept": ("steps", "tokens"),
        "candidates": ("tokens", CANDIDATES, channels), "choices": ("tokens", CANDIDATES, 3),
        "schedule": ("steps", len(COLUMNS)), "draft_state": ("steps", 2, "window", 2),
        "draft_noise": ("steps", 2, "window", "window"),
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
