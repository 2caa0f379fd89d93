"""The rungs of the parity ladder, from one call of one graph up to whole images and decisions.

Every rung compares with PyTorch in float32, with the weights of the bundle and without TF32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from cspd.engines.sessions.session import Session, TorchSession
from cspd.engines.spec import GraphSpec
from cspd.export.graphs.denoiser import TOLERANCES
from cspd.export.verify import agreement
from cspd.runtime.config import RunConfig
from cspd.runtime.decode.canvas import Canvas
from cspd.runtime.decode.judge import weigh
from cspd.runtime.decode.stats import Statistics
from cspd.runtime.pipeline import Pipeline
from cspd.tools.parity.ladder import Case, Inputs, Ladder, walk
from cspd.tools.parity.measure import (
    IMAGE_FACTOR,
    MAX_ERROR,
    MAX_FLIPS,
    MIN_PSNR,
    TRAJECTORY_FACTOR,
    Row,
    Skipped,
    measure,
)  # fmt: skip
from cspd.tools.probe import (
    batch_of,
    call,
    canvas_before,
    decoder_of,
    unoptimised_session,
    verdicts,
)

Result = Row | Skipped
Rung = Callable[[Ladder], Iterator[Result]]
LOWEST_LOG_RATIO = -30.0  # below, a token is rejected for certain
Decision = tuple[Tensor, Tensor]


def graphs_rung(ladder: Ladder) -> Iterator[Result]:
    """Rung 1: each graph on the CPU, exactly as exported, on random and recorded inputs."""
    for label in ladder.bundle.manifest.graphs():
        session = unoptimised_session(ladder.bundle, label)
        cases = [*ladder.random_cases(label), *ladder.recorded_cases(label)]
        yield from compare(ladder, "graphs", label, ("as exported", session), cases)


def backends_rung(ladder: Ladder) -> Iterator[Result]:
    """Rung 2: every backend that can run here, graph by graph."""
    for candidate, sessions in ladder.sessions.items():
        for label, session in sessions.opened.items():
            cases = [*ladder.random_cases(label), *ladder.recorded_cases(label)]
            yield from compare(ladder, "backends", label, (candidate.name, session), cases)


def compare(
    ladder: Ladder, rung: str, label: str, run: tuple[str, Session], cases: Iterable[Case]
) -> Iterator[Result]:
    """A row for every output of graph `label` in every case; `run` is a name and its session."""
    name, session = run
    reference, found = ladder.reference(label), False
    for case, inputs in cases:
        got, expected = call(session, inputs), call(reference, inputs)
        yield from output_rows(rung, f"{label} {name}", session.spec, case, got, expected)
        found = True
    if not found:
        yield Skipped(rung, f"{label} {name}", "no run that was recorded here calls this graph")


def output_rows(
    rung: str, subject: str, spec: GraphSpec, case: str, got: Inputs, expected: Inputs
) -> Iterator[Row]:
    """A row per output. Where a whole number differs, floats of that row are not compared."""
    whole = [t.name for t in spec.outputs if t.dtype != "float32"]
    agree = agreement(spec, got, expected)
    if whole:
        share = 1 - float(agree.double().mean())
        yield Row(rung, subject, "decisions", case, share, MAX_FLIPS, unit="share differing")
    for tensor in spec.outputs:
        if tensor.name not in whole and bool(agree.any()):
            stats = measure(got[tensor.name][agree], expected[tensor.name][agree])
            yield Row(rung, subject, tensor.name, case, stats.norm, tensor.tolerance or 0.0, stats)


def trajectory_rung(ladder: Ladder) -> Iterator[Result]:
    """Rung 3: denoising chains from one noise, each backend on its own path, error per step."""
    for role in ladder.bundle.manifest.models:
        chains = ladder.chains(role)
        reference = ladder.reference_steps(role)
        paths = [[x for _, x in walk(reference, chain)] for chain in chains]
        allowed = min(TRAJECTORY_FACTOR * ladder.tolerance(f"{role}/denoiser"), MAX_ERROR)
        for candidate in ladder.sessions:
            steps, subject = ladder.candidate_steps(candidate, role), f"{role} {candidate.name}"
            for number, (chain, path) in enumerate(zip(chains, paths, strict=True)):
                for step, (_, x) in enumerate(walk(steps, chain)):
                    stats = measure(x, path[step])
                    case = f"chain {number} step {step + 1} of {len(path)}"
                    yield Row("trajectory", subject, "x", case, stats.norm, allowed, stats)


def image_rung(ladder: Ladder) -> Iterator[Result]:
    """Rung 4: whole images from one noise, error per autoregressive step and PSNR of the pixels."""
    for method, model in ladder.bundle.manifest.models.items():
        config = ladder.config.model_copy(update={"method": method})
        steps, pixels = trace_image(ladder.reference_pipeline(), config)
        allowed = min(IMAGE_FACTOR * ladder.tolerance(f"{method}/backbone"), MAX_ERROR)
        for name, pipeline in ladder.pipelines():
            subject = f"{method} {name}"
            got_steps, got_pixels = trace_image(pipeline, config)
            for number, (got, expected) in enumerate(zip(got_steps, steps, strict=True)):
                stats = measure(got, expected)
                case = f"step {number + 1} of {len(steps)}"
                yield Row("image", subject, "tokens", case, stats.norm, allowed, stats)
            for number, (got, expected) in enumerate(zip(got_pixels, pixels, strict=True)):
                yield Row(
                    "image", subject, "pixels", f"image {number}", psnr(got, expected),
                    MIN_PSNR[model.precision], unit="PSNR dB", higher_is_better=True,
                )  # fmt: skip


def trace_image(pipeline: Pipeline, config: RunConfig) -> tuple[list[Tensor], Tensor]:
    """Tokens [B, L, C] after every autoregressive step, and the pixels [N, H, W, C] uint8."""
    steps: list[Tensor] = []

    def keep(canvas: Canvas, _: Statistics) -> None:
        steps.append(canvas.tokens.cpu().clone())

    batches = pipeline.generate(config, on_step=keep)
    pixels = [torch.from_numpy(image.pixels) for images, _ in batches for image in images]
    return steps, torch.stack(pixels)


def psnr(value: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio of two uint8 images in decibels, at most 99 (no difference)."""
    mse = float((value.double() - reference.double()).square().mean())
    return min(99.0, 10 * math.log10(255**2 / mse)) if mse else 99.0


def decisions_rung(ladder: Ladder) -> Iterator[Result]:
    """Rung 5: accept or reject, each backend with its own drafts and verdicts on one context."""
    if "draft" not in ladder.bundle.manifest.models:
        yield Skipped("decisions", "cspd", "the bundle has no draft model")
        return
    config = ladder.config.model_copy(update={"method": "cspd"})
    play = ladder.reference_pipeline()
    history, masks = [], []
    for done, verdict in verdicts(play, config):
        history.append(canvas_before(done.canvas, verdict.window))
        masks.append(verdict.kept.cpu())
    reference = [decide(play, config, before) for before in history]
    for name, pipeline in ladder.pipelines():
        decided = [decide(pipeline, config, before) for before in history]
        yield from decision_rows(name, decided, reference, masks)


def decide(pipeline: Pipeline, config: RunConfig, canvas: Canvas) -> Decision:
    """Log acceptance ratios and log uniform numbers [B, P] of the round that starts at `canvas`."""
    play, batch = decoder_of(pipeline, config), batch_of(pipeline, config)
    device = torch.device(pipeline.device)
    here = Canvas(canvas.tokens.to(device), canvas.sequence.to(device), list(canvas.known))
    window = play.propose(batch, here, Statistics())
    judged = play.verify(batch, here, window)
    ratio, uniform = weigh(play.sampler, play.options, batch, window, judged)
    return ratio.cpu(), uniform.log().cpu()


def decision_rows(
    name: str, decided: list[Decision], reference: list[Decision], masks: list[Tensor]
) -> Iterator[Row]:
    """Share of flipped decisions with their largest margin, and how far the ratios move."""
    got = _chosen([ratio for ratio, _ in decided], masks)
    expected = _chosen([ratio for ratio, _ in reference], masks)
    uniform = _chosen([numbers for _, numbers in reference], masks)
    flipped = (uniform < got) != (uniform < expected)
    note = f"{int(flipped.sum())} of {len(flipped)} decisions"
    if bool(flipped.any()):
        margin = float((uniform - expected).abs()[flipped].max())
        note += f", none with a margin above {margin:.1e} nats"
    share = float(flipped.double().mean())
    yield Row("decisions", name, "flipped", note, share, MAX_FLIPS, unit="share", note=note)
    stats = measure(got, expected)
    case = f"{len(got)} tokens, log ratios clamped to {LOWEST_LOG_RATIO:.0f}..0"
    yield Row("decisions", name, "log ratio", case, stats.norm, MAX_FLIPS, stats)


def _chosen(values: list[Tensor], masks: list[Tensor]) -> Tensor:
    """The judged entries of all rounds in one row, as far as they matter for a decision."""
    parts = [value[mask] for value, mask in zip(values, masks, strict=True)]
    return torch.cat(parts).clamp(LOWEST_LOG_RATIO, 0)


def precision_rung(ladder: Ladder) -> Iterator[Result]:
    """Rung 6: fp16 and bf16 against fp32, in PyTorch, on the inputs of a real run.

    Counts only for the precision that the bundle is made in; the others say what a rebuild would
    give. The first denoising step is left out, because such a bundle takes it in float32.
    """
    for role, model in ladder.bundle.manifest.models.items():
        for precision in ("fp16", "bf16"):
            modules, gate = ladder.modules(role, precision), precision == model.precision
            for name in ("backbone", "denoiser"):
                label = f"{role}/{name}"
                spec = ladder.bundle.graph(label).spec
                session = TorchSession(spec, modules[name], torch.device(ladder.device))
                for case, inputs in ladder.recorded_cases(label):
                    if "step" in inputs and int(inputs["step"].max()) + 1 == len(
                        inputs["schedule"]
                    ):
                        continue
                    got, expected = call(session, inputs), call(ladder.reference(label), inputs)
                    for output in spec.outputs:
                        stats = measure(got[output.name], expected[output.name])
                        yield Row(
                            "precision", f"{label} {precision}", output.name, case, stats.norm,
                            TOLERANCES[precision], stats, gate=gate,
                        )  # fmt: skip


RUNGS: dict[str, Rung] = {
    "graphs": graphs_rung,
    "backends": backends_rung,
    "trajectory": trajectory_rung,
    "image": image_rung,
    "decisions": decisions_rung,
    "precision": precision_rung,
}
