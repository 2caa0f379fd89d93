"""From a bundle and a configuration to images: opens the sessions, walks over batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from cspd.engines.backends import open_session
from cspd.engines.bundle import Bundle
from cspd.engines.cuda_graph import Graphs, GraphStats
from cspd.engines.manifest import Role
from cspd.engines.schedule import make_schedule
from cspd.engines.session import CallStats, EngineSession, TimedSession
from cspd.runtime.adaptive import Speculative
from cspd.runtime.canvas import Batch, Canvas
from cspd.runtime.chain_numbers import ChainNumbers, MakeNumbers
from cspd.runtime.choose import Explained
from cspd.runtime.config import RunConfig, check_config
from cspd.runtime.cspd import CspdOptions, decode_cspd
from cspd.runtime.member import DEFAULT_MEMORY, Head, Member
from cspd.runtime.noise import Noise, RowNoise
from cspd.runtime.open_heads import OpenHeads
from cspd.runtime.plan import MaskPlan
from cspd.runtime.run_heads import RunHeads
from cspd.runtime.sampler import Sampler, decode_alone, ignore_progress
from cspd.runtime.speculation import SpeculationOptions
from cspd.runtime.stats import Statistics, Verdicts
from cspd.runtime.steps import Annealing, HeadSteps

# Batches are padded to one of these when byte-identity across batch sizes is not asked for.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


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
    """Networks of a bundle on one backend. Sessions are opened when first needed, and kept."""

    bundle: Bundle
    backend: str = "onnxruntime"
    device: str = "cpu"
    threads: int = 0
    # What records the denoising loop of engines: CUDA graphs unless given.
    graphs: Graphs | None = None
    # What a run should know: engines that could be better, loops that no CUDA graph holds.
    notes: list[str] = field(default_factory=list)
    # Around what keeps a person waiting before the first image; it is told what that is.
    working: Callable[[str], AbstractContextManager[object]] = contextlib.nullcontext
    _sessions: dict[str, TimedSession] = field(default_factory=dict)

    def session(self, label: str) -> TimedSession:
        """The session of graph `label`."""
        if label not in self._sessions:
            session = open_session(
                self.bundle, label, self.backend, device=self.device, threads=self.threads
            )
            self._sessions[label] = TimedSession(session)
            if isinstance(session, EngineSession):
                self.notes += session.notes
        return self._sessions[label]

    @property
    def calls(self) -> dict[str, CallStats]:
        """Calls and time of every graph since the pipeline was made."""
        return {label: session.stats for label, session in self._sessions.items()}

    @property
    def captures(self) -> dict[str, GraphStats]:
        """How the captured loops of each model ran, see `OpenHeads`; empty without engines."""
        return {name: steps.loop.stats for name, steps in self._heads.loops.items() if steps}

    @cached_property
    def _run_heads(self) -> RunHeads:
        return RunHeads(self)

    @cached_property
    def _heads(self) -> OpenHeads:
        return OpenHeads(self.bundle, self.backend, self.session, self.graphs, self.notes.append)

    def open(self, config: RunConfig) -> None:
        """Open every session that `config` needs."""
        self.members(config)
        self.session("decoder")

    def members(self, config: RunConfig) -> list[Member]:
        """The models that `config` decodes with: target, draft, or target and draft."""
        return [
            Member(role, self.session(f"{role}/backbone"), self.head(role, config))
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

    def plain_head(self, role: Role, memory: int = DEFAULT_MEMORY) -> Head:
        """Every denoising step a call, or the whole loop one; `memory` bytes ahead of the steps."""
        return self._heads.plain(role, memory)

    def speculative_head(
        self, role: Role, options: SpeculationOptions, memory: int = DEFAULT_MEMORY,
        numbers: MakeNumbers = ChainNumbers,
    ) -> Speculative:  # fmt: skip
        """The head in rounds, with `memory` bytes for what it computes ahead of them."""
        return self._heads.speculative(role, options, memory, numbers)

    def has_tables(self, role: Role) -> bool:
        """Whether the heads of `role` can look modulations up, and can do without."""
        return self._heads.has_tables(role)

    def most_rows(self, role: Role) -> int:
        """Rows that fit into one call of speculation."""
        return self.bundle.graph(f"{role}/speculative_round").spec.axes["rows"].max

    @property
    def _channels(self) -> int:
        return self.bundle.manifest.geometry.token_dim

    def record(self, config: RunConfig, wrap: Callable[[Head], Head]) -> None:
        """Decode image 0 of `config` by one model, its head wrapped."""
        member = self.members(config)[0]
        watched = replace(member, head=wrap(member.head))
        decode_alone(self.sampler(config), watched, self._batch(config, [0]), self._channels)

    def generate(
        self,
        config: RunConfig,
        indices: range | list[int] | None = None,
        on_step: Callable[[Canvas, Statistics], None] = ignore_progress,
    ) -> Iterator[tuple[list[GeneratedImage], Statistics]]:
        """Yield the images of `config`, a batch at a time; `indices` limits it to some of them."""
        check_config(config, self.bundle.manifest)
        wanted = list(range(config.num_images) if indices is None else indices)
        sampler, stream = self.sampler(config, on_step), own_stream(self.device)
        for first in range(0, len(wanted), config.batch_size):
            chunk = wanted[first : first + config.batch_size]
            with self._host_threads(), stream():
                canvas, statistics = self._decode(config, sampler, self._batch(config, chunk))
                images = self._images(config, chunk, canvas, statistics)
            if first == 0:
                self._save_caches()
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

    def _save_caches(self) -> None:
        """Keep what engines compiled during the first batch."""
        for timed in self._sessions.values():
            if isinstance(timed.session, EngineSession):
                try:
                    timed.session.save_cache()
                except OSError as error:
                    self.notes.append(f"compiled kernels are not kept: {error}")

    def generate_rows(
        self,
        config: RunConfig,
        rows: list[ImageId],
        on_step: Callable[[Canvas, Statistics], None] = ignore_progress,
    ) -> tuple[list[GeneratedImage], Statistics]:
        """The images `rows`, one batch; seeds and labels are those of `rows`, not of `config`.

        Each is what `generate` makes for its seed. Row k of the canvas is `rows[k]`.
        """
        check_config(config, self.bundle.manifest)
        size = config.batch_size
        padded = list(range(len(rows))) + [0] * (size - len(rows))
        noise = RowNoise([r.seed for r in rows], [r.index for r in rows], self.device)
        batch = Batch(
            torch.tensor(padded, device=self.device),
            torch.tensor([rows[k].label for k in padded], device=self.device),
            self.bundle.manifest.geometry.num_classes,
            len(rows),
        )
        sampler = replace(self.sampler(config, on_step), noise=noise)
        with self._host_threads(), own_stream(self.device)():
            canvas, statistics = self._decode(config, sampler, batch)
            made = self._images(config, list(range(len(rows))), canvas, statistics)
        pairs = zip(made, rows, strict=True)
        return [replace(m, index=row.index, label=row.label) for m, row in pairs], statistics

    def preview(self, canvas: Canvas, row: int) -> np.ndarray:
        """Pixels [H, W, C] uint8 of what is known of one row, unknown tokens being zero."""
        return self._pixels(canvas.tokens[row : row + 1], f"preview of row {row}")[0]

    def sampler(
        self, config: RunConfig, on_step: Callable[[Canvas, Statistics], None] = ignore_progress
    ) -> Sampler:
        """The shared ground of the decoding methods for `config`."""
        manifest = self.bundle.manifest
        steps, annealing = HeadSteps.parse(config.head_steps), None
        schedule = make_schedule(manifest.schedule, steps.first).to(self.device)
        if not steps.constant:
            counts = {steps.at(index, config.num_iter) for index in range(config.num_iter)}
            schedules = {n: make_schedule(manifest.schedule, n).to(self.device) for n in counts}
            annealing = Annealing(steps, schedules)
        plan = MaskPlan(
            manifest.geometry.num_tokens, config.num_iter, config.cfg, config.cfg_schedule
        )
        noise = Noise(config.seed, self.device)
        return Sampler(
            plan, schedule, noise, config.temperature, config.reproducible, on_step,
            annealing=annealing,
        )  # fmt: skip

    def _batch(self, config: RunConfig, chunk: list[int]) -> Batch:
        """The images of `chunk`, padded with repetitions of the first one."""
        size = config.batch_size
        if not config.reproducible:
            size = min(b for b in (*BUCKETS, config.batch_size) if b >= len(chunk))
        padded = chunk + chunk[:1] * (size - len(chunk))
        labels = [config.label_of(image) for image in padded]
        return Batch(
            torch.tensor(padded, device=self.device),
            torch.tensor(labels, device=self.device),
            self.bundle.manifest.geometry.num_classes,
            len(chunk),
        )

    def _decode(
        self, config: RunConfig, sampler: Sampler, batch: Batch
    ) -> tuple[Canvas, Statistics]:
        channels = self._channels
        if config.method == "cspd":
            target, draft = self.members(config)
            options = CspdOptions.of(config)
            return decode_cspd(sampler, target, draft, options, batch, channels)
        return decode_alone(sampler, self.members(config)[0], batch, channels)

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
        session = self.session("decoder")
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
