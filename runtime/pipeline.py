"""From a configuration to images: walks over batches, decodes them, makes pixels of tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from cspd.engines.bundle import Bundle
from cspd.engines.manifest import Role
from cspd.engines.sessions.cuda_graph import Graphs
from cspd.runtime.config import RunConfig, check_config
from cspd.runtime.costs.choose import Explained
from cspd.runtime.costs.run_heads import RunHeads
from cspd.runtime.decode.alone import Alone
from cspd.runtime.decode.canvas import Batch, Canvas
from cspd.runtime.decode.cspd import Speculative
from cspd.runtime.decode.decoder import Decoder, OnRound, decode, ignore_progress
from cspd.runtime.decode.member import Member
from cspd.runtime.decode.options import CspdOptions
from cspd.runtime.decode.sampler import Sampler
from cspd.runtime.decode.setup import make_batch, make_sampler, padded
from cspd.runtime.decode.stats import Statistics, Verdicts
from cspd.runtime.heads.base import Head
from cspd.runtime.heads.open_heads import OpenHeads
from cspd.runtime.noise import RowNoise
from cspd.runtime.noise_table import TabledNoise
from cspd.runtime.sessions import Sessions


@dataclass(frozen=True)
class GeneratedImage:
    """One image: `pixels` [H, W, C] uint8, its index and class, the fate of its drafted tokens."""

    index: int
    label: int
    pixels: np.ndarray
    verdicts: Verdicts


@dataclass(frozen=True)
class ImageId:
    """Which image: number `index` of `seed`, of class `label`."""

    seed: int
    index: int
    label: int


@dataclass
class Pipeline:
    """Makes images with the networks that `sessions` opens."""

    sessions: Sessions
    # What records calls on a GPU: CUDA graphs unless given. And whether: see OpenHeads.
    graphs: Graphs | None = None
    record: bool | None = None
    # Around what keeps a person waiting before the first image; it is told what that is.
    working: Callable[[str], AbstractContextManager[object]] = contextlib.nullcontext

    @property
    def bundle(self) -> Bundle:
        """The bundle whose networks these are."""
        return self.sessions.bundle

    @property
    def backend(self) -> str:
        """What runs the networks."""
        return self.sessions.backend

    @property
    def device(self) -> str:
        """Where they run."""
        return self.sessions.device

    @cached_property
    def heads(self) -> OpenHeads:
        """The heads of the models, by what they are made of."""
        return OpenHeads(self.sessions, self.graphs, self.record)

    @cached_property
    def _run_heads(self) -> RunHeads:
        return RunHeads(self.heads, lambda what: self.working(what))

    def open(self, config: RunConfig) -> None:
        """Open every session that `config` needs."""
        self.members(config)
        self.sessions("decoder")

    def members(self, config: RunConfig) -> list[Member]:
        """The models that `config` decodes with: target, draft, or target and draft."""
        return [
            Member(role, self.heads.backbone(role), self.head(role, config))
            for role in self._roles(config)
        ]

    def _roles(self, config: RunConfig) -> list[Role]:
        roles: dict[str, list[Role]] = {"cspd": ["target", "draft"], "draft": ["draft"]}
        return roles.get(config.method, ["target"])

    def head(self, role: Role, config: RunConfig) -> Head:
        """How `role` samples tokens from their conditions."""
        return self._run_heads.head(role, config)

    def resolve(self, config: RunConfig) -> tuple[RunConfig, dict[Role, Explained]]:
        """`config` with what measured costs choose written down, and why; see `RunHeads`."""
        return self._run_heads.resolve(config, self._roles(config))

    def generate(
        self,
        config: RunConfig,
        indices: range | list[int] | None = None,
        on_step: OnRound = ignore_progress,
    ) -> Iterator[tuple[list[GeneratedImage], Statistics]]:
        """Yield the images of `config`, a batch at a time; `indices` limits it to some of them."""
        check_config(config, self.bundle.manifest)
        wanted = list(range(config.num_images) if indices is None else indices)
        # Once, so that one run has one head even where measured costs choose it.
        settled, _ = self.resolve(config)
        sampler = self.sampler(config)
        for first in range(0, len(wanted), config.batch_size):
            chunk = wanted[first : first + config.batch_size]
            with self._host_threads(), self._stream():
                batch = make_batch(self.bundle.manifest, config, chunk, self.device)
                decoder = self.decoder(settled, self._tabled(sampler, batch))
                canvas, statistics = decode(decoder, batch, on_step)
                images = self._images(config, chunk, canvas, statistics)
            if first == 0:
                self.sessions.save_caches()
            yield images, statistics

    @contextlib.contextmanager
    def _host_threads(self) -> Iterator[None]:
        """One thread for PyTorch where another library runs the networks on the CPU.

        What is left to PyTorch there is small: waking its threads took a tenth of the time.
        """
        threads = torch.get_num_threads()
        if self.backend == "onnxruntime" and self.device == "cpu":
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def generate_rows(
        self,
        config: RunConfig,
        rows: list[ImageId],
        on_step: OnRound = ignore_progress,
    ) -> tuple[list[GeneratedImage], Statistics]:
        """The images `rows`, one batch; seeds and labels are those of `rows`, not of `config`.

        Each is what `generate` makes for its seed. Row k of the canvas is `rows[k]`.
        """
        check_config(config, self.bundle.manifest)
        numbers, labels = list(range(len(rows))), [row.label for row in rows]
        classes = self.bundle.manifest.geometry.num_classes
        batch = padded(numbers, labels, config.batch_size, classes, self.device)
        noise = RowNoise([r.seed for r in rows], [r.index for r in rows], self.device)
        sampler = replace(self.sampler(config), noise=noise)
        with self._host_threads(), self._stream():
            decoder = self.decoder(config, self._tabled(sampler, batch))
            canvas, statistics = decode(decoder, batch, on_step)
            made = self._images(config, numbers, canvas, statistics)
        pairs = zip(made, rows, strict=True)
        return [replace(m, index=row.index, label=row.label) for m, row in pairs], statistics

    def preview(self, canvas: Canvas, row: int) -> np.ndarray:
        """Pixels [H, W, C] uint8 of what is known of one row, unknown tokens being zero."""
        return self._pixels(canvas.tokens[row : row + 1], f"preview of row {row}")[0]

    def sampler(self, config: RunConfig) -> Sampler:
        """The shared ground of the decoding methods for `config`."""
        return make_sampler(self.bundle.manifest, config, self.device)

    def decoder(self, config: RunConfig, sampler: Sampler | None = None) -> Decoder:
        """The method of `config` with its models; `sampler` takes the place of the usual one."""
        sampler = sampler or self.sampler(config)
        channels = self.bundle.manifest.geometry.token_dim
        member, *others = self.members(config)
        if config.method == "cspd":
            return Speculative(sampler, member, others[0], CspdOptions.of(config), channels)
        return Alone(sampler, member, channels)

    @cached_property
    def _stream(self) -> Callable[[], AbstractContextManager[object]]:
        return own_stream(self.device)

    def _tabled(self, sampler: Sampler, batch: Batch) -> Sampler:
        """`sampler` with the numbers of `batch` drawn at once, on a GPU."""
        if torch.device(self.device).type != "cuda":
            return sampler
        tables = TabledNoise(sampler.noise, batch.images, sampler.plan.num_tokens)
        return replace(sampler, noise=tables)

    def _images(
        self, config: RunConfig, chunk: list[int], canvas: Canvas, statistics: Statistics
    ) -> list[GeneratedImage]:
        arrays = self._pixels(canvas.tokens, f"images {chunk[0]}..{chunk[-1]}")
        verdicts = statistics.per_image or [Verdicts() for _ in chunk]
        return [
            GeneratedImage(image, config.label_of(image), arrays[row], verdicts[row])
            for row, image in enumerate(chunk)
        ]

    def _pixels(self, tokens: torch.Tensor, what: str) -> np.ndarray:
        """Pixels [B, H, W, C] uint8 of tokens [B, L, C]."""
        grid = self.bundle.manifest.geometry.grid
        latents = tokens.transpose(1, 2).unflatten(2, (grid, grid)).contiguous()
        session = self.sessions("decoder")
        parts = []
        for piece in latents.split(session.spec.axes["batch"].max):
            outputs = session(latents=piece)
            session.spec.check_finite(outputs, what)
            pixels = outputs["images"].add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
            parts.append(pixels.permute(0, 2, 3, 1).cpu())
        return torch.cat(parts).numpy()


def own_stream(device: str) -> Callable[[], AbstractContextManager[object]]:
    """Makes contexts in which CUDA work is queued on one stream that is not the default one.

    TensorRT synchronises more than it has to on that. Elsewhere they do nothing.
    """
    if torch.device(device).type != "cuda":
        return contextlib.nullcontext
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return lambda: torch.cuda.stream(stream)
