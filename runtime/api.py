"""The Python entry: `cspd.load` opens a bundle, calling what it returns makes images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from cspd.engines.errors import CspdError
from cspd.engines.machine import check_machine
from cspd.engines.words import speaking
from cspd.runtime import arguments, pipeline
from cspd.runtime.config import Method, RunConfig, check_config, check_padding, make_config
from cspd.runtime.decode.canvas import Canvas
from cspd.runtime.decode.stats import Statistics, Tally
from cspd.runtime.pipeline import GeneratedImage, ImageId
from cspd.runtime.progress import RunProgress, working
from cspd.runtime.result import Images
from cspd.runtime.sessions import Sessions
from cspd.runtime.settings import configure, shipped_bundle, usable_bundle
from cspd.runtime.store.batches import timed, timed_batches
from cspd.runtime.store.distribution import distribution
from cspd.runtime.store.images import to_pillow
from cspd.runtime.store.outputs import image_metadata

MAX_THREADS = 1024
OnStep = Callable[[Canvas, Statistics], None]


@speaking("python")
def load(
    bundle: str | os.PathLike[str] | None = None,
    *,
    backend: str | None = None,
    device: str = "cpu",
    threads: int = 0,
    quiet: bool = False,
) -> Pipeline:
    """The pipeline of the bundle in the folder `bundle`; by default the small pair in the package.

    `backend` is "onnxruntime" (the default), "torch", "tensorrt" or "tensorrt-rtx"; `device` "cpu"
    or "cuda". `threads`, 0..1024, are those of the CPU; 0 means all cores. `quiet` leaves the
    progress bar out. Networks are read, and checked against their hashes, when first needed.

    Raises CspdError if the folder is no bundle, or the backend or device is not available here.
    """
    folder = shipped_bundle() if bundle is None else arguments.path("bundle", bundle)
    device, quiet = arguments.device(device), arguments.switch("quiet", quiet)
    threads = arguments.whole("threads", threads, range(MAX_THREADS + 1))
    opened = usable_bundle(folder)
    name = configure(opened, None, {"backend": backend}).backend
    check_machine(opened, name, device)
    return Pipeline(pipeline.Pipeline(Sessions(opened, name, device, threads)), quiet)


@dataclass(frozen=True)
class Pipeline:
    """A bundle, ready to make images; `load` opens one.

    `networks` is what runs below: models, samplers and sessions, for methods of your own
    (docs/how-to/own-method.md). `quiet` leaves the progress bar out.
    """

    networks: pipeline.Pipeline
    quiet: bool = False

    def __repr__(self) -> str:
        manifest = self.networks.bundle.manifest
        models = ", ".join(f"{role} {model.preset}" for role, model in manifest.models.items())
        return f"<cspd.Pipeline: {models}; {self.networks.backend} on {self.networks.device}>"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; a label is an index into it, or one of the names."""
        return self.networks.bundle.manifest.class_names

    @speaking("python")
    def __call__(
        self,
        labels: int | str | Iterable[int | str],
        *,
        seed: int | Sequence[int] = 0,
        method: Method | None = None,
        callback_on_step: OnStep | None = None,
        quiet: bool | None = None,
        **options: Any,
    ) -> Images:
        """Images of the classes `labels`, one per label: those of `cspd-run generate`, to the byte.

        `labels` are numbers or names, in a list or an array. With one `seed`, 0..2^64-1, image k is
        number k of that seed; a list gives each image a seed of its own, and each is number 0 of
        it, whatever it is made with. One label serves for a whole list of seeds. `options` are the
        other fields of `RunConfig` (num_iter, cfg, gamma, num_images, ...); what is left out is the
        bundle's default. `method` is "target", "draft", "cspd" (Wang et al. 2024, arXiv
        2411.11925), "lossless" or "auto"; see docs/explanation/methods.md.

        `callback_on_step(canvas, statistics)` is called after every autoregressive step of a batch:
        row b of the canvas knows `canvas.known[b]` of its L tokens [B, L, C]; rows beyond the
        images asked for are padding. What it raises ends the run. `quiet` overrides that of `load`.

        Raises CspdError for settings that are wrong or that the bundle cannot run.
        """
        silent = self.quiet if quiet is None else arguments.switch("quiet", quiet)
        takes = "two arguments, canvas and statistics"
        callback = arguments.function("callback_on_step", callback_on_step, takes)
        self.networks.working = partial(working, quiet=silent)
        config, reasons = self.networks.resolve(
            self.settings(labels, seed=seed, method=method, **options)
        )
        self.networks.open(config)
        seeds = _seeds(seed)
        made, tally = self._make(config, seeds, callback, silent)
        notes = [f"{role} head: {explained.reason}" for role, explained in reasons.items()]
        return self._images(config, seeds, made, tally, [*notes, *self.networks.sessions.notes])

    @speaking("python")
    def settings(
        self,
        labels: int | str | Iterable[int | str],
        *,
        seed: int | Sequence[int] = 0,
        method: Method | None = None,
        **options: Any,
    ) -> RunConfig:
        """What a call with these arguments would do, checked; of a list of seeds, the first one."""
        if "backend" in options:
            raise CspdError("backend is an argument of cspd.load, not of a call")
        classes, seeds = arguments.classes(labels), _seeds(seed)
        if seeds and len(classes) == 1:
            options = {"num_images": len(seeds), **options}
        first = seeds[0] if seeds else arguments.seeds(seed)
        asked = {**options, "seed": first, "method": method, "backend": self.networks.backend}
        config = configure(self.networks.bundle, classes, asked)
        check_config(config, self.networks.bundle.manifest)
        check_padding(config)
        if seeds and len(seeds) != config.num_images:
            raise CspdError(
                f"seed is a list of {len(seeds)}, expected one per image: {config.num_images}"
            )
        return config

    @speaking("python")
    def preview(self, canvas: Canvas, row: int = 0) -> Image.Image:
        """Row `row` of a canvas as an image, finished or not; unknown tokens are zero."""
        if not isinstance(canvas, Canvas):
            raise arguments.refusal("canvas", canvas, "what a callback_on_step is called with")
        row = arguments.whole("row", row, range(len(canvas.known)))
        return to_pillow(self.networks.preview(canvas, row))

    def _make(
        self, config: RunConfig, seeds: list[int] | None, callback: OnStep | None, quiet: bool
    ) -> tuple[list[GeneratedImage], Tally]:
        """All images of a run, and what they took together."""
        made: list[GeneratedImage] = []
        total = Tally()
        with RunProgress(config.method, config.num_images, quiet) as progress:

            def on_step(canvas: Canvas, statistics: Statistics) -> None:
                progress.on_step(canvas, statistics)
                if callback is not None:
                    callback(canvas, statistics)

            progress.begin_batch(min(config.batch_size, config.num_images))
            for images, tally in self._batches(config, seeds, on_step):
                made += images
                total.add(tally)
                progress.advance(len(images))
                progress.begin_batch(config.batch_size)
        total.statistics.per_image = [image.verdicts for image in made]
        return made, total

    def _batches(
        self, config: RunConfig, seeds: list[int] | None, on_step: OnStep
    ) -> Iterator[tuple[list[GeneratedImage], Tally]]:
        if seeds is None:
            return timed_batches(self.networks, config, list(range(config.num_images)), on_step)
        rows = [ImageId(seed, 0, config.label_of(k)) for k, seed in enumerate(seeds)]
        parts = [rows[k : k + config.batch_size] for k in range(0, len(rows), config.batch_size)]
        made = (self.networks.generate_rows(config, part, on_step) for part in parts)
        return timed(self.networks, made)

    def _images(
        self,
        config: RunConfig,
        seeds: list[int] | None,
        made: list[GeneratedImage],
        tally: Tally,
        notes: list[str],
    ) -> Images:
        """The result, each image with the settings that make it again."""
        bundle = self.networks.bundle
        own = [config] * len(made)
        if seeds:
            alone = zip(seeds, made, strict=True)
            changes = [{"seed": s, "labels": (m.label,), "num_images": 1} for s, m in alone]
            own = [config.model_copy(update=change) for change in changes]
        return Images(
            images=[to_pillow(image.pixels) for image in made],
            labels=[image.label for image in made],
            class_names=[bundle.manifest.class_names[image.label] for image in made],
            seeds=[settings.seed for settings in own],
            config=config,
            distribution=distribution(config, bundle.manifest),
            stats=tally.statistics,
            seconds=tally.seconds,
            notes=list(dict.fromkeys(notes)),
            metadata=[image_metadata(c, bundle, m) for c, m in zip(own, made, strict=True)],
        )


def _seeds(seed: int | Sequence[int]) -> list[int] | None:
    """The seeds of a list, checked; None if there is one for all images."""
    found = arguments.seeds(seed)
    if isinstance(found, int):
        return None
    return [make_config(labels=(0,), num_images=1, seed=each).seed for each in found]
