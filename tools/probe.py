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
from cspd.engines.sessions.ort import OrtCpuSession, import_onnxruntime, thread_options
from cspd.engines.sessions.session import Session
from cspd.runtime.config import RunConfig
from cspd.runtime.decode.canvas import Batch, Canvas
from cspd.runtime.decode.cspd import Speculative
from cspd.runtime.decode.decoder import Round
from cspd.runtime.decode.setup import padded
from cspd.runtime.decode.window import Judged, Window
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.sessions import Opener, Sessions

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


def decoder_of(pipeline: Pipeline, config: RunConfig) -> Speculative:
    """`cspd` with the other settings of `config`, on the backend of `pipeline`."""
    decoder = pipeline.decoder(config.model_copy(update={"method": "cspd"}))
    assert isinstance(decoder, Speculative)
    return decoder


def batch_of(pipeline: Pipeline, config: RunConfig) -> Batch:
    """All images of `config` as one batch."""
    labels = [config.label_of(image) for image in range(config.num_images)]
    classes = pipeline.bundle.manifest.geometry.num_classes
    return padded(list(range(len(labels))), labels, len(labels), classes, pipeline.device)


def verdicts(
    pipeline: Pipeline, config: RunConfig, tries: int | None = None
) -> Iterator[tuple[Round, Judged]]:
    """Every verification of the images of `config`, generated as one batch.

    `tries`, if given, limits the draws from the residual distribution.
    """
    decoder = decoder_of(pipeline, config)
    if tries is not None:
        decoder = replace(decoder, options=replace(decoder.options, max_tries=tries))
    for done in decoder.rounds(batch_of(pipeline, config)):
        if done.judged is not None:
            yield done, done.judged


def canvas_before(canvas: Canvas, window: Window) -> Canvas:
    """A copy of `canvas` as it was when `window` was drafted."""
    known = torch.tensor(window.span.start, device=canvas.sequence.device)
    later = torch.arange(canvas.sequence.shape[1], device=known.device) >= known[:, None]
    unknown = torch.zeros_like(later).scatter(1, canvas.sequence.long(), later)
    tokens = canvas.tokens.masked_fill(unknown[..., None], 0)
    return Canvas(tokens, canvas.sequence, list(window.span.start))
