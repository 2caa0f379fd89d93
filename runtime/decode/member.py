"""One member of the pair: its transformer and its diffusion head behind two plain calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cspd.engines.sessions.session import Session
from cspd.runtime.decode.canvas import Batch, Canvas, Span
from cspd.runtime.heads.base import Head


class Model(Protocol):
    """One model of the pair, of any family: conditions of tokens, and a head that samples them.

    What it keeps from call to call, such as keys and values, may not change what it returns:
    decoding goes back to fewer known tokens where drafts are rejected.
    """

    @property
    def name(self) -> str:
        """The model's role, "target" or "draft"."""
        ...

    @property
    def head(self) -> Head:
        """How tokens are sampled from their conditions."""
        ...

    def conditions(
        self, canvas: Canvas, batch: Batch, span: Span, *, guided: bool, visible: list[int],
        width: int,
    ) -> Tensor:  # fmt: skip
        """Conditions [G, B, P, D] of the tokens in `span`, given the first `visible[b]` tokens."""
        ...


@dataclass(frozen=True)
class Member:
    """Draft or target of MAR: conditions from the masked transformer, tokens from the head."""

    name: str
    backbone: Session
    head: Head

    def conditions(
        self,
        canvas: Canvas,
        batch: Batch,
        span: Span,
        *,
        guided: bool,
        visible: list[int],
        width: int,
    ) -> Tensor:
        """Conditions [G, B, P, D] of the tokens in `span`, given the first `visible[b]` tokens.

        `width` is the padded number of visible tokens; the result for a sample depends on the other
        samples of the batch only through it.
        """
        device = canvas.tokens.device
        labels = batch.labels.int()
        branches = [labels, torch.full_like(labels, batch.null_label)] if guided else [labels]
        times = len(branches)
        z = self._run(
            tokens=canvas.tokens.repeat(times, 1, 1),
            visible=canvas.sequence[:, :width].repeat(times, 1),
            visible_len=torch.tensor(visible * times, dtype=torch.int32, device=device),
            labels=torch.cat(branches),
            positions=span.positions.repeat(times, 1),
        )
        return z.reshape(times, len(labels), *z.shape[1:])

    def _run(self, **inputs: Tensor) -> Tensor:
        """Call the transformer in pieces that its session takes."""
        limit = self.backbone.spec.axes["batch"].max
        if len(inputs["tokens"]) <= limit:
            return self.backbone(**inputs)["z"]
        starts = range(0, len(inputs["tokens"]), limit)
        pieces = ({name: t[i : i + limit] for name, t in inputs.items()} for i in starts)
        return torch.cat([self.backbone(**piece)["z"].clone() for piece in pieces])
