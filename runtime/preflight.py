"""What would stop a run, looked at before anything is opened, and the plan of the run."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path

from cspd.engines.atomic import free_disk
from cspd.engines.bundle import Bundle
from cspd.engines.commands import human_bytes
from cspd.engines.errors import CspdError
from cspd.engines.machine import machine_checks
from cspd.engines.preflight import Check, check_disk, check_memory, problems
from cspd.engines.spec import Record
from cspd.runtime.config import RunConfig
from cspd.runtime.folder import IMAGES
from cspd.runtime.formats import Layout
from cspd.runtime.local_ray import import_ray

COMPRESSED = 0.6  # size of a photograph's PNG against its pixels
SETTINGS_BYTES = 1500  # of an image: its settings inside it, and its line


class Plan(Record):
    """What a run would take. Sizes are estimates: images as PNG, weights once."""

    models: tuple[str, ...]
    graphs: tuple[str, ...]
    images: int
    batches: int
    autoregressive_steps: int
    denoising_steps: int | str
    estimated_disk_bytes: int
    estimated_memory_bytes: int
    problems: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """The plan for people."""
        return [
            f"models: {', '.join(self.models)}; graphs to choose from: {', '.join(self.graphs)}",
            f"{self.images} images in {self.batches} batches, "
            f"{self.autoregressive_steps} autoregressive steps of {self.denoising_steps} "
            "denoising steps",
            f"estimated: {human_bytes(self.estimated_disk_bytes)} of disk, "
            f"{human_bytes(self.estimated_memory_bytes)} of memory at least; time is not estimated",
            *(f"problem: {problem}" for problem in self.problems),
        ]


def make_plan(
    bundle: Bundle, config: RunConfig, out: Path, *, layout: Layout, device: str, on_ray: bool
) -> Plan:
    """The plan of `config`, which `check_config` passed, and everything that is known to stop it.

    Opens and writes nothing.
    """
    manifest = bundle.manifest
    roles = {"cspd": ("draft", "target"), "draft": ("draft",)}.get(config.method, ("target",))
    models = {role: model for role, model in manifest.models.items() if role in roles}
    graphs = [
        label for label in manifest.graphs() if label == "decoder" or label.split("/")[0] in models
    ]
    weights = {name for m in models.values() for name in (m.weights, m.first_weights) if name}
    memory = sum(manifest.files[name].bytes for name in weights)
    disk = _disk(bundle, config, out)
    fewer = "choose another --out or fewer --num-images"
    other = "end other programs, or run on a larger machine"
    checks: list[Check] = [
        layout.check,
        # With Ray, the device and the libraries are on its nodes.
        *((import_ray,) if on_ray else machine_checks(bundle, config.backend, device)),
        partial(check_disk, f"{out}: the images take", disk, free_disk(out), fewer),
    ]
    checks += [] if on_ray else [partial(check_memory, "the weights alone take", memory, other)]
    return Plan(
        models=tuple(f"{role} {model.preset}" for role, model in models.items()),
        graphs=tuple(graphs), images=config.num_images,
        batches=-(-config.num_images // config.batch_size),
        autoregressive_steps=config.num_iter, denoising_steps=config.head_steps,
        estimated_disk_bytes=disk, estimated_memory_bytes=memory,
        problems=tuple(problems(checks)),
    )  # fmt: skip


def _disk(bundle: Bundle, config: RunConfig, out: Path) -> int:
    """Bytes that the images which `out` lacks take."""
    made = 0
    with contextlib.suppress(OSError):
        made = (out / IMAGES).read_bytes().count(b"\n")
    geometry = bundle.manifest.geometry
    pixels = geometry.image_channels * geometry.image_size**2
    return max(0, config.num_images - made) * (int(pixels * COMPRESSED) + SETTINGS_BYTES)


def require(plan: Plan) -> None:
    """Raise CspdError with the first problem of `plan`, if it has one."""
    if plan.problems:
        raise CspdError(plan.problems[0])
