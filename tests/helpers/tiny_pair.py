"""The golden tiny model as a pair: the authors' weights as target, a disturbed copy as draft."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from recorded import TINY, tiny_state
from torch import Tensor

from cspd.engines.manifest import Geometry
from cspd.engines.schedule import ScheduleSpec
from cspd.engines.sessions.session import TorchSession
from cspd.export.build import BuildOptions, BundlePlan, Source, build_bundle
from cspd.export.graphs.networks import model_graphs
from cspd.export.mar.assemble import assemble_mar
from cspd.export.pairs import imagenet_classes
from cspd.runtime.decode.canvas import Batch
from cspd.runtime.decode.member import Member
from cspd.runtime.heads.base import Head
from cspd.runtime.heads.plain import LoopHead, StepHead

# The tiny weights diverge on the official first step t = 999; clipped, tokens stay near unit size.
CLIPPED = ScheduleSpec(clip_timesteps=950)
# Enough to have some drafted tokens accepted and some rejected.
DISTURBANCE = 0.01


def draft_state() -> dict[str, Tensor]:
    """Weights of the draft: every number of the target's off by about one percent."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: tensor * (1 + DISTURBANCE * torch.randn(tensor.shape, generator=generator))
        for name, tensor in tiny_state().items()
    }


def tiny_plan() -> BundlePlan:
    """A pixel-space bundle of the pair: 16 tokens of 4 x 4 pixels."""
    states = {"target": tiny_state(), "draft": draft_state()}
    return BundlePlan(
        models={
            role: Source(f"tiny-{role}", state, "model_ema", _sha256(state), TINY)
            for role, state in states.items()
        },
        decoder=None,
        geometry=Geometry(
            grid=4, token_dim=16, num_classes=1000, image_channels=1, image_size=16
        ),
        class_names=imagenet_classes(),
        schedule=CLIPPED,
        options=BuildOptions(max_batch=16, max_rows=512),
        defaults={"num_iter": 6, "head_steps": 10, "cfg": 3.0},
    )  # fmt: skip


def build_tiny(out: Path, report: Callable[[str], None] = print) -> Path:
    """Build the bundle of `tiny_plan` at `out`."""
    return build_bundle(tiny_plan(), out, report=report)


def torch_member(role: str, head: str = "denoiser_loop", state: dict | None = None) -> Member:
    """Target or draft of the pair in PyTorch, without a bundle."""
    if state is None:
        state = tiny_state() if role == "target" else draft_state()
    graphs = model_graphs(assemble_mar(TINY, state, "fp32"), 64, 512)
    sessions = {
        name: TorchSession(spec, module, torch.device("cpu"))
        for name, (module, spec) in graphs.items()
        if name in ("backbone", head)
    }
    return Member(role, sessions["backbone"], make_head(sessions[head]))


def make_head(session) -> Head:
    """The way to sample tokens that fits `session`."""
    return LoopHead(session) if session.spec.name == "denoiser_loop" else StepHead(session)


def make_batch(images: list[int], labels: list[int] | None = None) -> Batch:
    """A batch of `images`, by default of the golden classes in turn."""
    labels = labels or [(3, 417)[image % 2] for image in images]
    return Batch(torch.tensor(images), torch.tensor(labels), 1000, len(images))


def _sha256(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(state[name].numpy().tobytes())
    return digest.hexdigest()
