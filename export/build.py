"""Build a bundle: weights in, exported and verified graphs out, published in one rename.

Every finished graph leaves a record beside it, so that an interrupted build goes on where it was.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cspd.engines.bundle import MANIFEST, check_target, hash_file, publish, record_files
from cspd.engines.errors import CspdError
from cspd.engines.manifest import FileRecord, Geometry, GraphRecord, Manifest, ModelRecord
from cspd.engines.schedule import Schedule, ScheduleSpec, make_schedule
from cspd.engines.spec import GraphSpec, Record
from cspd.export.assemble import assemble_mar, assemble_vae
from cspd.export.graphs import DenoiserLoopGraph, PixelDecoder, decoder_spec, model_graphs
from cspd.export.onnx_export import OPSET, export_graph, save_graph
from cspd.export.presets import MarConfig
from cspd.export.scan_loop import export_loop
from cspd.export.verify import verify_graph

WEIGHTS = "weights.safetensors"
VERIFY_STEPS = 10
LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Source:
    """Where the weights of one network come from."""

    preset: str
    state: Mapping[str, Tensor]
    origin: str  # "model_ema", "safetensors", "random", ...
    sha256: str | None = None
    config: MarConfig | None = None


@dataclass(frozen=True)
class BuildOptions:
    """Ranges and number formats of the graphs."""

    max_batch: int = 16
    max_rows: int = 1024
    precision: str = "fp32"
    # Number format of the weights on disk when it differs from that of the computation.
    storage: str | None = None

    def __post_init__(self) -> None:
        for name, low, high in (("max_batch", 1, 4096), ("max_rows", 1, 1 << 20)):
            value = getattr(self, name)
            if not low <= value <= high:
                option = "--" + name.replace("_", "-")
                raise CspdError(f"{option} is {value}, expected {low}..{high}")


@dataclass(frozen=True)
class BundlePlan:
    """Everything that goes into a bundle. `decoder` is None for pixel-space models."""

    models: Mapping[str, Source]
    decoder: Source | None
    geometry: Geometry
    class_names: tuple[str, ...]
    schedule: ScheduleSpec
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
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class FinishedGraph(Record):
    """Record of one finished graph in the staging folder."""

    graph: GraphRecord
    files: dict[str, FileRecord]


def build_bundle(
    plan: BundlePlan, out: Path, overwrite: bool = False, report: Callable[[str], None] = print
) -> Path:
    """Export, verify and publish the bundle of `plan` at `out`; `report` gets a line per graph.

    An old bundle at `out` is untouched until the new one is complete. Raises CspdError if a graph
    differs from PyTorch by more than its contract allows.
    """
    check_target(out, overwrite)
    check_pair(plan)
    staging = _staging(plan, out)
    schedule = make_schedule(plan.schedule, VERIFY_STEPS)
    models = {
        role: _build_model(staging, role, source, plan.options, schedule, report)
        for role, source in plan.models.items()
    }
    decoder = _build_decoder(staging, plan, schedule, report)
    manifest = _manifest(plan, staging, models, decoder)
    for record in staging.rglob("*.done.json"):
        record.unlink()
    (staging / "build.key").unlink()
    (staging / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
    publish(staging, out, overwrite)
    return out


def check_pair(plan: BundlePlan) -> None:
    """Raise CspdError unless draft and target see the same tokens and classes."""
    configs = {role: source.config for role, source in plan.models.items()}
    target, draft = configs["target"], configs.get("draft")
    if target is None or draft is None:
        return
    for field in ("grid", "token_dim", "num_classes"):
        if getattr(target, field) != getattr(draft, field):
            raise CspdError(
                f"draft {plan.models['draft'].preset}: {field} is {getattr(draft, field)}, the "
                f"target {plan.models['target'].preset} has {getattr(target, field)}; "
                "a pair must share grid, token size and classes"
            )


def _staging(plan: BundlePlan, out: Path) -> Path:
    """Folder of this build beside `out`; emptied if another build left it."""
    staging = out.parent / f".{out.name}.building"
    key = staging / "build.key"
    if staging.exists() and not (key.is_file() and key.read_text() == plan.key()):
        shutil.rmtree(staging)
    if not staging.exists():
        staging.mkdir(parents=True)
        key.write_text(plan.key())
    return staging


def _build_model(
    staging: Path,
    role: str,
    source: Source,
    options: BuildOptions,
    schedule: Schedule,
    report: Callable[[str], None],
) -> ModelRecord:
    assert source.config is not None
    (staging / role).mkdir(exist_ok=True)
    model = assemble_mar(source.config, source.state, options.precision)
    _write_weights(model, staging / role / WEIGHTS, options.storage)
    graphs = {}
    for name, (module, spec) in model_graphs(model, options.max_batch, options.max_rows).items():
        graphs[name] = _build_graph(staging, f"{role}/{name}", module, spec, schedule, report)
    return ModelRecord(
        preset=source.preset,
        config=asdict(source.config),
        weights=f"{role}/{WEIGHTS}",
        source=source.origin,
        source_sha256=source.sha256,
        precision=options.precision,
        graphs=graphs,
    )


def _build_decoder(
    staging: Path, plan: BundlePlan, schedule: Schedule, report: Callable[[str], None]
) -> GraphRecord:
    geometry, folder = plan.geometry, staging / "decoder"
    folder.mkdir(exist_ok=True)
    module: nn.Module = PixelDecoder(geometry.image_size // geometry.grid)
    if plan.decoder is not None:
        module = assemble_vae(plan.decoder.state, plan.options.precision)
        _write_weights(module, folder / WEIGHTS, plan.options.storage)
    image = (geometry.image_channels, geometry.image_size)
    spec = decoder_spec(geometry.grid, geometry.token_dim, image, plan.options.max_batch)
    return _build_graph(staging, "decoder/decoder", module, spec, schedule, report)


def _build_graph(
    staging: Path,
    label: str,
    module: nn.Module,
    spec: GraphSpec,
    schedule: Schedule,
    report: Callable[[str], None],
) -> GraphRecord:
    """Export and verify one graph, unless an interrupted build left it finished and intact."""
    path = staging / f"{label}.onnx"
    done, weights = path.with_suffix(".done.json"), path.with_name(WEIGHTS)
    if done.is_file():
        finished = FinishedGraph.model_validate_json(done.read_bytes())
        if all(
            (staging / n).is_file() and hash_file(staging / n) == f
            for n, f in finished.files.items()
        ):
            report(f"{label}: already finished")
            return finished.graph
    if isinstance(module, DenoiserLoopGraph):
        model = export_loop(module, spec)
    else:
        model = export_graph(module, spec)
    save_graph(model, path, weights if weights.is_file() else None)
    del model
    onnx.checker.check_model(str(path))
    error = verify_graph(path, spec, module, schedule)
    report(f"{label}: exported, differs from PyTorch by {error:.1e}")
    record = GraphRecord(spec=spec, file=f"{label}.onnx", measured_error=error)
    names = [f"{label}.onnx"] + [str(weights.relative_to(staging))] * weights.is_file()
    finished = FinishedGraph(graph=record, files=record_files(staging, names))
    done.with_suffix(".tmp").write_text(finished.model_dump_json())
    done.with_suffix(".tmp").replace(done)
    return record


def _write_weights(module: nn.Module, path: Path, storage: str | None) -> None:
    dtype = {"fp16": torch.float16, None: None}[storage]
    state = {name: tensor.to(dtype or tensor.dtype) for name, tensor in module.state_dict().items()}
    save_file(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").chmod(0o644)
    path.with_suffix(".tmp").replace(path)


def _manifest(
    plan: BundlePlan, staging: Path, models: dict[str, ModelRecord], decoder: GraphRecord
) -> Manifest:
    weights = f"decoder/{WEIGHTS}" if plan.decoder else None
    names = [decoder.file, *([weights] if weights else [])]
    for model in models.values():
        names += [model.weights, *(graph.file for graph in model.graphs.values())]
    return Manifest(
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
        files=record_files(staging, names),
    )


def _libraries() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}
