"""What a benchmark runs: one point per setting, named after the tables and figures it serves.

The tables and figures are those of the paper on continuous speculative decoding (arXiv 2411.11925),
with the baselines beside them that it leaves out.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from cspd.engines.manifest import Manifest
from cspd.engines.spec import Record
from cspd.runtime.config import AS_RELEASED, RunConfig, make_config
from cspd.runtime.costs.sizes import DEFAULT_WINDOW
from cspd.runtime.decode.options import CspdOptions
from cspd.runtime.decode.plan import MaskPlan
from cspd.tools.settings import setting_name

GAMMAS = (4, 8, 16, 32)
PREFILLS = (0.0, 0.05, 0.15)
TEMPERATURES = (0.9, 0.95, 1.0, 1.05, 1.1)
TRIES = (1, 3, 10, 30, 100)
COMPILED = "torch.compile"
# Options that change the numbers of a run but neither its graphs nor, by much, their sizes.
NUMBERS = (
    "labels", "num_images", "class_balanced", "seed", "cfg", "cfg_schedule", "temperature",
    "prefill", "accept_temperature", "align",
)  # fmt: skip
CSPD_OPTIONS = ("gamma", "verify", "on_reject")


class Point(Record):
    """One setting to measure, `repeats` batches of it.

    `serves` names the tables and figures that show it; with `quality` its images are kept and
    scored. `backend` is a backend of the toolkit or "torch.compile".
    """

    id: str
    config: RunConfig
    backend: str
    repeats: int
    quality: bool = False
    serves: tuple[str, ...] = ()

    @property
    def warm_key(self) -> str:
        """Points of one key do the same work, with other numbers, and share their warm-up."""
        work = self.config.model_dump(mode="json", exclude=set(NUMBERS))
        if self.config.method != "cspd":
            work = {name: value for name, value in work.items() if name not in CSPD_OPTIONS}
        guided = self.config.cfg != 1
        return json.dumps([self.backend, guided, work], sort_keys=True)


@dataclass(frozen=True)
class Scale:
    """How much is measured: batches per point, images behind a quality figure, batch sizes.

    `peers` are backends that the target is also run on; `steps` the settings per swept option.
    """

    repeats: int = 3
    quality_images: int = 1000
    batch_sizes: tuple[int, ...] = (1, 10, 50)
    peers: tuple[str, ...] = ("torch", COMPILED)
    steps: int = 5

    @classmethod
    def quick(cls) -> Scale:
        """Under two minutes on the shipped pair: speed and acceptance only."""
        return cls(repeats=1, quality_images=0, batch_sizes=(1, 4), peers=("torch",), steps=2)


def make_plan(manifest: Manifest, base: dict[str, Any], scale: Scale) -> list[Point]:
    """All points for a bundle; `base` holds options that every point shares (seed, backend, ...).

    Settings that coincide are one point that serves several tables.
    """
    return _Planner(manifest, base, scale).points()


def reference_batch(scale: Scale) -> int:
    """The batch size of everything but the sweep over batch sizes: the middle one."""
    return sorted(scale.batch_sizes)[len(scale.batch_sizes) // 2]


def titles(points: list[Point]) -> dict[str, str]:
    """What to call each point of a plan, by its id: "cspd, gamma 8, batch 4".

    Options are named where they differ from those of the first point, the reference.
    """
    return {point.id: _title(point, points[0]) for point in points}


def _title(point: Point, main: Point) -> str:
    same = point.config.num_iter == main.config.num_iter
    ignored = ("batch_size", "backend", *(["num_iter"] if same else []))
    name = setting_name(point.config, main.config, ignored)
    backend = "" if point.backend == main.backend else f", {point.backend}"
    return f"{name}, batch {point.config.batch_size}{backend}"


def plan_hash(points: list[Point]) -> str:
    """Identity of a plan: results of another plan are not mixed with it."""
    text = json.dumps([point.model_dump(mode="json") for point in points], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _Planner:
    """Collects points; the same setting asked for twice is one point."""

    def __init__(self, manifest: Manifest, base: dict[str, Any], scale: Scale) -> None:
        self.manifest, self.scale = manifest, scale
        self.length = manifest.geometry.num_tokens
        self.batch = reference_batch(scale)
        classes = tuple(range(manifest.geometry.num_classes))
        # The paper's figures are about as many autoregressive steps as there are tokens.
        usual = {**manifest.defaults, "num_iter": self.length}
        self.base: dict[str, Any] = {"labels": classes, **usual, **base}
        self.full = min(int(self.base["num_iter"]), self.length)
        self.found: dict[str, Point] = {}
        self.paired = "draft" in manifest.models

    def points(self) -> list[Point]:
        self._baselines()
        if self.paired:
            self._speed()
            self._sweeps()
        self._peers()
        return list(self.found.values())

    def add(
        self, serves: str, method: str, *, quality: bool = False, backend: str | None = None,
        **changes: Any,
    ) -> None:  # fmt: skip
        """Ask for a setting on behalf of the table or figure `serves`."""
        size = changes.get("batch_size", self.batch)
        quality = quality and self.scale.quality_images > 0
        repeats = -(-self.scale.quality_images // size) if quality else self.scale.repeats
        values = {**self.base, "batch_size": size, **changes, "method": method}
        config = make_config(**values, num_images=repeats * size)
        backend = backend or config.backend
        same = config.model_dump(mode="json", exclude={"num_images", "labels"})
        name = _name(config, backend, same)
        known = self.found.get(name)
        if known is not None:
            quality, repeats = quality or known.quality, max(repeats, known.repeats)
            config = make_config(**{**values, "num_images": repeats * size})
        tags = known.serves if known else ()
        tags = tags if serves in tags else (*tags, serves)
        self.found[name] = Point(
            id=name, config=config, backend=backend, repeats=repeats, quality=quality, serves=tags
        )

    def _baselines(self) -> None:
        """The rows of the README: every method beside the honest baselines."""
        self.add("main", "target", quality=True)
        self.add("readme", "target", quality=True)
        # 64 of 256 is what users compare with; a quarter is its equivalent for other models.
        self.add("readme", "target", quality=True, num_iter=max(1, self.full // 4))
        for part in (1, 2, 4, 8):
            self.add("pareto", "target", quality=True, num_iter=max(1, self.full // part))
        if "speculative_round" in self.manifest.models["target"].graphs:
            # Speculation as such: without a window, costs may choose stepping.
            for table in ("readme", "pareto"):
                self.add(table, "lossless", quality=True, window=DEFAULT_WINDOW)
            self.add("readme", "lossless", quality=True)
        if self.paired:
            self.add("readme", "draft", quality=True)
            self.add("pareto", "draft", quality=True)
            self.add("readme", "cspd", quality=True)
            self.add("readme", quality=True, **AS_RELEASED)
            # The paper's algorithm 1: several times slower, so that it is timed only.
            self.add("readme", "cspd", verify="prefix")
            self.add("readme", "target", quality=True, num_iter=self._equal_calls())
            for method in ("target", "cspd"):
                self.add("table 2", method, quality=True)
                self.add("table 2", method, quality=True, cfg=1.0)

    def _equal_calls(self) -> int:
        """Autoregressive steps of a target with as many calls as `cspd` makes."""
        config = make_config(**{**self.base, "method": "cspd", "num_images": 1})
        # With parallel verification, whatever is accepted.
        return CspdOptions.of(config).windows(MaskPlan(self.length, config.num_iter)).target_rounds

    def _speed(self) -> None:
        """Table 1 and figure 8: speed ratio and acceptance against gamma and batch size."""
        for size in self.scale.batch_sizes:
            self.add("table 1", "target", batch_size=size)
            for gamma in GAMMAS:
                if gamma <= self.length:
                    self.add("table 1", "cspd", batch_size=size, gamma=gamma)
        for gamma in GAMMAS:
            if gamma <= self.length:
                self.add("figure 8", "cspd", gamma=gamma)
                self.add("pareto", "cspd", gamma=gamma, quality=True)

    def _sweeps(self) -> None:
        """Tables 3 and 4, figures 11, 13 and 14: alignment, prefill, guidance, temperature."""
        self.add("figure 11", "cspd")
        for align in (True, False):
            self.add("table 3", "cspd", align=align)
        for prefill in PREFILLS:
            self.add("table 4", "cspd", prefill=prefill)
        for cfg in _thinned((1.0, 1.5, 2.0, 3.0, 4.0), self.scale.steps):
            self.add("figure 13", "cspd", cfg=cfg)
        for temperature in _thinned(TEMPERATURES, self.scale.steps):
            self.add("figure 14", "cspd", temperature=temperature)

    def _peers(self) -> None:
        """The target, and the pair, in PyTorch on the same device."""
        self.add("peers", "target")
        for backend in self.scale.peers:
            self.add("peers", "target", backend=backend)
            if self.paired:
                self.add("peers", "cspd", backend=backend)


def _thinned(values: tuple[float, ...], count: int) -> list[float]:
    """`count` of `values`, both ends among them."""
    last = len(values) - 1
    return sorted({values[round(i * last / max(count - 1, 1))] for i in range(count)})


def _name(config: RunConfig, backend: str, identity: dict[str, Any]) -> str:
    """A readable, unique name of a setting."""
    parts = [config.method, f"i{config.num_iter}", f"b{config.batch_size}"]
    parts += [f"g{config.gamma}"] if config.method == "cspd" else []
    digest = hashlib.sha256(json.dumps([identity, backend], sort_keys=True).encode()).hexdigest()
    return "-".join([*parts, backend, digest[:8]])
