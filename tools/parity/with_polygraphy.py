"""ONNX Runtime against TensorRT, tensor by tensor, through Polygraphy: where does a graph go wrong?

Every float result inside a graph becomes an output. Each backend runs in a process of its own,
because Polygraphy decides between the flavours of TensorRT when it is imported. TensorRT builds
from the verified ONNX file; the engines of a bundle are never handed to Polygraphy, whose loaders
allow code on the host.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor

from cspd.engines.atomic import link_file
from cspd.engines.bundle import Bundle
from cspd.engines.errors import CspdError, MissingExtraError
from cspd.engines.onnx_external import external_locations
from cspd.engines.schedule import make_schedule
from cspd.engines.spec import GraphSpec
from cspd.export.verify import check_sizes, realistic_inputs
from cspd.tools.parity.measure import measure

FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
STEPS = 10
TIMEOUT_SECONDS = 1800
# What runs the marked graph in each process.
RUNNERS = {
    "onnxruntime": ("--onnxrt", "--providers", "CPUExecutionProvider"),
    "tensorrt": ("--trt", "--strongly-typed"),
    "tensorrt-rtx": ("--trt", "--strongly-typed"),
}
START = "import sys; from polygraphy.tools import main; sys.exit(main())"


@dataclass(frozen=True)
class TensorError:
    """Difference of one tensor, relative error of the norm; `op` is the operator that makes it."""

    name: str
    op: str
    error: float


@dataclass(frozen=True)
class Comparison:
    """Every tensor of one graph in order of execution, and the largest error allowed."""

    graph: str
    tensors: tuple[TensorError, ...]
    tolerance: float

    @property
    def first(self) -> TensorError | None:
        """The most upstream tensor that leaves the tolerance."""
        return next((t for t in self.tensors if not t.error <= self.tolerance), None)

    @property
    def text(self) -> str:
        """One line for people."""
        if self.first is not None:
            where = f"{self.first.op} {self.first.name} by {self.first.error:.1e}"
            return f"{self.graph}: leaves {self.tolerance:.0e} first at {where}"
        worst = max((t.error for t in self.tensors), default=0.0)
        count = f"{len(self.tensors)} tensors within {self.tolerance:.0e}"
        return f"{self.graph}: {count}, worst {worst:.1e}"


def check_ready(backend: str) -> None:
    """Raise an error unless Polygraphy is installed and `backend` can run here."""
    if importlib.util.find_spec("polygraphy") is None:
        raise MissingExtraError("polygraphy", "polygraphy")
    if backend != "onnxruntime" and not torch.cuda.is_available():
        raise CspdError(
            f"--polygraphy: {backend} runs on a GPU, and torch sees none; run cspd-run doctor"
        )


def compare_graphs(
    bundle: Bundle, labels: Iterable[str], backend: str, reference: str = "onnxruntime"
) -> list[Comparison]:
    """`backend` against `reference` on random inputs; graphs with a loop are left out."""
    check_ready(backend)
    results = []
    for label in labels:
        spec = bundle.graph(label).spec
        if spec.capturable:
            files = (bundle.graph_file(label), bundle.graph_file(label))
            inputs = example_inputs(bundle, spec)
            tensors = compare_files(files, (reference, backend), inputs)
            limits = [tensor.tolerance for tensor in spec.outputs if tensor.tolerance]
            results.append(Comparison(label, tensors, max(limits)))
    return results


def example_inputs(bundle: Bundle, spec: GraphSpec) -> dict[str, Tensor]:
    """Random inputs of an odd size with a true schedule."""
    schedule = make_schedule(bundle.manifest.schedule, STEPS)
    return realistic_inputs(spec, check_sizes(spec)[1], schedule, seed=0)


def compare_files(
    paths: tuple[Path, Path], backends: tuple[str, str], inputs: dict[str, Tensor]
) -> tuple[TensorError, ...]:
    """Errors of the second file on the second backend against the first on the first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_inputs(inputs, folder / "inputs.json")
        found: list[dict[str, Tensor]] = []
        operators: dict[str, str] = {}
        for number, (path, backend) in enumerate(zip(paths, backends, strict=True)):
            place = folder / str(number)
            place.mkdir()
            marked, operators = mark_all(path, place)
            found.append(run(marked, backend, folder / "inputs.json", place / "outputs.json"))
    expected, got = found
    return tuple(
        TensorError(tensor, op, measure(got[tensor], expected[tensor]).norm)
        for tensor, op in operators.items()
        if tensor in got and tensor in expected and got[tensor].numel()
    )


def mark_all(path: Path, folder: Path) -> tuple[Path, dict[str, str]]:
    """A copy of the graph whose float results are all outputs, and the operator behind each.

    Weights beside the graph are not read: those of a large model exceed what protobuf can hold.
    """
    model = onnx.load(path, load_external_data=False)
    typed = onnx.shape_inference.infer_shapes(model)
    types = {v.name: v.type for v in (*typed.graph.value_info, *typed.graph.output)}
    known = {value.name for value in model.graph.output}
    operators = {}
    for node in model.graph.node:
        for name in node.output:
            if name not in types or types[name].tensor_type.elem_type not in FLOATS:
                continue
            operators[name] = node.op_type
            if name not in known:
                model.graph.output.append(onnx.ValueInfoProto(name=name, type=types[name]))
    for name in external_locations(path.read_bytes()):
        link_file(path.parent / name, folder / name)
    marked = folder / "marked.onnx"
    onnx.save(model, marked)
    return marked, operators


def command(marked: Path, backend: str, inputs: Path, outputs: Path) -> list[str]:
    """The call of Polygraphy that runs `marked` on `backend`; the profile is that of `inputs`."""
    files = ["--load-inputs", str(inputs), "--save-outputs", str(outputs)]
    return [sys.executable, "-c", START, "run", str(marked), *RUNNERS[backend], *files]


def environment(backend: str) -> dict[str, str]:
    """This process's environment with the flavour of TensorRT in it."""
    return {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": str(int(backend == "tensorrt-rtx"))}


def run(marked: Path, backend: str, inputs: Path, outputs: Path) -> dict[str, Tensor]:
    """Every output of `marked` on `backend`, by name; CspdError with Polygraphy's last words."""
    from polygraphy.comparator import RunResults

    done = subprocess.run(
        command(marked, backend, inputs, outputs), env=environment(backend),
        capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode or not outputs.is_file():
        words = last_lines([*done.stdout.splitlines(), *done.stderr.splitlines()])
        raise CspdError(f"--polygraphy: {backend} failed on {marked.name}:\n{words}")
    ((_, iterations),) = RunResults.load(str(outputs)).items()
    (outputs_of_run,) = iterations
    return {name: torch.as_tensor(value) for name, value in outputs_of_run.items()}


def last_lines(lines: Sequence[str], count: int = 6) -> str:
    """The last `count` lines that say something."""
    return "\n".join(f"  {line.strip()}" for line in [x for x in lines if x.strip()][-count:])


def save_inputs(inputs: dict[str, Tensor], path: Path) -> None:
    """Write `inputs` as Polygraphy reads them."""
    from polygraphy.json import save_json

    save_json([{name: tensor.numpy() for name, tensor in inputs.items()}], str(path))
