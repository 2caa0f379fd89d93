"""The state of a batch of images under construction: tokens, their order, how many are known."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

ACCEPTED, REJECTED = 1, 2


@dataclass(frozen=True)
class Batch:
    """Images that are generated together: `images` and `labels` [B] int64.

    `null_label` means no class. Only the first `count` samples are wanted, the rest is padding.
    """

    images: Tensor
    labels: Tensor
    null_label: int
    count: int

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Span:
    """Tokens `start[b]` to `stop[b]` of each sample in its generation order (host lists, [B]).

    `positions` [B, P] int32 and `valid` [B, P] bool; where a sample has fewer than P tokens, its
    padding repeats some position and is not valid.
    """

    start: list[int]
    stop: list[int]
    positions: Tensor
    valid: Tensor

    @property
    def width(self) -> int:
        """Padded number of tokens P."""
        return self.positions.shape[1]


@dataclass
class Canvas:
    """Tokens [B, L, C] and the order in which they appear.

    `sequence` [B, L] int32 lists token positions, first generated first; the first `known[b]` of
    them are known. The object owns `tokens` and writes to it in place. `fates` [B, L] int8 says
    what became of the token drafted for each position: ACCEPTED, REJECTED, or 0 for none.
    """

    tokens: Tensor
    sequence: Tensor
    known: list[int]
    fates: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.fates = torch.zeros(self.sequence.shape, dtype=torch.int8, device=self.sequence.device)

    @classmethod
    def empty(cls, sequence: Tensor, channels: int) -> Canvas:
        """Nothing known yet; tokens of `channels` numbers appear in the order of `sequence`."""
        tokens = torch.zeros(*sequence.shape, channels, device=sequence.device)
        return cls(tokens, sequence, [0] * len(sequence))

    def clone(self) -> Canvas:
        """A copy with tokens of its own."""
        return Canvas(self.tokens.clone(), self.sequence, list(self.known))

    @property
    def done(self) -> bool:
        """Whether every token of every sample is known."""
        return min(self.known) == self.sequence.shape[1]

    def span(self, start: list[int], stop: list[int], width: int | None = None) -> Span:
        """The tokens `start` to `stop` of each sample, padded to `width` or to the longest."""
        longest = max(b - a for a, b in zip(start, stop, strict=True))
        offsets = torch.arange(width or longest)
        first, last = torch.tensor(start)[:, None], torch.tensor(stop)[:, None]
        index = first + offsets
        valid = (index < last).to(self.sequence.device)
        index = index.clamp(max=self.sequence.shape[1] - 1).to(self.sequence.device)
        return Span(start, stop, self.sequence.gather(1, index), valid)

    def place(self, span: Span, values: Tensor) -> None:
        """Write `values` [B, P, C] to the valid tokens of `span`; does not change `known`."""
        rows, columns = span.valid.nonzero(as_tuple=True)
        self.tokens[rows, span.positions[rows, columns].long()] = values[rows, columns]

    def judge(self, span: Span, accepted: Tensor, rejected: Tensor) -> None:
        """Note the fate of the drafted tokens of `span`, both masks [B, P]."""
        for mask, fate in ((accepted, ACCEPTED), (rejected, REJECTED)):
            rows, columns = mask.nonzero(as_tuple=True)
            self.fates[rows, span.positions[rows, columns].long()] = fate
