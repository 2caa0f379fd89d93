"""Look inside a run: record inputs of the networks, replace sessions, go round by round.

Shared by the parity ladder and the benchmark; a production run never passes through here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cspd.engines.backends import open_session
from cspd.engines.bundle import Bundle
from cspd.engines.errors import BundleError
from cspd.engines.ort_session import OrtCpuSession, import_onnxruntime, thread_options
from cspd.engines.session import Session
from cspd.runtime.canvas import Batch, Canvas
from cspd.runtime.config import RunConfig
from cspd.runtime.cspd import CspdOptions, Window, prefill, propose, settle, verify
from cspd.runtime.head_base import HeadSample
from cspd.runtime.member import Member
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.sampler import Sampler
from cspd.runtime.sessions import Opener, Sessions
from cspd.runtime.stats import Statistics, Verdicts

MAX_RECORDED = 256  # calls kept per graph; later ones are counted, not kept


def unchanged(label: str, session: Session) -> Session:
    """The session as it is."""
    return session


def wrapping(wrap: Callable[[str, Session], Session]) -> Opener:
    """Opens graphs as usual, and passes each through `wrap(label, session)`."""

    def opener(bundle: Bundle, label: str, backend: str, **options: Any) -> Session:
        return wrap(label, open_session(bundle, label, backend, **options))

    return opener


@dataclass
class Recorder:
    """Keeps a copy of the inputs of every call, by graph label."""

    calls: dict[str, list[dict[str, Tensor]]] = field(default_factory=dict)

    def wrap(self, label: str, session: Session) -> Session:
        """`session`, recorded under `label`."""
        return _RecordedSession(session, self.calls.setdefault(label, []))


@dataclass
class _RecordedSession:
    """A session that keeps copies of its inputs on the CPU."""

    session: Session
    kept: list[dict[str, Tensor]]

    @property
    def spec(self):
        return self.session.spec

    @property
    def device(self) -> torch.device:
        return self.session.device

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        if len(self.kept) < MAX_RECORDED:
            self.kept.append({name: tensor.cpu().clone() for name, tensor in tensors.items()})
        return self.session(**tensors)


def record_inputs(
    bundle: Bundle, configs: list[RunConfig], device: str = "cpu"
) -> dict[str, list[dict[str, Tensor]]]:
    """Inputs of every call that PyTorch needs for the images of `configs`, by graph label."""
    recorder = Recorder()
    pipeline = Pipeline(Sessions(bundle, "torch", device, opener=wrapping(recorder.wrap)))
    for config in configs:
        for _ in pipeline.generate(config):
            pass
    return recorder.calls


def unoptimised_session(bundle: Bundle, label: str) -> Session:
    """ONNX Runtime on the CPU with every graph optimisation off: the graph exactly as exported."""
    ort = import_onnxruntime()
    options = thread_options(ort, threads=1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = str(bundle.graph_file(label))
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes, of no common base but this
        reason = str(error).strip().splitlines()[0]
        raise BundleError(
            f"{path}: cannot be loaded ({reason}); rebuild it with cspd-export build"
        ) from None
    return OrtCpuSession(session, bundle.graph(label).spec)


def call(session: Session, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of `session` for CPU tensors, as CPU tensors of their own."""
    outputs = session(**{name: tensor.to(session.device) for name, tensor in inputs.items()})
    return {name: value.detach().cpu().clone() for name, value in outputs.items()}


@dataclass(frozen=True)
class Players:
    """Everything a round of speculative decoding needs on one backend."""

    sampler: Sampler
    target: Member
    draft: Member
    options: CspdOptions

    def propose(self, batch: Batch, canvas: Canvas, statistics: Statistics) -> Window:
        """Drafts of the next window; `canvas` is not changed."""
        return propose(self.sampler, self.draft, self.options, batch, canvas, statistics)

    def verify(self, batch: Batch, canvas: Canvas, window: Window) -> HeadSample:
        """The target's aligned samples of the tokens in `window`."""
        return verify(self.sampler, self.target, self.options, batch, canvas, window)


@dataclass(frozen=True)
class Round:
    """One verification round: the canvas before it, the drafts, the target's tokens, what was kept.

    `accepted` [B, P] bool says which tokens of the window now stand on the canvas as drafted,
    `judged_mask` which were judged at all; `statistics` counts everything up to this round.
    """

    before: Canvas
    window: Window
    judged: HeadSample
    accepted: Tensor
    judged_mask: Tensor
    statistics: Statistics


def players(pipeline: Pipeline, config: RunConfig) -> Players:
    """Draft, target and sampler of `config` on the backend of `pipeline`."""
    target, draft = pipeline.members(config.model_copy(update={"method": "cspd"}))
    return Players(pipeline.sampler(config), target, draft, CspdOptions.of(config))


def batch_of(pipeline: Pipeline, config: RunConfig) -> Batch:
    """All images of `config` as one batch."""
    labels = [config.label_of(image) for image in range(config.num_images)]
    classes = pipeline.bundle.manifest.geometry.num_classes
    images = torch.arange(config.num_images, device=pipeline.device)
    return Batch(images, torch.tensor(labels, device=pipeline.device), classes, len(labels))


def rounds(pipeline: Pipeline, config: RunConfig, tries: int | None = None) -> Iterator[Round]:
    """Every verification round of the images of `config`, generated as one batch.

    `tries`, if given, limits the draws from the residual distribution.
    """
    play, batch = players(pipeline, config), batch_of(pipeline, config)
    if tries is not None:
        play = replace(play, options=replace(play.options, max_tries=tries))
    channels = pipeline.bundle.manifest.geometry.token_dim
    canvas = Canvas.empty(batch, play.sampler.noise, play.sampler.plan.num_tokens, channels)
    statistics = Statistics(per_image=[Verdicts() for _ in range(len(batch))])
    prefill(play.sampler, play.target, play.options, batch, canvas, statistics)
    while not canvas.done:
        before = canvas.clone()
        window = play.propose(batch, canvas, statistics)
        judged = play.verify(batch, canvas, window)
        settle(play.sampler, play.options, batch, canvas, window, judged, statistics)
        yield Round(before, window, judged, *_outcome(before, canvas, window), statistics)


def _outcome(before: Canvas, after: Canvas, window: Window) -> tuple[Tensor, Tensor]:
    """Which tokens of the window were accepted, and which judged, both [B, P] bool."""
    positions = window.span.positions.long()[..., None].expand(-1, -1, after.tokens.shape[-1])
    same = (after.tokens.gather(1, positions) == window.drafted.sample).all(-1)
    kept = torch.tensor(after.known)[:, None] - torch.tensor(before.known)[:, None]
    judged = torch.arange(window.span.width) < kept
    judged = window.span.valid & judged.to(window.span.valid.device)
    return same & judged, judged
