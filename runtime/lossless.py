"""Speculative denoising inside the diffusion head: fewer sequential calls, the target's exact law.

The newest evaluation of the head, frozen, drafts the next steps of the chain without any network;
one call verifies them all; each step is coupled maximally with the target's own. Every step is
tested at most once, so that one normal and one uniform number per (token, step) serve the whole
chain: the numbers of drafted steps that were never tested are still unused and independent.
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
from cspd.runtime import coupling
from cspd.runtime.coupling import Gaussian
from cspd.runtime.member import Rows
from cspd.runtime.noise import Noise, Purpose
from cspd.runtime.rounds import draft_tables, rows_of
from cspd.runtime.speculation import SpeculationOptions, SpeculativeSample, StepLog

# A search of the residual law is keyed by (round, attempt), and its candidates double per attempt.
# After the last, 3.5 million draws, giving up changes the law by at most 1 / (e draws), which is
# below the rounding of one float32 test.
ATTEMPTS = 64
MAX_CANDIDATES = 2**16
PREFETCH = 8  # rounds whose candidates are drawn at once
STATE_INPUTS = (
    "x", "step", "x0", "fraction", "conditions", "guidance", "temperature", "noise",
)  # fmt: skip
COUNTS = ("next_step", "accepted", "draws")
NUMBERS = ("candidates", "log_keep", "log_accept")
ADVANCED = ("x", "step", "x0", "fraction")
RESULTS = ("sample", "mean", "log_std", "sum_log_std")

State = dict[str, Tensor]  # per token, which is the first axis of all but the conditions


class Round(Protocol):
    """`speculative_round` as an exported graph or as `rounds.ReferenceRound`."""

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Advance all tokens by one round."""
        ...


class SpeculativeHead:
    """Samples tokens in rounds of `round_session`, in place of stepping through the chain."""

    def __init__(self, round_session: Round, options: SpeculationOptions, channels: int) -> None:
        self.session, self.options, self.channels = round_session, options, channels
        self._tables: dict[bytes, dict[str, Tensor]] = {}

    @torch.inference_mode()
    def __call__(
        self, rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose = Purpose.DENOISE,
        *, depth: np.ndarray | None = None,
    ) -> SpeculativeSample:  # fmt: skip
        """Sample every token of `rows`, in chunks that fit the largest row bucket.

        `depth` [S] int64: how many rows to evaluate for a token at each step, at least 1; by
        default as many as the window and the chain hold. The law of the samples is the same.
        """
        longest = np.arange(1, schedule.num_steps + 1).clip(max=self.options.window)
        depth = longest if depth is None else np.minimum(depth, longest)
        chain = Chain(schedule, noise, purpose, depth, self._drafts(schedule))
        limit = self.options.max_tokens or len(rows.images)
        starts = range(0, len(rows.images), limit)
        chunks = [_Run(self, chain).sample(_part(rows, i, i + limit)) for i in starts]
        return join(chunks)

    def _drafts(self, schedule: Schedule) -> dict[str, Tensor]:
        key = schedule.betas.tobytes()
        if key not in self._tables:
            self._tables[key] = draft_tables(schedule, self.options.window)
        return self._tables[key]


def join(chunks: list[SpeculativeSample]) -> SpeculativeSample:
    """The tokens of all `chunks` and their summed costs."""
    tensors = {name: torch.cat([getattr(c, name) for c in chunks]) for name in RESULTS}
    return SpeculativeSample(**tensors, stats=reduce(add, (chunk.stats for chunk in chunks)))


@dataclass(frozen=True)
class Chain:
    """A denoising chain: schedule, source and purpose of its noise, rows per step, draft tables."""

    schedule: Schedule
    noise: Noise
    purpose: Purpose
    depth: np.ndarray
    drafts: dict[str, Tensor]


class _Run:
    """The sampling of tokens that share their calls, from the first step to the last."""

    def __init__(self, head: SpeculativeHead, chain: Chain) -> None:
        self.session, self.options, self.channels = head.session, head.options, head.channels
        self.chain, self.noise, self.device = chain, chain.noise, chain.noise.device
        self.table = chain.schedule.table.to(self.device)
        self.drafts = {name: table.to(self.device) for name, table in chain.drafts.items()}
        self.cut: dict[int, dict[str, Tensor]] = {}

    def sample(self, tokens: Rows) -> SpeculativeSample:
        log = StepLog(len(tokens.images), self.chain.schedule.num_steps)
        state = self._start(tokens)
        results = {name: torch.empty_like(state["x"][: log.tokens]) for name in RESULTS}
        missing = log.tokens
        step = state["step"].numpy(force=True)
        while missing:
            rows = self._rows(step)
            out = self._round(state, log.rounds, rows)
            state = _advance(state, out)
            # The only transfer to the host in a round.
            after, accepted, draws = torch.stack([out[name] for name in COUNTS]).numpy(force=True)
            if (unsolved := np.flatnonzero(draws > self.options.candidates)).size:
                rows_left = torch.from_numpy(unsolved).to(self.device)
                draws = self._search(state, out, log.rounds, rows_left).numpy(force=True)
            log.add(step, accepted, draws, len(rows["row"]))
            finished = np.flatnonzero((after < 0) & (step >= 0))
            step = after
            if finished.size:
                missing -= finished.size
                _collect(results, state, out, torch.from_numpy(finished).to(self.device))
                if missing:
                    live = np.flatnonzero(step >= 0)
                    state = _compact(state, live, self.options.padded_tokens(missing))
                    step = state["step"].numpy(force=True)
        return SpeculativeSample(**results, stats=log.stats())

    def _start(self, tokens: Rows) -> State:
        """State of all tokens before the first step."""
        images, positions, count = tokens.images, tokens.positions, len(tokens.images)
        num_steps = self.chain.schedule.num_steps
        x, noise = self.noise.chain(self.chain.purpose, images, positions, num_steps, self.channels)
        noise[0] = 0  # the last step adds none
        zero = torch.zeros_like(x)
        state = {
            "x": x, "step": torch.full_like(images, num_steps - 1, dtype=torch.int32),
            # Before the first evaluation the draft predicts the centre of the data.
            "x0": zero, "fraction": zero + 0.5, "sum_log_std": zero,
            "conditions": tokens.conditions, "guidance": tokens.guidance,
            "temperature": tokens.temperature, "noise": noise.transpose(0, 1).contiguous(),
            "images": images, "positions": positions,
            "index": torch.arange(count, device=self.device),
        }  # fmt: skip
        return _compact(state, np.arange(count), self.options.padded_tokens(count))

    def _rows(self, step: np.ndarray) -> dict[str, Tensor]:
        """Rows of the next round; the window shrinks with the chain unless shapes are fixed."""
        length = np.where(step < 0, 0, self.chain.depth[step])
        window = self.options.window if self.options.row_buckets else int(length.max())
        rows = rows_of(length, window, self.options.padded_rows(int(length.sum())))
        return {name: value.to(self.device) for name, value in rows.items()}

    def _round(self, state: State, number: int, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of round `number`; a search of the residual law may be left unfinished."""
        if number % PREFETCH == 0:
            keys = torch.arange(number, number + PREFETCH, device=self.device) * ATTEMPTS
            images, positions = state["images"][:, None], state["positions"][:, None]
            numbers = self._numbers(images, positions, keys, self.options.candidates)
            state |= dict(zip(NUMBERS, numbers, strict=True))
        window = rows["slot"].shape[1]
        candidates, log_keep, log_accept = (state[name][:, number % PREFETCH] for name in NUMBERS)
        return self.session(
            **{name: state[name] for name in STATE_INPUTS},
            candidates=candidates.contiguous(),
            log_keep=log_keep.contiguous(),
            log_accept=log_accept[:, :window].contiguous(),
            schedule=self.table,
            **self._drafts(window),
            **rows,
        )

    def _drafts(self, window: int) -> dict[str, Tensor]:
        """The draft tables of a window that may be shorter than the longest."""
        if window not in self.cut:
            state, noise = self.drafts["draft_state"], self.drafts["draft_noise"]
            self.cut[window] = {
                "draft_state": state[:, :window].contiguous(),
                "draft_noise": noise[:, :window, :window].contiguous(),
            }
        return self.cut[window]

    def _numbers(
        self, images: Tensor, positions: Tensor, keys: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Random numbers of rounds: candidates [..., K, C] and the logarithms of uniform numbers.

        Those are [..., K] for the candidates and [..., window] for the tests. All come from normal
        numbers of one call, whose distribution function makes them uniform.
        """
        sizes = [count * self.channels, count, self.options.window]
        normal = self.noise.normal(Purpose.SPECULATE, images, positions, keys, sum(sizes))
        candidates, keep, accept = normal.split(sizes, dim=-1)
        logs = (torch.special.log_ndtr(value) for value in (keep, accept))
        return candidates.unflatten(-1, (count, self.channels)), *logs

    def _search(self, state: State, out: dict[str, Tensor], number: int, rows: Tensor) -> Tensor:
        """Search on for `rows`, none of whose candidates was kept; returns the draws of all."""
        draws, count = out["draws"].clone(), self.options.candidates
        for attempt in range(1, ATTEMPTS):
            count = min(2 * count, MAX_CANDIDATES)
            target, drafted = (
                Gaussian.kernel(out[mean][rows], out[log_std][rows], state["temperature"][rows])
                for mean, log_std in (("mean", "log_std"), ("drafted_mean", "drafted_log_std"))
            )
            key = torch.full_like(rows, number * ATTEMPTS + attempt)
            images, positions = state["images"][rows], state["positions"][rows]
            candidates, log_keep, _ = self._numbers(images, positions, key, count)
            state["x"][rows], index = coupling.residual(target, drafted, candidates, log_keep)
            draws[rows] += index.int()
            rows = rows[index == count]
            if not len(rows):
                break
        return draws


def _advance(state: State, out: dict[str, Tensor]) -> State:
    """`state` after a round. Clones: a session may overwrite its outputs in the next call."""
    state = state | {name: out[f"next_{name}"].clone() for name in ADVANCED}
    state["sum_log_std"] = state["sum_log_std"] + out["sum_log_std"]
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
        name: value.index_select(1 if name == "conditions" else 0, rows)
        for name, value in state.items()
    }
    packed["step"][len(live) :] = -1
    return packed


def _part(rows: Rows, start: int, stop: int) -> Rows:
    """Tokens `start` to `stop` of `rows`."""
    part = slice(start, stop)
    per_token = (rows.guidance, rows.temperature, rows.images, rows.positions)
    return Rows(rows.conditions[:, part], *(value[part] for value in per_token))
