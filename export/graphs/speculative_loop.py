"""The speculative denoising loop of some tokens: the reference, and the contract.

`while_loop` makes one ONNX graph of it, an ONNX Loop over `SpeculativeStep`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cspd.engines.schedule import COLUMNS
from cspd.engines.spec import Axis, GraphSpec, TensorSpec
from cspd.export.graphs.denoiser import GRAPH_TOLERANCE, MAX_STEPS
from cspd.export.graphs.denoiser_loop import modulation_width
from cspd.export.graphs.round import CANDIDATES
from cspd.export.graphs.speculative_round import FLOATS, MAX_WINDOW, SpeculativeRoundGraph
from cspd.export.graphs.speculative_step import SpeculativeStep
from cspd.export.mar.model import DiffusionLoss
from cspd.export.mar.presets import MarConfig

MAX_POOL = 4096


class SpeculativeLoopGraph(nn.Module):
    """Rounds until every token is done, or its candidates are.

    Called, it runs one `round` after another, each as a graph of its own. Exported, it is an ONNX
    Loop over `step`, which has the modulations of the head computed ahead of all rounds.
    """

    def __init__(self, diffloss: DiffusionLoss) -> None:
        super().__init__()
        self.round, self.step = SpeculativeRoundGraph(diffloss), SpeculativeStep(diffloss)

    def forward(
        self, x: Tensor, step: Tensor, x0: Tensor, fraction: Tensor,
        conditions: Tensor, guidance: Tensor, temperature: Tensor,
        noise: Tensor, log_accept: Tensor, candidates: Tensor, choices: Tensor,
        schedule: Tensor, draft_state: Tensor, draft_noise: Tensor, last_row: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The outputs of `speculative_loop_spec`, in its order."""
        tokens, pool = candidates.shape[:2]
        mean = log_std = sum_log_std = torch.zeros_like(x)
        used = torch.zeros_like(step)
        moved = drawn = torch.zeros_like(step[:, None].expand(-1, pool))
        token = torch.arange(tokens, device=x.device)[:, None]
        for number in range(pool):
            active = (step >= 0) & (used <= pool - CANDIDATES)
            if not active.any():
                break
            taken = used[:, None] + torch.arange(CANDIDATES, device=x.device)
            taken = taken.clamp(max=pool - 1)
            out = self.round(
                x, step, x0, fraction, conditions, guidance, temperature, noise, log_accept,
                candidates[token, taken], choices[token, taken], schedule, draft_state,
                draft_noise, *_rows(last_row[step.clamp(min=0).long()] + 1, draft_noise.shape[-1]),
            )  # fmt: skip
            next_x, next_x0, next_fraction, new_mean, new_log_std, total, after, steps, draws = out
            done = active & (steps > 0)
            wide = done[:, None]
            x, x0, fraction, mean, log_std = (
                torch.where(wide, new, old)
                for new, old in (
                    (next_x, x), (next_x0, x0), (next_fraction, fraction), (new_mean, mean),
                    (new_log_std, log_std),
                )
            )  # fmt: skip
            sum_log_std = sum_log_std + wide * total
            step, used = torch.where(done, after, step), used + active * draws
            here = torch.arange(pool, device=x.device) == number
            moved = moved + here * torch.where(done, steps, 0)[:, None]
            drawn = drawn + here * torch.where(active, draws, 0)[:, None]
        integers = (step, moved, drawn)
        return x, x0, fraction, mean, log_std, sum_log_std, *(value.int() for value in integers)


def _rows(length: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`row`, `row_token`, `slot` and `length` of `round_spec` for `length` [N] rows a token."""
    seen = torch.arange(window, device=length.device) < length[:, None]
    row = seen.flatten().nonzero().flatten()
    slot = (seen.flatten().cumsum(0) - 1).clamp(min=0).unflatten(0, seen.shape)
    return row.int(), (row // window).int(), slot.int(), length.int()


def speculative_loop_spec(config: MarConfig, max_rows: int) -> GraphSpec:
    """Contract of the speculative loop for N tokens, windows of L rows and P candidates a token.

    In: as for `round_spec`, but all candidates that a token may take, and `last_row` [S], the last
    row of the window that is evaluated at each step. A token at step -1 is finished.

    Out: the advanced state, finished at step -1; if a token is not, its candidates have come to an
    end, and the loop continues from there with new ones. `mean` and `log_std` of the target at the
    last step, `sum_log_std` over the steps taken but step 0; by round, up to P of them, the steps
    that it `moved` and the candidates `drawn`.
    """
    channels, dim, per_token = config.token_dim, config.embed_dim, ("tokens",)
    state, log = ("tokens", channels), ("tokens", "pool")
    inputs = {
        "x": state, "step": per_token, "x0": state, "fraction": state,
        "conditions": ("branches", "tokens", dim), "guidance": per_token, "temperature": per_token,
        "noise": ("steps", "tokens", channels), "log_accept": ("steps", "tokens"),
        "candidates": ("tokens", "pool", channels), "choices": ("tokens", "pool", 3),
        "schedule": ("steps", len(COLUMNS)), "draft_state": ("steps", 2, "window", 2),
        "draft_noise": ("steps", 2, "window", "window"), "last_row": ("steps",),
    }  # fmt: skip
    integers = {"next_step": per_token, "moved": log, "drawn": log}
    return GraphSpec(
        name="speculative_loop",
        inputs=tuple(_input(name, shape) for name, shape in inputs.items()),
        outputs=(
            *(TensorSpec(name=name, shape=state, tolerance=GRAPH_TOLERANCE) for name in FLOATS),
            *(TensorSpec(name=n, dtype="int32", shape=s) for n, s in integers.items()),
        ),
        axes={
            "tokens": Axis(min=1, opt=min(8, max_rows), max=max_rows),
            "steps": Axis(min=2, opt=100, max=MAX_STEPS),
            "window": Axis(min=1, opt=16, max=MAX_WINDOW),
            "pool": Axis(min=CANDIDATES, opt=64, max=MAX_POOL),
            "branches": Axis(min=1, opt=2, max=2),
        },
        capturable=False,
        engines=False,
        independent="tokens",
        scratch=modulation_width(config),
    )


def _input(name: str, shape: tuple[int | str, ...]) -> TensorSpec:
    """Spec of an input, an index tensor if it counts something."""
    below = {"step": "steps", "last_row": "window"}.get(name)
    return TensorSpec(name=name, dtype="int32" if below else "float32", shape=shape, below=below)
