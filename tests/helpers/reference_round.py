"""One round of speculative denoising, written apart from the product: what it is compared with.

`ReferenceRound` has the contract of the exported graph `speculative_round` and takes its place: N
tokens, each at its own step, advance by one to `length` steps with one call of the denoiser.
"""

from __future__ import annotations

from dataclasses import dataclass

import coupling
import torch
from coupling import Gaussian, pick
from torch import Tensor
from torch.nn.functional import embedding

from cspd.engines.sessions.session import Session


@dataclass(frozen=True)
class Window:
    """Drafted states of N tokens over L steps, before the target has seen them.

    `steps` [N, L] int32, clamped at 0 where the chain has ended; `states` [N, L, C], the inputs of
    the steps, and `reached` [N, L, C], what they lead to; `noise` [N, L, C]; `kernel` [N, L, C],
    the distribution that `reached` was drafted from.
    """

    steps: Tensor
    states: Tensor
    reached: Tensor
    noise: Tensor
    kernel: Gaussian


def draft(
    x: Tensor, step: Tensor, x0: Tensor, fraction: Tensor, temperature: Tensor, noise: Tensor,
    schedule: Tensor, draft_state: Tensor, draft_noise: Tensor,
) -> Window:  # fmt: skip
    """States of the next L steps if every step predicted the frozen `x0` and `fraction` [N, C].

    `x` [N, C] at `step` [N] int32; `noise` [S, N, C] by step; the last two are `draft_tables`.
    """
    offset = torch.arange(draft_noise.shape[-1], dtype=torch.int32, device=x.device)
    steps = (step[:, None] - offset).clamp(min=0)
    *_, low, high = embedding(steps, schedule).split(1, dim=-1)
    log_std = low + fraction[:, None] * (high - low)
    std = temperature[:, None, None] * log_std.exp()
    token = torch.arange(len(x), dtype=torch.int32, device=x.device)
    xi = embedding(steps * len(x) + token[:, None], noise.flatten(0, 1))
    start, added = steps[:, 0], std * xi
    ends = torch.stack([x, x0], dim=1)[:, None]
    maps = draft_state[start] @ ends + draft_noise[start] @ added[:, None]
    states, mean = maps.unbind(1)
    return Window(steps, states, mean + added, xi, Gaussian(mean, log_std, std))


class ReferenceRound:
    """The round as a session: what `speculative_round` computes, from a `denoiser` session."""

    def __init__(self, denoiser: Session) -> None:
        self.denoiser = denoiser

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Advance N tokens; inputs and outputs are those of `speculative_round_spec`."""
        t = tensors
        window = draft(
            t["x"], t["step"], t["x0"], t["fraction"], t["temperature"], t["noise"],
            t["schedule"], t["draft_state"], t["draft_noise"],
        )  # fmt: skip
        rows = self.verify(window, t)
        mean, log_std = (embedding(t["slot"], rows[name]) for name in ("mean", "log_std"))
        target = Gaussian.kernel(mean, log_std, t["temperature"][:, None])
        last = self.accept(window, target, t)
        at = Gaussian(*(pick(v, last) for v in vars(target).values()))
        drafted = Gaussian(*(pick(v, last) for v in vars(window.kernel).values()))
        # The last row of a window was never drafted: its kernel is known, so draw from it.
        drawn = at.at(pick(window.noise, last))
        rejected = (last < t["length"] - 1) & (pick(window.steps, last) > 0)
        repaired, index = self.repair(at, drafted, drawn, t)
        newest = pick(t["slot"], last)
        # Without a candidate that was kept nothing moves: the round is done again with the next.
        count = t["candidates"].shape[1]
        done = ~rejected | (index < count)
        wide = done[:, None]
        return {
            "next_x": torch.where(wide, torch.where(rejected[:, None], repaired, drawn), t["x"]),
            "next_step": torch.where(done, t["step"] - last - 1, t["step"]).clamp(min=-1).int(),
            "next_x0": torch.where(wide, rows["x0"].index_select(0, newest), t["x0"]),
            "next_fraction": torch.where(
                wide, rows["fraction"].index_select(0, newest), t["fraction"]
            ),
            "mean": at.mean,
            "log_std": at.log_std,
            "sum_log_std": wide * committed_log_std(window.steps, target.log_std, last),
            "moved": torch.where(done, last + 1, 0).int(),
            "drawn": torch.where(rejected, (index + 1).clamp(max=count), 0).int(),
        }

    def verify(self, window: Window, t: dict[str, Tensor]) -> dict[str, Tensor]:
        """The target's view of the drafted states, by row: one call of the denoiser."""
        return self.denoiser(
            x=window.states.flatten(0, 1).index_select(0, t["row"]),
            step=window.steps.flatten().index_select(0, t["row"]),
            token=t["row_token"],
            conditions=t["conditions"],
            guidance=t["guidance"].index_select(0, t["row_token"]),
            schedule=t["schedule"],
        )

    def accept(self, window: Window, target: Gaussian, t: dict[str, Tensor]) -> Tensor:
        """Row at which each token's round ends, [N] int64: the drafts of all rows before passed."""
        row = torch.arange(window.steps.shape[1], device=window.steps.device)
        # Step 0 adds no noise: a Dirac, which no draft can meet.
        tested = (row < t["length"][:, None] - 1) & (window.steps > 0)
        passed = self.test(window, target, t) & tested
        return passed.long().cumprod(1).sum(1)

    def test(self, window: Window, target: Gaussian, t: dict[str, Tensor]) -> Tensor:
        """Which drafts pass, bool [N, L]: the exact rule."""
        ratio = coupling.log_ratio(target, window.kernel, window.reached, window.noise)
        return coupling.accept(log_accept(window, t), ratio)

    def repair(
        self, target: Gaussian, drafted: Gaussian, drawn: Tensor, t: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Replacement [N, C] for refused drafts, and the index of the candidate that it is."""
        return coupling.residual(target, drafted, t["candidates"], t["choices"])


def log_accept(window: Window, t: dict[str, Tensor]) -> Tensor:
    """The logarithms of the uniform numbers that belong to the steps of a window: [N, L]."""
    token = torch.arange(len(window.steps), device=window.steps.device)[:, None]
    return t["log_accept"][window.steps.long(), token]


def committed_log_std(steps: Tensor, log_std: Tensor, last: Tensor) -> Tensor:
    """Sum of `log_std` [N, L, C] over the steps that a round commits, without step 0: [N, C]."""
    row = torch.arange(steps.shape[1], device=steps.device)
    counts = (row <= last[:, None]) & (steps > 0)
    return (log_std * counts[..., None]).sum(1)
