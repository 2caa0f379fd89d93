"""What would stop a run, looked at before anything is opened, and the plan of the run."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from textwrap import wrap

from cspd.engines.atomic import check_folder, free_disk
from cspd.engines.bundle import Bundle
from cspd.engines.console.commands import human_bytes, human_seconds
from cspd.engines.console.preflight import Check, check_disk, check_memory, problems
from cspd.engines.errors import CspdError
from cspd.engines.machine import machine_checks
from cspd.engines.spec import Record
from cspd.runtime.commands.estimate import image_seconds
from cspd.runtime.config import RunConfig, check_padding, computed_images
from cspd.runtime.scale.local_ray import import_ray
from cspd.runtime.store.formats import Layout
from cspd.runtime.store.ownership import IMAGES

WIDTH = 80  # of lines for people
COMPRESSED = 0.6  # size of a photograph's PNG against its pixels
SETTINGS_BYTES = 1500  # of an image: its settings inside it, and its line


class Plan(Record):
    """What a run would take, without the images that are there already.

    Sizes are estimates: images as PNG, weights once. So are seconds, see `estimate`; None on GPUs.
    """

    models: tuple[str, ...]
    graphs: tuple[str, ...]
    images: int
    batches: int
    autoregressive_steps: int
    denoising_steps: int | str
    estimated_disk_bytes: int
    estimated_memory_bytes: int
    estimated_seconds: float | None
    problems: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """The plan for people."""
        lines = [
            f"models: {', '.join(self.models)}",
            f"graphs to choose from: {', '.join(self.graphs)}",
            f"{self.images} images in {self.batches} batches, "
            f"{self.autoregressive_steps} autoregressive steps of {self.denoising_steps} "
            "denoising steps",
            f"estimated: {human_bytes(self.estimated_disk_bytes)} of disk, at least "
            f"{human_bytes(self.estimated_memory_bytes)} of memory, {self._time}",
        ]
        short = [part for line in lines for part in wrap(line, WIDTH, subsequent_indent="  ")]
        return [*short, *(f"problem: {problem}" for problem in self.problems)]

    @property
    def _time(self) -> str:
        if self.estimated_seconds is None:
            return "time unknown: measured on single CPUs only"
        return f"{human_seconds(self.estimated_seconds)} within a factor of two"


def make_plan(
    bundle: Bundle, config: RunConfig, out: Path, *, layout: Layout, device: str, threads: int,
    on_ray: bool,
) -> Plan:  # fmt: skip
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
    missing = _missing(config, out)
    disk = missing * _image_bytes(bundle)
    seconds = None if on_ray else image_seconds(bundle, config, device, threads)
    fewer = "choose another --out or fewer --num-images"
    other = "end other programs, or run on a larger machine"
    checks: list[Check] = [
        partial(check_folder, out),
        layout.check,
        partial(check_padding, config),
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
        estimated_seconds=None if seconds is None else computed_images(config, missing) * seconds,
        problems=tuple(problems(checks)),
    )  # fmt: skip


def _missing(config: RunConfig, out: Path) -> int:
    """How many images `out` lacks."""
    made = 0
    with contextlib.suppress(OSError):
        made = (out / IMAGES).read_bytes().count(b"\n")
    return max(0, config.num_images - made)


def _image_bytes(bundle: Bundle) -> int:
    geometry = bundle.manifest.geometry
    pixels = geometry.image_channels * geometry.image_size**2
    return int(pixels * COMPRESSED) + SETTINGS_BYTES


def require(plan: Plan) -> None:
    """Raise CspdError with the first problem of `plan`, if it has one."""
    if plan.problems:
        raise CspdError(plan.problems[0])
