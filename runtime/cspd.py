"""Continuous speculative decoding (arXiv 2411.11925): the draft proposes tokens, the target judges.

Approximate by construction, see `runtime/acceptance.py`. Two ways to verify a window of drafts:
`parallel`, as the authors released it, where the target conditions every drafted token on what was
known before the window; and `prefix`, the paper's Algorithm 1, where it conditions each drafted
step on the drafts before it, and the first rejection discards everything after it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from cspd.runtime import acceptance
from cspd.runtime.canvas import Batch, Canvas, Span
from cspd.runtime.config import RunConfig
from cspd.runtime.head_base import HeadSample
from cspd.runtime.member import Member
from cspd.runtime.noise import Purpose
from cspd.runtime.plan import MaskPlan, WindowPlan
from cspd.runtime.sampler import Sampler
from cspd.runtime.stats import Statistics, Verdicts


@dataclass(frozen=True)
class CspdOptions:
    """Settings of the method.

    `gamma` tokens at least are drafted per window, `prefill` is the share of tokens that the target
    generates first; `count_in` "steps" counts autoregressive steps instead (`WindowPlan`).
    `accept_temperature` widens both densities of the test: 1 is the paper's formula, 42 what the
    authors released. `align` shares the noise between draft and target. `on_reject` "target" takes
    the target's own aligned sample; "residual" draws from the residual at `residual_temperature`,
    which is 1 in the paper and in the released code; as in the test, it adds visible noise.
    """

    gamma: int = 8
    prefill: float = 0.05
    accept_temperature: float = 42.0
    verify: str = "parallel"
    align: bool = True
    on_reject: str = "target"
    residual_temperature: float = 1.0
    count_in: str = "tokens"
    max_tries: int = 100

    @classmethod
    def of(cls, config: RunConfig) -> CspdOptions:
        """The settings of a run; fields are called the same."""
        names = (item.name for item in fields(cls) if item.name in RunConfig.model_fields)
        return cls(**{name: getattr(config, name) for name in names})

    def windows(self, plan: MaskPlan) -> WindowPlan:
        """Where the windows of an image end that is generated in the steps of `plan`."""
        return WindowPlan(plan, self.gamma, self.prefill, self.count_in == "steps")


@dataclass(frozen=True)
class Window:
    """Drafted tokens of one round, in generation order, every tensor [B, P, ...] over one span.

    `group` [B, P] is the index of the autoregressive step within the window that drafted each
    token, `starts` [B][K] the known tokens before each of these steps.
    """

    span: Span
    drafted: HeadSample
    guidance: Tensor
    group: Tensor
    starts: list[list[int]]


def decode_cspd(
    sampler: Sampler,
    target: Member,
    draft: Member,
    options: CspdOptions,
    batch: Batch,
    channels: int,
) -> tuple[Canvas, Statistics]:
    """Images by speculative decoding; the statistics hold the fate of every drafted token."""
    canvas = Canvas.empty(batch, sampler.noise, sampler.plan.num_tokens, channels)
    statistics = Statistics(per_image=[Verdicts() for _ in range(batch.count)])
    prefill(sampler, target, options, batch, canvas, statistics)
    # The samples of a batch part ways at their first rejections.
    sampler = dataclasses.replace(sampler, ragged=options.verify == "prefix" and len(batch) > 1)
    while not canvas.done:
        window = propose(sampler, draft, options, batch, canvas, statistics)
        judged = verify(sampler, target, options, batch, canvas, window)
        settle(sampler, options, batch, canvas, window, judged, statistics)
        sampler.on_step(canvas, statistics)
    return canvas, statistics


def prefill(
    sampler: Sampler, target: Member, options: CspdOptions, batch: Batch, canvas: Canvas,
    statistics: Statistics,
) -> None:  # fmt: skip
    """Let the target generate the first tokens."""
    first = options.windows(sampler.plan).first
    while canvas.known[0] < first:
        sampler.step(target, canvas, batch)
        statistics.count_target()
        sampler.on_step(canvas, statistics)
    statistics.prefilled += sum(canvas.known[: batch.count])


def propose(
    sampler: Sampler, draft: Member, options: CspdOptions, batch: Batch, canvas: Canvas,
    statistics: Statistics,
) -> Window:  # fmt: skip
    """Draft the steps of each sample's next window."""
    ahead, windows = canvas.clone(), options.windows(sampler.plan)
    goal = [windows.stop(known) for known in canvas.known]
    purpose = Purpose.DENOISE if options.align else Purpose.DENOISE_DRAFT
    steps, starts = [], []
    while any(k < g for k, g in zip(ahead.known, goal, strict=True)):
        starts.append(list(ahead.known))
        span, sampled = sampler.step(draft, ahead, batch, purpose, goal)
        steps.append((span, sampled, sampler.guidance(span)))
        statistics.draft_calls += 1
    widest = windows.widest if sampler.widened else None
    return gather_window(canvas, ahead, steps, starts, widest)


def gather_window(
    canvas: Canvas, ahead: Canvas, steps: list[tuple[Span, HeadSample, Tensor]],
    starts: list[list[int]], width: int | None,
) -> Window:  # fmt: skip
    """Join the drafted steps into one window in generation order, padded to `width` tokens."""
    start = canvas.known
    span = canvas.span(start, ahead.known, width)
    shape = (*span.valid.shape, canvas.tokens.shape[-1])
    joined = [torch.zeros(shape, device=canvas.tokens.device) for _ in range(4)]
    guidance = torch.ones(span.valid.shape, device=canvas.tokens.device)
    group = torch.zeros(span.valid.shape, dtype=torch.int64, device=canvas.tokens.device)
    origin = torch.tensor(start, device=canvas.tokens.device)
    for index, (part, sampled, scale) in enumerate(steps):
        rows, columns = part.valid.nonzero(as_tuple=True)
        slots = torch.tensor(part.start, device=origin.device)[rows] - origin[rows] + columns
        values = (sampled.sample, sampled.mean, sampled.log_std, sampled.sum_log_std)
        for whole, value in zip(joined, values, strict=True):
            whole[rows, slots] = value[rows, columns]
        guidance[rows, slots] = scale[rows, columns]
        group[rows, slots] = index
    by_sample = [list(column) for column in zip(*starts, strict=True)]
    return Window(span, HeadSample(*joined), guidance, group, by_sample)


def verify(
    sampler: Sampler,
    target: Member,
    options: CspdOptions,
    batch: Batch,
    canvas: Canvas,
    window: Window,
) -> HeadSample:
    """The target's own samples [B, P, C] of all drafted tokens, same noise and guidance."""
    if options.verify == "parallel":
        z = sampler.conditions(target, canvas, batch, window.span)
    else:
        z = prefix_conditions(sampler, target, batch, canvas, window)
    # As many denoising steps as the step had that drafted a token.
    known = torch.tensor(window.starts).gather(1, window.group.cpu())
    counts = sampler.step_counts(known)
    return sampler.sample(target, z, window.guidance, batch, window.span, Purpose.DENOISE, counts)


def prefix_conditions(
    sampler: Sampler, target: Member, batch: Batch, canvas: Canvas, window: Window
) -> Tensor:
    """Target conditions [G, B, P, D] where each drafted step sees the drafts before it.

    All prefixes of all samples are one batch, unless shapes must not depend on how many there are:
    then each prefix is a call.
    """
    ahead = canvas.clone()
    ahead.place(window.span, window.drafted.sample)
    steps = range(len(window.starts[0]))
    chunks = [[step] for step in steps] if sampler.widened else [list(steps)]
    parts = [_prefixes(sampler, target, batch, ahead, window, chunk) for chunk in chunks]
    z = torch.cat(parts, dim=2)
    index = window.group[None, :, None, :, None].expand(z.shape[0], -1, 1, -1, z.shape[-1])
    return z.gather(2, index)[:, :, 0]


def _prefixes(
    sampler: Sampler, target: Member, batch: Batch, ahead: Canvas, window: Window, steps: list[int]
) -> Tensor:
    """Conditions [G, B, K, P, D] of the window from what K of its drafted `steps` begin with."""
    groups = len(steps)
    visible = [starts[step] for starts in window.starts for step in steps]
    many = Canvas(
        ahead.tokens.repeat_interleave(groups, 0),
        ahead.sequence.repeat_interleave(groups, 0),
        visible,
    )
    images = Batch(
        batch.images.repeat_interleave(groups),
        batch.labels.repeat_interleave(groups),
        batch.null_label,
        count=0,
    )
    positions = window.span.positions.repeat_interleave(groups, 0)
    span = Span(visible, visible, positions, window.span.valid.repeat_interleave(groups, 0))
    z = sampler.conditions(target, many, images, span)
    # A copy: the next call of the session may reuse its outputs.
    return z.reshape(z.shape[0], len(batch), groups, *z.shape[2:]).clone()


def weigh(
    sampler: Sampler, options: CspdOptions, batch: Batch, window: Window, judged: HeadSample
) -> tuple[Tensor, Tensor]:
    """Log acceptance ratio of every drafted token, and its uniform number: both [B, P].

    The densities are those of the kernels that were sampled, the sampler's temperature included.
    """
    positions = window.span.positions.long()
    images = batch.images[:, None].expand_as(positions)
    zero = torch.zeros((), dtype=torch.int64, device=positions.device)
    uniform = sampler.noise.uniform(Purpose.ACCEPT, images, positions, zero)[..., 0]
    temperature = options.accept_temperature * sampler.temperature
    drafted = window.drafted
    return acceptance.accept_log_ratio(drafted.sample, drafted, judged, temperature), uniform


def settle(
    sampler: Sampler, options: CspdOptions, batch: Batch, canvas: Canvas, window: Window,
    judged: HeadSample, statistics: Statistics,
) -> None:  # fmt: skip
    """Accept or replace the drafted tokens, write the result to `canvas` and count it."""
    statistics.count_target(len(window.starts[0]) if options.verify == "prefix" else 1)
    span = window.span
    accepted = acceptance.accept(*weigh(sampler, options, batch, window, judged)) & span.valid
    rejected = span.valid & ~accepted
    kept = span.valid
    if options.verify == "prefix":
        # Keep everything before the first rejection, and the rejected token itself, replaced.
        kept = span.valid & (rejected.cumsum(1) - rejected.int() == 0)
        accepted, rejected = accepted & kept, rejected & kept
    # Never zeros: where nothing else is drawn, the target's own aligned sample.
    values = torch.where(accepted[..., None], window.drafted.sample, judged.sample)
    found = torch.zeros_like(rejected)
    if options.on_reject == "residual":
        found = resample(sampler, options, batch, window, judged, rejected, values)
    canvas.place(Span(span.start, span.stop, span.positions, kept), values)
    canvas.judge(span, accepted, rejected)
    known = canvas.known
    canvas.known = [k + n for k, n in zip(known, kept.sum(1).tolist(), strict=True)]
    distance = (window.drafted.sample - judged.sample).norm(dim=-1)
    statistics.distance_sum += float((distance * kept)[: batch.count].sum())
    own, asked = rejected & ~found, options.on_reject == "target"
    masks = (span.valid, accepted, found, own & asked, own & (not asked), span.valid & ~kept)
    counts = torch.stack(masks).sum(-1).T.tolist()
    for row, start in enumerate(known[: batch.count]):
        verdicts = Verdicts(*counts[row])
        statistics.record(start, verdicts)
        statistics.per_image[row].add(verdicts)


def resample(
    sampler: Sampler, options: CspdOptions, batch: Batch, window: Window, judged: HeadSample,
    rejected: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    """Put residual samples into `values` [B, P, C] where `rejected`; returns where one was found.

    Candidates and their test have the temperature of the sampler, like the kernels they replace.
    """
    found = torch.zeros_like(rejected)
    rows, columns = rejected.nonzero(as_tuple=True)
    if not len(rows):
        return found
    drafted, target = (
        HeadSample(*(t[rows, columns] for t in (s.sample, s.mean, s.log_std, s.sum_log_std)))
        for s in (window.drafted, judged)
    )
    tries = torch.arange(options.max_tries, device=rows.device)[:, None]
    keys = (batch.images[rows], window.span.positions[rows, columns].long(), tries)
    normal = sampler.noise.normal(Purpose.RESAMPLE, *keys, values.shape[-1])
    uniform = sampler.noise.uniform(Purpose.RESAMPLE_ACCEPT, *keys)[..., 0]
    temperature = options.residual_temperature * sampler.temperature
    drawn = acceptance.resample(drafted, target, temperature, normal, uniform)
    values[rows[drawn.found], columns[drawn.found]] = drawn.values[drawn.found]
    found[rows, columns] = drawn.found
    return found
