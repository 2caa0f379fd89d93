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

import torch
from torch import Tensor

from cspd.engines.schedule import Schedule
from cspd.runtime import coupling
from cspd.runtime.coupling import Gaussian
from cspd.runtime.member import Rows
from cspd.runtime.noise import Noise, Purpose
from cspd.runtime.rounds import draft_table, rows_of
from cspd.runtime.speculation import SpeculationOptions, SpeculativeSample, StepLog

# A search of the residual law is keyed by (round, attempt), and its candidates double per attempt.
# After the last, 3.5 million draws, giving up changes the law by at most 1 / (e draws), which is
# below the rounding of one float32 test.
ATTEMPTS = 64
MAX_CANDIDATES = 2**16
PREFETCH = 8  # rounds whose candidates are drawn at once
STATE_INPUTS = (
    "x", "step", "x0", "fraction", "conditions", "guidance", "temperature", "noise", "log_accept",
)  # fmt: skip
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
        self._tables: dict[bytes, Tensor] = {}

    @torch.inference_mode()
    def __call__(
        self, rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose = Purpose.DENOISE,
        *, depth: Tensor | None = None,
    ) -> SpeculativeSample:  # fmt: skip
        """Sample every token of `rows`, in chunks that fit the largest row bucket.

        `depth` [S] int64: how many rows to evaluate for a token at each step, at least 1; by
        default as many as the window and the chain hold. The law of the samples is the same.
        """
        longest = torch.arange(1, schedule.num_steps + 1).clamp(max=self.options.window)
        depth = longest if depth is None else torch.minimum(depth.cpu(), longest)
        chain = Chain(schedule, noise, purpose, depth.to(noise.device), self._drafts(schedule))
        limit = self.options.max_tokens or len(rows.images)
        starts = range(0, len(rows.images), limit)
        chunks = [_Run(self, chain).sample(_part(rows, i, i + limit)) for i in starts]
        return join(chunks)

    def _drafts(self, schedule: Schedule) -> Tensor:
        key = schedule.betas.tobytes()
        if key not in self._tables:
            self._tables[key] = draft_table(schedule, self.options.window)
        return self._tables[key]


def join(chunks: list[SpeculativeSample]) -> SpeculativeSample:
    """The tokens of all `chunks` and their summed costs."""
    tensors = {name: torch.cat([getattr(c, name) for c in chunks]) for name in RESULTS}
    return SpeculativeSample(**tensors, stats=reduce(add, (chunk.stats for chunk in chunks)))


@dataclass(frozen=True)
class Chain:
    """A denoising chain: schedule, source and purpose of its noise, rows per step, draft table."""

    schedule: Schedule
    noise: Noise
    purpose: Purpose
    depth: Tensor
    drafts: Tensor


class _Run:
    """The sampling of tokens that share their calls, from the first step to the last."""

    def __init__(self, head: SpeculativeHead, chain: Chain) -> None:
        self.session, self.options, self.channels = head.session, head.options, head.channels
        self.chain, self.noise, self.device = chain, chain.noise, chain.noise.device
        self.tables = {
            "schedule": chain.schedule.table.to(self.device),
            "drafts": chain.drafts.to(self.device),
        }

    def sample(self, tokens: Rows) -> SpeculativeSample:
        log = StepLog(len(tokens.images), self.chain.schedule.num_steps)
        state = self._start(tokens)
        results = {name: torch.empty_like(state["x"][: log.tokens]) for name in RESULTS}
        missing = log.tokens
        while missing:
            rows = self._rows(state["step"])
            out = self._round(state, log.rounds, rows)
            log.add(state["step"], out["accepted"], out["draws"], len(rows["row"]))
            finished = (out["step"] < 0) & (state["step"] >= 0)
            state = _advance(state, out)
            if bool(finished.any()):
                missing -= _collect(results, state, out, finished)
                state = _compact(state, self.options.padded_tokens(missing)) if missing else state
        return SpeculativeSample(**results, stats=log.stats())

    def _start(self, tokens: Rows) -> State:
        """State of all tokens before the first step."""
        images, positions = tokens.images, tokens.positions
        num_steps = self.chain.schedule.num_steps
        x, noise = self.noise.chain(self.chain.purpose, images, positions, num_steps, self.channels)
        noise[0] = 0  # the last step adds none
        step = torch.arange(num_steps, device=self.device)
        uniform = self.noise.uniform(
            Purpose.LOSSLESS_ACCEPT, images[:, None], positions[:, None], step
        )
        log_accept = uniform[..., 0].log()
        log_accept[:, 0] = torch.inf  # nor can it be tested: its kernel is a Dirac
        zero = torch.zeros_like(x)
        state = {
            "x": x, "step": torch.full_like(images, num_steps - 1, dtype=torch.int32),
            # Before the first evaluation the draft predicts the centre of the data.
            "x0": zero, "fraction": zero + 0.5, "sum_log_std": zero,
            "conditions": tokens.conditions, "guidance": tokens.guidance,
            "temperature": tokens.temperature, "noise": noise.transpose(0, 1),
            "log_accept": log_accept, "images": images, "positions": positions,
            "index": torch.arange(len(images), device=self.device),
        }  # fmt: skip
        return _compact(state, self.options.padded_tokens(len(images)))

    def _rows(self, step: Tensor) -> dict[str, Tensor]:
        """Rows of the next round; the window shrinks with the chain unless shapes are fixed."""
        wanted = self.chain.depth[step.clamp(min=0)] * (step >= 0)
        total, longest = torch.stack([wanted.sum(), wanted.max()]).tolist()
        window = self.options.window if self.options.row_buckets else longest
        return rows_of(wanted, window, self.options.padded_rows(total))

    def _round(self, state: State, number: int, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of round `number`, with every residual search brought to its end."""
        if number % PREFETCH == 0:
            keys = torch.arange(number, number + PREFETCH, device=self.device) * ATTEMPTS
            state["candidates"], state["log_keep"] = self._candidates(
                state["images"][:, None], state["positions"][:, None], keys, self.options.candidates
            )
        window = rows["slot"].shape[1]
        out = self.session(
            **{name: state[name] for name in STATE_INPUTS},
            candidates=state["candidates"][:, number % PREFETCH].contiguous(),
            log_keep=state["log_keep"][:, number % PREFETCH].contiguous(),
            schedule=self.tables["schedule"],
            drafts=self.tables["drafts"][:, :window, : window + 2].contiguous(),
            **rows,
        )
        unsolved = out["draws"] > self.options.candidates
        return self._search(state, out, number, unsolved) if bool(unsolved.any()) else out

    def _candidates(
        self, images: Tensor, positions: Tensor, keys: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Normal numbers [..., K, C] and log uniform ones [..., K] for `count` = K candidates."""
        width = count * self.channels
        normal = self.noise.normal(Purpose.LOSSLESS_PROPOSE, images, positions, keys, width)
        uniform = self.noise.uniform(Purpose.LOSSLESS_KEEP, images, positions, keys, count)
        return normal.unflatten(-1, (count, self.channels)), uniform.log()

    def _search(
        self, state: State, out: dict[str, Tensor], number: int, unsolved: Tensor
    ) -> dict[str, Tensor]:
        """Go on where no candidate of the round was kept, until each token has one."""
        out = {name: value.clone() for name, value in out.items()}
        rows, count = unsolved.nonzero()[:, 0], self.options.candidates
        for attempt in range(1, ATTEMPTS):
            count = min(2 * count, MAX_CANDIDATES)
            target, drafted = (
                Gaussian.kernel(out[mean][rows], out[log_std][rows], state["temperature"][rows])
                for mean, log_std in (("mean", "log_std"), ("drafted_mean", "drafted_log_std"))
            )
            keys = torch.full_like(rows, number * ATTEMPTS + attempt)
            candidates = self._candidates(
                state["images"][rows], state["positions"][rows], keys, count
            )
            out["x"][rows], index = coupling.residual(target, drafted, *candidates)
            out["draws"][rows] += index.int()
            rows = rows[index == count]
            if not len(rows):
                break
        return out


def _advance(state: State, out: dict[str, Tensor]) -> State:
    """`state` after a round. Clones: a session may overwrite its outputs in the next call."""
    state = state | {name: out[name].clone() for name in ADVANCED}
    state["sum_log_std"] = state["sum_log_std"] + out["sum_log_std"]
    return state


def _collect(
    results: dict[str, Tensor], state: State, out: dict[str, Tensor], finished: Tensor
) -> int:
    """Store the tokens that have just finished in `results`; returns their number."""
    at = finished.nonzero()[:, 0]
    rows = state["index"][at]
    values = (state["x"], out["mean"], out["log_std"], state["sum_log_std"])
    for name, value in zip(RESULTS, values, strict=True):
        results[name][rows] = value[at]
    return len(at)


def _compact(state: State, size: int) -> State:
    """`state` with `size` tokens: the unfinished ones, then padding that counts as finished."""
    live = (state["step"] >= 0).nonzero()[:, 0]
    rows = live[torch.arange(size, device=live.device).clamp(max=len(live) - 1)]
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
