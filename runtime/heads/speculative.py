"""Speculative denoising inside the diffusion head: fewer sequential calls, exact samples.

The newest evaluation of the head, frozen, drafts the next steps of the chain without any network;
one call verifies them all; each step is coupled maximally with the target's own. Every step is
tested at most once, so that one normal and one uniform number per (token, step) serve the whole
chain: the numbers of drafted steps that were never tested are still unused and independent.
`speculative_loop` does the same in one call where a backend can loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cspd.engines.schedule import Schedule
from cspd.engines.sessions.session import Session
from cspd.runtime.heads.base import Rows, part_of
from cspd.runtime.heads.drafts import DraftTables, depths_of, rows_of
from cspd.runtime.heads.numbers import ChainNumbers, MakeNumbers
from cspd.runtime.heads.round_check import Counts, check_progress
from cspd.runtime.heads.speculation import SpeculationOptions, SpeculativeSample, StepLog
from cspd.runtime.noise import Noise, Purpose

POOL = 32  # candidates of a token that are drawn at once; a refusal takes two or three
STATE_INPUTS = (
    "x", "step", "x0", "fraction", "guidance", "temperature", "noise", "log_accept",
)  # fmt: skip
COUNTS = ("next_step", "moved", "drawn")
ADVANCED = ("x", "step", "x0", "fraction")
RESULTS = ("sample", "mean", "log_std", "sum_log_std")
TOKENS_SECOND = ("conditions", "noise", "log_accept")  # their second axis is that of the tokens

State = dict[str, Tensor]


class Round(Protocol):
    """`speculative_round`: an exported graph, or what stands in for it in tests."""

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Advance all tokens by one round."""
        ...


class SpeculativeHead:
    """Samples tokens in rounds of `round_session`, in place of stepping through the chain.

    `modulate`, where given, is a session of `head_modulation`: it computes the modulations of a
    chunk once, and `round_session` is one of `speculative_round_hoisted`.
    """

    def __init__(
        self, round_session: Round, options: SpeculationOptions, channels: int,
        numbers: MakeNumbers = ChainNumbers, modulate: Session | None = None,
    ) -> None:  # fmt: skip
        self.session, self.options, self.channels = round_session, options, channels
        self.numbers, self.modulate = numbers, modulate
        self._drafts = DraftTables(options.window)

    @torch.inference_mode()
    def __call__(
        self, rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose = Purpose.DENOISE
    ) -> SpeculativeSample:
        """Sample every token of `rows`, in chunks that fit the largest row bucket."""
        depth = depths_of(self.options.window, schedule.num_steps)
        chain = Chain(schedule, self.numbers(noise, purpose), depth, self._drafts(schedule))
        limit = self.options.max_tokens or len(rows.images)
        starts = range(0, len(rows.images), limit)
        chunks = [_Run(self, chain).sample(part_of(rows, i, i + limit)) for i in starts]
        return join(chunks)


def join(chunks: list[SpeculativeSample]) -> SpeculativeSample:
    """The tokens of all `chunks` and their summed costs."""
    tensors = {name: torch.cat([getattr(c, name) for c in chunks]) for name in RESULTS}
    return SpeculativeSample(**tensors, stats=reduce(add, (chunk.stats for chunk in chunks)))


@dataclass(frozen=True)
class Chain:
    """A denoising chain: schedule, random numbers, rows per step, draft tables."""

    schedule: Schedule
    numbers: ChainNumbers
    depth: np.ndarray
    drafts: dict[str, Tensor]


class _Run:
    """The sampling of tokens that share their calls, from the first step to the last."""

    def __init__(self, head: SpeculativeHead, chain: Chain) -> None:
        self.session, self.options, self.channels = head.session, head.options, head.channels
        self.modulate = head.modulate
        self.chain, self.device = chain, chain.numbers.noise.device
        self.table = chain.schedule.table.to(self.device)
        self.drafts = chain.drafts
        self.cut: dict[int, dict[str, Tensor]] = {}
        self.drawn = 0  # candidates per token so far
        self.modulation: Tensor | None = None

    def sample(self, tokens: Rows) -> SpeculativeSample:
        log = StepLog(len(tokens.images), self.chain.schedule.num_steps)
        state = self._hoist(self._start(tokens))
        results = {name: torch.empty_like(state["x"][: log.tokens]) for name in RESULTS}
        missing = log.tokens
        step, used = (state[name].numpy(force=True) for name in ("step", "used"))
        while missing:
            state, rows = self._supply(state, int(used.max())), self._rows(step)
            out = self._round(state, rows)
            state = _advance(state, out)
            # The only transfer to the host in a round.
            after, moved, drawn = torch.stack([out[name] for name in COUNTS]).numpy(force=True)
            used = used + drawn
            counts = Counts(step, after, moved, drawn, used)
            check_progress(counts, self.options.candidates, log.num_steps)
            log.add(step, moved, drawn, len(rows["row"]))
            finished = np.flatnonzero((after < 0) & (step >= 0))
            step = after
            if finished.size:
                missing -= finished.size
                _collect(results, state, out, torch.from_numpy(finished).to(self.device))
                if missing:
                    live = np.flatnonzero(step >= 0)
                    state = _compact(state, live, self.options.padded_tokens(missing))
                    step, used = (state[name].numpy(force=True) for name in ("step", "used"))
        return SpeculativeSample(**results, stats=log.stats())

    def _start(self, tokens: Rows) -> State:
        """State of all tokens before the first step."""
        images, positions, count = tokens.images, tokens.positions, len(tokens.images)
        num_steps, numbers = self.chain.schedule.num_steps, self.chain.numbers
        x, noise = numbers.chain(images, positions, num_steps, self.channels)
        zero, none = torch.zeros_like(x), x.new_empty(count, 0, self.channels)
        state = {
            "x": x, "step": torch.full_like(images, num_steps - 1, dtype=torch.int32),
            # Before the first evaluation the draft predicts the centre of the data.
            "x0": zero, "fraction": zero + 0.5, "sum_log_std": zero,
            "conditions": tokens.conditions, "guidance": tokens.guidance,
            "temperature": tokens.temperature, "noise": noise,
            "log_accept": numbers.tests(images, positions, num_steps),
            "candidates": none, "choices": none[..., :3],
            "used": torch.zeros_like(images, dtype=torch.int32),
            "images": images, "positions": positions,
            "index": torch.arange(count, device=self.device),
        }  # fmt: skip
        return _compact(state, np.arange(count), self.options.padded_tokens(count))

    def _hoist(self, state: State) -> State:
        """`state` without conditions if the modulations that follow from them are computed now.

        A token's number in `state` is then its row of the table, which is never cut.
        """
        if self.modulate is None:
            return state
        conditions = state["conditions"]
        outputs = self.modulate(conditions=conditions, schedule=self.table)
        self.modulation = outputs["modulation"]
        return {name: value for name, value in state.items() if name != "conditions"}

    def _condition(self, state: State) -> dict[str, Tensor]:
        """What the tokens of a round are conditioned on."""
        if self.modulation is None:
            return {"conditions": state["conditions"]}
        return {"modulation": self.modulation, "origin": state["index"].int()}

    def _supply(self, state: State, used: int) -> State:
        """`state` with enough candidates for a round of tokens that have used up to `used`."""
        if used + self.options.candidates <= self.drawn:
            return state
        count = max(POOL, self.options.candidates)
        more = self.chain.numbers.candidates(
            state["images"], state["positions"], self.drawn, count, self.channels
        )
        self.drawn += count
        named = zip(("candidates", "choices"), more, strict=True)
        return state | {name: torch.cat([state[name], new], dim=1) for name, new in named}

    def _rows(self, step: np.ndarray) -> dict[str, Tensor]:
        """Rows of the next round; the window shrinks with the chain unless shapes are fixed."""
        length = np.where(step < 0, 0, self.chain.depth[step])
        window = self.options.window if self.options.row_buckets else int(length.max())
        rows = rows_of(length, window, self.options.padded_rows(int(length.sum())))
        return {name: value.to(self.device) for name, value in rows.items()}

    def _round(self, state: State, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of one round."""
        count, token = self.options.candidates, torch.arange(len(state["x"]), device=self.device)
        taken = token[:, None] * self.drawn + state["used"][:, None]
        taken = (taken + torch.arange(count, device=self.device)).flatten()
        supply = {
            name: state[name].flatten(0, 1).index_select(0, taken).unflatten(0, (-1, count))
            for name in ("candidates", "choices")
        }
        return self.session(
            **{name: state[name] for name in STATE_INPUTS},
            **self._condition(state),
            **supply,
            schedule=self.table,
            **self._drafts(rows["slot"].shape[1]),
            **rows,
        )

    def _drafts(self, window: int) -> dict[str, Tensor]:
        """The draft tables of a window that may be shorter than the longest."""
        if window not in self.cut:
            state, noise = self.drafts["draft_state"], self.drafts["draft_noise"]
            self.cut[window] = {
                "draft_state": state[:, :, :window].contiguous(),
                "draft_noise": noise[:, :, :window, :window].contiguous(),
            }
        return self.cut[window]


def _advance(state: State, out: dict[str, Tensor]) -> State:
    """`state` after a round. Clones: a session may overwrite its outputs in the next call."""
    state = state | {name: out[f"next_{name}"].clone() for name in ADVANCED}
    state["sum_log_std"] = state["sum_log_std"] + out["sum_log_std"]
    state["used"] = state["used"] + out["drawn"]
    return state


def _collect(
    results: dict[str, Tensor], state: State, out: dict[str, Tensor], finished: Tensor
) -> None:
    """Store the tokens that have just `finished` in `results`."""
    rows = state["index"][finished]
    values = (state["x"], out["mean"], out["log_std"], state["sum_log_std"])
    for name, value in zip(RESULTS, values, strict=True):
        results[name][rows] = value[finished]


def _compact(state: State, live: np.ndarray, size: int) -> State:
    """`state` with `size` tokens: the `live` ones, then padding that counts as finished."""
    rows = torch.from_numpy(live[np.arange(size).clip(max=len(live) - 1)])
    rows = rows.to(state["index"].device)
    packed = {
        name: value.index_select(1 if name in TOKENS_SECOND else 0, rows)
        for name, value in state.items()
    }
    packed["step"][len(live) :] = -1
    return packed
