"""One graph of a bundle: exported, compared with PyTorch, built into engines, remembered."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir
from torch import nn

from cspd.engines.atomic import atomic_file
from cspd.engines.bundle import hash_file, record_files
from cspd.engines.lint import lint_model, refuse_errors
from cspd.engines.manifest import EngineRecord, FileRecord, GraphRecord
from cspd.engines.memory import peak_memory, release_memory
from cspd.engines.schedule import Schedule
from cspd.engines.spec import GraphSpec, Record
from cspd.engines.trt.build import build_engine
from cspd.engines.trt.options import BuildOptions as EngineOptions
from cspd.engines.trt.progress import ProgressCallback
from cspd.export.graphs.denoiser_loop import DenoiserLoopGraph
from cspd.export.graphs.speculative_loop import SpeculativeLoopGraph
from cspd.export.onnx.loop import export_speculative_loop
from cspd.export.onnx.scan import export_loop
from cspd.export.onnx.trace import export_graph, save_graph
from cspd.export.verify import judge, verify_graph

DONE = ".done.json"
ShowProgress = Callable[[str], AbstractContextManager[ProgressCallback]]


class Cost(Record):
    """What the export and comparison of one graph took; `peak_memory_bytes` as of `peak_memory`."""

    seconds: float
    peak_memory_bytes: int | None


class FinishedGraph(Record):
    """Record of one graph in the staging folder, with the hash of every file it needs.

    It is written when the graph was exported and compared, and again with every engine.
    """

    graph: GraphRecord
    export: Cost
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class GraphBuilder:
    """Builds graphs into `staging`; a finished graph of an interrupted build is not done again.

    `schedule` is used for comparison only; `report` gets a line per finished piece, `show` opens a
    progress bar for an engine; `finished` collects the graphs of this build by label.
    """

    staging: Path
    schedule: Schedule
    engines: tuple[EngineOptions, ...]
    report: Callable[[str], None]
    show: ShowProgress
    finished: dict[str, FinishedGraph] = field(default_factory=dict)

    def build(
        self, label: str, module: nn.Module, spec: GraphSpec, reference: nn.Module,
        weights: str | None,
    ) -> GraphRecord:  # fmt: skip
        """Export `module` as `label`, compare it with `reference` in float32, build its engines.

        `weights` is the safetensors file, relative to the staging folder, that holds its weights.
        Raises CspdError if the graph differs by more than its contract allows.
        """
        kept = self._kept(label, spec)
        finished = kept or self._make(label, module, spec, reference, weights)
        wanted = self.engines if spec.engines else ()
        missing = [o for o in wanted if o.flavour not in finished.graph.engines]
        if kept:
            self.report(f"{label}: {'exported' if missing else 'finished'} earlier")
        for options in missing:
            finished = self._remember(
                label, _with_engine(finished, self._engine(label, spec, options))
            )
        self.finished[label] = finished
        return finished.graph

    def _make(
        self, label: str, module: nn.Module, spec: GraphSpec, reference: nn.Module,
        weights: str | None,
    ) -> FinishedGraph:  # fmt: skip
        path = self.staging / f"{label}.onnx"
        start = time.perf_counter()
        with peak_memory() as peak:
            self._export(module, spec, path, weights)
            error = verify_graph(path, spec, module, reference, self.schedule)
        release_memory()
        cost = Cost(seconds=round(time.perf_counter() - start, 3), peak_memory_bytes=peak())
        self.report(
            f"{label}: exported in {cost.seconds:.0f} s, differs from PyTorch by {error:.1e}"
        )
        name = f"{label}.onnx"
        record = GraphRecord(spec=spec, file=name, measured_error=error, measured_by=judge(module))
        files = record_files(self.staging, filter(None, (name, weights)))
        return self._remember(label, FinishedGraph(graph=record, export=cost, files=files))

    def _export(self, module: nn.Module, spec: GraphSpec, path: Path, weights: str | None) -> None:
        save_graph(export_any(module, spec), path, self.staging / weights if weights else None)
        onnx.checker.check_model(str(path))

    def _engine(self, label: str, spec: GraphSpec, options: EngineOptions) -> EngineRecord:
        onnx_file, name = self.staging / f"{label}.onnx", f"{label}.{options.flavour}.engine"
        refuse_errors(label, lint_model(onnx_file, spec, options.flavour))
        with self.show(f"{label} {options.flavour}") as progress:
            built = build_engine(onnx_file, spec, options, self.staging / name, progress)
        self.report(
            f"{label}: {options.flavour} engine in {built.seconds:.0f} s, "
            f"{built.bytes / 1e6:.0f} MB"
        )
        return EngineRecord(file=name, **built.model_dump())

    def _kept(self, label: str, spec: GraphSpec) -> FinishedGraph | None:
        """What an earlier run left of this graph, if it is of this contract and still intact."""
        done = self.staging / f"{label}{DONE}"
        if not done.is_file():
            return None
        kept = FinishedGraph.model_validate_json(done.read_bytes())
        return kept if kept.graph.spec == spec and intact_files(self.staging, kept.files) else None

    def _remember(self, label: str, finished: FinishedGraph) -> FinishedGraph:
        with atomic_file(self.staging / f"{label}{DONE}") as file:
            file.write(finished.model_dump_json().encode())
        return finished


def export_any(module: nn.Module, spec: GraphSpec) -> ir.Model:
    """ONNX model of `module`, whichever kind of graph it is."""
    if isinstance(module, DenoiserLoopGraph):
        return export_loop(module, spec)
    if isinstance(module, SpeculativeLoopGraph):
        return export_speculative_loop(module, spec)
    return export_graph(module, spec)


def _with_engine(finished: FinishedGraph, engine: EngineRecord) -> FinishedGraph:
    """`finished` with one more engine."""
    graph = finished.graph
    engines = {**graph.engines, engine.flavour: engine}
    return finished.model_copy(
        update={
            "graph": graph.model_copy(update={"engines": engines}),
            "files": {
                **finished.files,
                engine.file: FileRecord(sha256=engine.sha256, bytes=engine.bytes),
            },
        }
    )


def intact_files(folder: Path, files: Mapping[str, FileRecord]) -> bool:
    """Whether every file of `files` lies below `folder` with the content recorded."""
    return all(
        (folder / name).is_file() and hash_file(folder / name) == record
        for name, record in files.items()
    )
