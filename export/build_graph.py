"""One graph of a bundle: exported, compared with PyTorch, built into engines, remembered."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import onnx
from torch import nn

from cspd.engines.bundle import hash_file, record_files
from cspd.engines.lint import lint_model, refuse_errors
from cspd.engines.manifest import EngineRecord, FileRecord, GraphRecord
from cspd.engines.schedule import Schedule
from cspd.engines.spec import GraphSpec, Record
from cspd.engines.trt_build import build_engine
from cspd.engines.trt_options import BuildOptions as EngineOptions
from cspd.engines.trt_progress import ProgressCallback
from cspd.export.graphs import DenoiserLoopGraph
from cspd.export.onnx_export import export_graph, save_graph
from cspd.export.scan_loop import export_loop
from cspd.export.verify import judge, verify_graph

DONE = ".done.json"
ShowProgress = Callable[[str], AbstractContextManager[ProgressCallback]]


class FinishedGraph(Record):
    """Record of one finished graph in the staging folder, with the hash of every file it needs."""

    graph: GraphRecord
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class GraphBuilder:
    """Builds graphs into `staging`; a finished graph of an interrupted build is not done again.

    `schedule` is used for comparison only; `report` gets a line per finished piece, `show` opens a
    progress bar for an engine.
    """

    staging: Path
    schedule: Schedule
    engines: tuple[EngineOptions, ...]
    report: Callable[[str], None]
    show: ShowProgress

    def build(
        self, label: str, module: nn.Module, spec: GraphSpec, reference: nn.Module,
        weights: str | None,
    ) -> GraphRecord:  # fmt: skip
        """Export `module` as `label`, compare it with `reference` in float32, build its engines.

        `weights` is the safetensors file, relative to the staging folder, that holds its weights.
        Raises CspdError if the graph differs by more than its contract allows.
        """
        done = self.staging / f"{label}{DONE}"
        if finished := self._finished(done):
            self.report(f"{label}: finished earlier")
            return finished
        path = self.staging / f"{label}.onnx"
        start = time.perf_counter()
        self._export(module, spec, path, weights)
        error = verify_graph(path, spec, module, reference, self.schedule)
        seconds = time.perf_counter() - start
        self.report(f"{label}: exported in {seconds:.0f} s, differs from PyTorch by {error:.1e}")
        engines = {options.flavour: self._engine(label, spec, options) for options in self.engines}
        record = GraphRecord(
            spec=spec, file=f"{label}.onnx", engines=engines, measured_error=error,
            measured_by=judge(module),
        )  # fmt: skip
        self._remember(done, record, weights)
        return record

    def _export(self, module: nn.Module, spec: GraphSpec, path: Path, weights: str | None) -> None:
        if isinstance(module, DenoiserLoopGraph):
            model = export_loop(module, spec)
        else:
            model = export_graph(module, spec)
        save_graph(model, path, self.staging / weights if weights else None)
        onnx.checker.check_model(str(path))

    def _engine(self, label: str, spec: GraphSpec, options: EngineOptions) -> EngineRecord:
        onnx_file, name = self.staging / f"{label}.onnx", f"{label}.{options.flavour}.engine"
        refuse_errors(label, lint_model(onnx_file, spec, options.flavour))
        with self.show(f"{label} {options.flavour}") as progress:
            built = build_engine(onnx_file, spec, options, self.staging / name, progress)
        peak = (
            f", peak memory {built.peak_memory_bytes / 1e9:.2f} GB"
            if built.peak_memory_bytes
            else ""
        )
        self.report(
            f"{label}: {options.flavour} engine in {built.seconds:.0f} s, "
            f"{built.bytes / 1e6:.0f} MB{peak}"
        )
        return EngineRecord(file=name, **built.model_dump())

    def _finished(self, done: Path) -> GraphRecord | None:
        """The record left at `done`, if every file it names is still intact."""
        if not done.is_file():
            return None
        finished = FinishedGraph.model_validate_json(done.read_bytes())
        for name, record in finished.files.items():
            path = self.staging / name
            if not path.is_file() or hash_file(path) != record:
                return None
        return finished.graph

    def _remember(self, done: Path, record: GraphRecord, weights: str | None) -> None:
        names = [record.file, *(engine.file for engine in record.engines.values())]
        names += [weights] if weights else []
        finished = FinishedGraph(graph=record, files=record_files(self.staging, names))
        temporary = done.with_suffix(".tmp")
        temporary.write_text(finished.model_dump_json())
        temporary.replace(done)
