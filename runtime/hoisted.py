"""The head with its modulations computed before the loop, under any way of sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cspd.engines.schedule import Schedule
from cspd.engines.session import Session
from cspd.runtime.lossless import join
from cspd.runtime.member import DEFAULT_MEMORY, Head, HeadSample, Rows
from cspd.runtime.noise import Noise, Purpose
from cspd.runtime.speculation import SpeculativeSample


class TableDenoiser:
    """The `denoiser` contract on top of `denoiser_hoisted` and the modulations of some tokens.

    In place of conditions it takes the tokens' numbers, [1, N, 1] float32: they stay right when
    finished tokens are dropped, and the table need not be copied.
    """

    def __init__(self, session: Session, modulation: Tensor) -> None:
        self.session, self.modulation = session, modulation
        self.spec, self.device = session.spec, session.device

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Look up and denoise the rows."""
        numbers = tensors.pop("conditions")[0, :, 0]
        tensors["token"] = numbers.index_select(0, tensors["token"]).int()
        return self.session(modulation=self.modulation, **tensors)


@dataclass(frozen=True)
class HoistedHead:
    """Samples with `head(denoiser)` in chunks whose modulations fit into `memory` bytes.

    `modulate` and `denoiser` are sessions of `head_modulation` and `denoiser_hoisted`.
    """

    modulate: Session
    denoiser: Session
    head: Callable[[Session], Head]
    memory: int = DEFAULT_MEMORY

    def __call__(
        self, rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose
    ) -> HeadSample:
        """Sample every row."""
        size = self.chunk_size(len(rows.conditions), schedule.num_steps)
        starts = range(0, len(rows.images), size)
        parts = [self._sample(rows, i, i + size, schedule, noise, purpose) for i in starts]
        if len(parts) == 1:
            return parts[0]
        speculative = [part for part in parts if isinstance(part, SpeculativeSample)]
        if speculative:
            return join(speculative)
        names = ("sample", "mean", "log_std", "sum_log_std")
        return HeadSample(**{n: torch.cat([getattr(part, n) for part in parts]) for n in names})

    def chunk_size(self, branches: int, num_steps: int) -> int:
        """Tokens whose modulations fit into the memory, at least one."""
        width = self.modulate.spec.outputs[0].shape[-1]
        assert isinstance(width, int)
        return max(1, self.memory // (4 * num_steps * branches * width))

    def _sample(
        self, rows: Rows, start: int, stop: int, schedule: Schedule, noise: Noise, purpose: Purpose
    ) -> HeadSample:
        part = slice(start, stop)
        conditions = rows.conditions[:, part].contiguous()
        table = schedule.table.to(conditions.device)
        modulation = self.modulate(conditions=conditions, schedule=table)["modulation"]
        numbers = torch.arange(conditions.shape[1], device=table.device).float()[None, :, None]
        per_token = (rows.guidance, rows.temperature, rows.images, rows.positions)
        chunk = Rows(numbers, *(value[part] for value in per_token))
        return self.head(TableDenoiser(self.denoiser, modulation))(chunk, schedule, noise, purpose)
