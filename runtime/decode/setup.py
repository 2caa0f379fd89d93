"""What decoding begins with, from the configuration of a run: its sampler and its batches."""

from __future__ import annotations

import torch

from cspd.engines.manifest import Manifest
from cspd.engines.schedule import make_schedule
from cspd.runtime.config import RunConfig
from cspd.runtime.decode.canvas import Batch
from cspd.runtime.decode.plan import MaskPlan
from cspd.runtime.decode.sampler import Sampler
from cspd.runtime.heads.steps import Annealing, HeadSteps
from cspd.runtime.noise import Noise

# Batches are padded to one of these when byte-identity across batch sizes is not asked for.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def make_sampler(manifest: Manifest, config: RunConfig, device: str) -> Sampler:
    """The shared ground of the decoding methods for `config`."""
    steps, annealing = HeadSteps.parse(config.head_steps), None
    schedule = make_schedule(manifest.schedule, steps.first).to(device)
    if not steps.constant:
        counts = {steps.at(index, config.num_iter) for index in range(config.num_iter)}
        schedules = {n: make_schedule(manifest.schedule, n).to(device) for n in counts}
        annealing = Annealing(steps, schedules)
    plan = MaskPlan(manifest.geometry.num_tokens, config.num_iter, config.cfg, config.cfg_schedule)
    return Sampler(
        plan, schedule, Noise(config.seed, device), config.temperature, config.reproducible,
        annealing=annealing,
    )  # fmt: skip


def make_batch(manifest: Manifest, config: RunConfig, images: list[int], device: str) -> Batch:
    """The `images` of `config`, padded to the batch size, or less if that may depend on them."""
    size = config.batch_size
    if not config.reproducible:
        size = min(b for b in (*BUCKETS, config.batch_size) if b >= len(images))
    labels = [config.label_of(image) for image in images]
    return padded(images, labels, size, manifest.geometry.num_classes, device)


def padded(images: list[int], labels: list[int], size: int, null_label: int, device: str) -> Batch:
    """`images` of the classes `labels`, made `size` by repetitions of the first one."""
    more = size - len(images)
    return Batch(
        torch.tensor(images + images[:1] * more, device=device),
        torch.tensor(labels + labels[:1] * more, device=device), null_label, len(images),
    )  # fmt: skip
