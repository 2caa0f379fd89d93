"""Where inside a graph does it go wrong? Names the nodes whose outputs differ most.

The graph of the bundle is compared, node by node, with a fresh export of the same network from the
bundle's own weights: same exporter, same node names. Every intermediate result of both becomes an
output; both run in ONNX Runtime without optimisations on one random input. Nodes inside the body of
a loop cannot be outputs and stay dark.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from cspd.engines.sessions.ort import import_onnxruntime, thread_options
from cspd.export.build_graph import export_any
from cspd.export.torch_session import decoder_module, graph_module
from cspd.export.verify import check_sizes, realistic_inputs
from cspd.tools.parity.ladder import Ladder
from cspd.tools.parity.measure import Row, measure

SHOWN = 5
# Relative; below, a difference says nothing. Products round by where their weights lie in memory,
# of which 100 steps of a chain made 1.0e-6.
NOISE_FLOOR = 1e-5


@dataclass(frozen=True)
class Suspect:
    """What was found in one graph: the nodes in question, most upstream first."""

    graph: str
    nodes: list[dict[str, str | float]]

    @property
    def text(self) -> str:
        """One line for people."""
        if not self.nodes:
            return "every node agrees with a fresh export of the same weights"
        return "; ".join(f"{n['op']} {n['output']} differs by {n['error']:.1e}" for n in self.nodes)


def bisect(ladder: Ladder, rows: list[Row]) -> list[Suspect]:
    """Suspects of every graph that failed on the first rung, of all graphs if none did."""
    failed = {row.subject.split()[0] for row in rows if row.rung == "graphs" and not row.passed}
    return [suspect(ladder, label) for label in ladder.bundle.manifest.graphs()
            if label in failed or not failed]  # fmt: skip


def suspect(ladder: Ladder, label: str) -> Suspect:
    """The first nodes of graph `label`, in order of execution, that differ from a fresh export."""
    spec = ladder.bundle.graph(label).spec
    inputs = realistic_inputs(spec, check_sizes(spec)[1], ladder.schedule, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        fresh = fresh_export(ladder, label, Path(folder))
        expected, _ = run_all_nodes(fresh, inputs, Path(folder))
        got, operators = run_all_nodes(ladder.bundle.graph_file(label), inputs, Path(folder))
    found: list[dict[str, str | float]] = []
    for name, operator in operators.items():
        if name not in expected or name not in got or got[name].shape != expected[name].shape:
            continue
        # Rounds accept by infinity where there is nothing to test.
        same = got[name].isinf() & (got[name] == expected[name])
        error = measure(got[name].masked_fill(same, 0), expected[name].masked_fill(same, 0)).norm
        if not error <= NOISE_FLOOR:
            found.append({"output": name, "op": operator, "error": error})
    return Suspect(label, found[:SHOWN])


def fresh_export(ladder: Ladder, label: str, folder: Path) -> Path:
    """The graph `label` exported again from the weights of the bundle, to a file in `folder`."""
    bundle, spec = ladder.bundle, ladder.bundle.graph(label).spec
    module = decoder_module(bundle) if label == "decoder" else graph_module(bundle, label)
    path = folder / "fresh.onnx"
    ir.save(export_any(module, spec), path, external_data="fresh.data")
    return path


def run_all_nodes(
    path: Path, inputs: dict[str, Tensor], folder: Path
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every float result of the graph in `path`, and the operator behind each, in order."""
    model = onnx.load(path)  # with its weights, wherever they lie
    operators = {out: node.op_type for node in model.graph.node for out in node.output if out}
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in operators if n not in known)
    marked = folder / "marked.onnx"
    onnx.save(
        model, marked, save_as_external_data=True, location="marked.data", size_threshold=1024
    )
    ort = import_onnxruntime()
    options = thread_options(ort)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(marked), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    (folder / "marked.data").unlink(missing_ok=True)
    floats = {n: torch.from_numpy(v.copy()) for n, v in zip(names, values, strict=True)
              if hasattr(v, "dtype") and v.dtype.kind == "f" and v.size}  # fmt: skip
    return floats, operators
