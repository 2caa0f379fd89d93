"""Build a bundle: weights in, exported and verified graphs out, published in one rename."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file
from torch import Tensor, nn

from cspd.engines.atomic import atomic_file
from cspd.engines.bundle import MANIFEST, Bundle, check_target, open_bundle, publish, record_files
from cspd.engines.errors import CspdError
from cspd.engines.manifest import Geometry, GraphRecord, Manifest, ModelRecord, Precision, Role
from cspd.engines.schedule import AnySchedule, make_schedule
from cspd.engines.trt.options import BuildOptions as EngineOptions
from cspd.engines.trt.progress import ProgressCallback
from cspd.export.build_graph import FinishedGraph, GraphBuilder, ShowProgress, intact_files
from cspd.export.graphs.denoiser import PixelDecoder, decoder_spec
from cspd.export.graphs.networks import EXACT, model_graphs, with_tolerance
from cspd.export.image_effect import with_image_effects
from cspd.export.mar.assemble import assemble_mar, assemble_vae
from cspd.export.mar.presets import MarConfig
from cspd.export.onnx.trace import OPSET
from cspd.export.weights.values import check_values

KEY = "build.key"
WEIGHTS = "weights.safetensors"
FIRST_WEIGHTS = "first.safetensors"
VERIFY_STEPS = 10
LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime")
NOT_WRITTEN = "build with another --precision, or get the weights again"


@dataclass(frozen=True)
class Source:
    """Where the weights of one network come from: `state`, or what makes it when it is needed."""

    preset: str
    state: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]
    origin: str  # "model_ema", "safetensors", "random", ...
    sha256: str | None = None
    config: MarConfig | None = None

    def weights(self) -> Mapping[str, Tensor]:
        """Tensors by name."""
        return self.state() if callable(self.state) else self.state


@dataclass(frozen=True)
class BuildOptions:
    """Ranges and number formats of the graphs, and the engines to build from them."""

    max_batch: int = 16
    max_rows: int = 1024
    precision: Precision = "fp32"
    # Number format of the weights on disk when it differs from that of the computation.
    storage: Literal["fp16"] | None = None
    engines: tuple[EngineOptions, ...] = ()
    # Beside engines, also the graphs that look modulations up.
    hoisted: bool = True

    def __post_init__(self) -> None:
        for name, low, high in (("max_batch", 1, 4096), ("max_rows", 1, 1 << 20)):
            value = getattr(self, name)
            if not low <= value <= high:
                option = "--" + name.replace("_", "-")
                raise CspdError(f"{option} is {value}, expected {low}..{high}")


@dataclass(frozen=True)
class BundlePlan:
    """Everything that goes into a bundle. `decoder` is None for pixel-space models."""

    models: Mapping[Role, Source]
    decoder: Source | None
    geometry: Geometry
    class_names: tuple[str, ...]
    schedule: AnySchedule
    options: BuildOptions
    defaults: Mapping[str, float | int | str]

    @property
    def synthetic(self) -> bool:
        """Whether any weights are random."""
        sources = [*self.models.values(), *([self.decoder] if self.decoder else [])]
        return any(source.origin == "random" for source in sources)

    def key(self) -> str:
        """Identity of this build: a staging folder of another build is not continued."""
        sources = {name: (s.preset, s.origin, s.sha256) for name, s in self.models.items()}
        decoder = (self.decoder.origin, self.decoder.sha256) if self.decoder else None
        parts = [sources, decoder, asdict(self.options), self.schedule.model_dump(), _libraries()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@contextlib.contextmanager
def no_progress(name: str) -> Iterator[ProgressCallback]:
    """The progress bar that shows nothing."""
    yield lambda fraction, phase: None


def build_bundle(
    plan: BundlePlan,
    out: Path,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda line: None,
    show: ShowProgress = no_progress,
    summary: Callable[[Mapping[str, FinishedGraph]], None] = lambda finished: None,
) -> Path:
    """Export, verify and publish the bundle of `plan` at `out`; `report` gets a line per piece.

    `summary` gets every graph with its costs in the end, also those that an earlier run made.
    An old bundle at `out` is untouched until the new one is complete. An interrupted build of the
    same plan resumes where it was. Raises CspdError if a graph differs from PyTorch by more than
    its contract allows.
    """
    check_target(out, overwrite)
    check_pair(plan)
    check_weights(plan)
    staging = _staging(plan, out)
    manifest = _complete(staging)
    if manifest is None:
        schedule = make_schedule(plan.schedule, VERIFY_STEPS)
        builder = GraphBuilder(staging, schedule, plan.options.engines, report, show)
        models = {
            role: _build_model(builder, role, source, plan.options)
            for role, source in plan.models.items()
        }
        manifest = _manifest(plan, models, _build_decoder(builder, plan), staging)
        if plan.options.precision != "fp32":
            manifest = with_image_effects(
                Bundle(staging, manifest),
                {role: source.weights for role, source in plan.models.items()},
                plan.decoder.weights if plan.decoder else None,
            )
        with atomic_file(staging / MANIFEST) as file:
            file.write(manifest.model_dump_json(indent=1).encode() + b"\n")
        summary(builder.finished)
    _remove_unlisted(staging, manifest)
    publish(staging, out, overwrite)
    # Last, so that a build killed before it still knows the finished folder for its own.
    (out / KEY).unlink(missing_ok=True)
    return out


def _complete(staging: Path) -> Manifest | None:
    """The manifest of a build that was killed between its last graph and its publication."""
    if not (staging / MANIFEST).is_file():
        return None
    manifest = open_bundle(staging).manifest
    return manifest if intact_files(staging, manifest.files) else None


def check_pair(plan: BundlePlan) -> None:
    """Raise CspdError unless draft and target see the same tokens and classes."""
    target, draft = plan.models["target"], plan.models.get("draft")
    if target.config is None or draft is None or draft.config is None:
        return
    for field in ("grid", "token_dim", "num_classes"):
        got, expected = getattr(draft.config, field), getattr(target.config, field)
        if got != expected:
            raise CspdError(
                f"draft {draft.preset}: {field} is {got}, the target {target.preset} has "
                f"{expected}; a pair must share grid, token size and classes"
            )


def check_weights(plan: BundlePlan) -> None:
    """Raise CspdError unless all given weights are finite floating-point numbers.

    Weights that a function makes are looked at when they are written.
    """
    for role, source in (*plan.models.items(), ("decoder", plan.decoder)):
        if source is not None and not callable(source.state):
            check_values(source.state, f"{role} {source.preset}")


def staging_of(out: Path) -> Path:
    """Where the bundle `out` is while it is built."""
    return out.parent / f".{out.name}.building"


def _staging(plan: BundlePlan, out: Path) -> Path:
    """Folder of this build beside `out`; emptied if another build left it."""
    staging = staging_of(out)
    key = staging / KEY
    if staging.exists() and not (key.is_file() and key.read_text() == plan.key()):
        shutil.rmtree(staging)
    if not staging.exists():
        try:
            staging.mkdir(parents=True)
        except OSError as error:
            raise CspdError(f"{out}: cannot write there: {error.strerror}") from None
        key.write_text(plan.key())
    return staging


def _build_model(
    builder: GraphBuilder, role: Role, source: Source, options: BuildOptions
) -> ModelRecord:
    assert source.config is not None
    folder = builder.staging / role
    folder.mkdir(exist_ok=True)
    state = source.weights()
    exact = model = assemble_mar(source.config, state, "fp32")
    if options.precision != "fp32":
        model = assemble_mar(source.config, state, options.precision)
        _write_weights(exact.diffloss, folder / FIRST_WEIGHTS, None, prefix="diffloss.")
    _write_weights(model, folder / WEIGHTS, options.storage)
    first = f"{role}/{WEIGHTS if options.precision == 'fp32' else FIRST_WEIGHTS}"
    limits = (options.max_batch, options.max_rows)
    # Only engines use them: elsewhere the loop graphs compute modulations ahead of their steps.
    hoisted = options.hoisted and bool(options.engines)
    graphs = model_graphs(model, *limits, options.precision, exact.diffloss, hoisted=hoisted)
    references = {**graphs, **model_graphs(exact, *limits, hoisted=hoisted)}
    return ModelRecord(
        preset=source.preset,
        config=asdict(source.config),
        weights=f"{role}/{WEIGHTS}",
        first_weights=None if options.precision == "fp32" else first,
        source=source.origin,
        source_sha256=source.sha256,
        precision=options.precision,
        graphs={
            name: builder.build(
                f"{role}/{name}", module, spec, references[name][0],
                first if name in EXACT else f"{role}/{WEIGHTS}",
            )
            for name, (module, spec) in graphs.items()
        },
    )  # fmt: skip


def _build_decoder(builder: GraphBuilder, plan: BundlePlan) -> GraphRecord:
    geometry, folder = plan.geometry, builder.staging / "decoder"
    folder.mkdir(exist_ok=True)
    module: nn.Module = PixelDecoder(geometry.image_size // geometry.grid)
    exact, weights = module, None
    if plan.decoder is not None:
        state = plan.decoder.weights()
        exact = assemble_vae(state, "fp32")
        module = assemble_vae(state, plan.options.precision)
        weights = f"decoder/{WEIGHTS}"
        _write_weights(module, folder / WEIGHTS, plan.options.storage)
    image = (geometry.image_channels, geometry.image_size)
    spec = decoder_spec(geometry.grid, geometry.token_dim, image, plan.options.max_batch)
    if plan.decoder is not None:
        spec = with_tolerance(spec, plan.options.precision)
    return builder.build("decoder/decoder", module, spec, exact, weights)


def _write_weights(module: nn.Module, path: Path, storage: str | None, prefix: str = "") -> None:
    state = {
        prefix + name: tensor.half() if storage == "fp16" else tensor
        for name, tensor in module.state_dict().items()
    }
    check_values(state, path.parent.name, NOT_WRITTEN)
    temporary = path.with_suffix(".tmp")
    save_file(state, temporary)
    temporary.chmod(0o644)
    temporary.replace(path)


def _manifest(
    plan: BundlePlan, models: dict[Role, ModelRecord], decoder: GraphRecord, staging: Path
) -> Manifest:
    weights = f"decoder/{WEIGHTS}" if plan.decoder else None
    manifest = Manifest.model_construct(
        tool_version=importlib.metadata.version("cspd"),
        libraries=_libraries(),
        opset=OPSET,
        synthetic=plan.synthetic,
        geometry=plan.geometry,
        class_names=plan.class_names,
        schedule=plan.schedule,
        defaults=dict(plan.defaults),
        models=models,
        decoder=decoder,
        decoder_weights=weights,
        decoder_precision=plan.options.precision,
        files={},
    )
    files = record_files(staging, manifest.referenced_files())
    return Manifest.model_validate({**manifest.model_dump(), "files": files})


def _remove_unlisted(staging: Path, manifest: Manifest) -> None:
    """Drop records of finished graphs and whatever a killed build left half-written.

    Libraries, too, write beside the file they are asked for, under names of their own.
    """
    for path in staging.rglob("*"):
        name = path.relative_to(staging).as_posix()
        if path.is_file() and name not in (MANIFEST, KEY) and name not in manifest.files:
            path.unlink()


def _libraries() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}
