"""What a head should take on hardware that is not here: `python -m cspd.tools.gpu.roofline`.

FLOPs and bytes are counted from the ONNX files, product by product, for given sizes. A call takes
what its products take: the longer of arithmetic and memory traffic on a GPU, both after another on
a CPU (which packs a matrix before it multiplies), and the cost of launching its kernels. Figures
of GPUs are computed, not measured. `check` measures this CPU's two rates on a chain of products,
predicts whole calls of the head from them, and compares with the clock.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import click
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from cspd.engines.console.commands import Commands
from cspd.engines.console.table import Table
from cspd.engines.console.terminal import print_table
from cspd.engines.errors import CspdError
from cspd.engines.schedule import ScheduleSpec, make_schedule
from cspd.engines.sessions.ort import import_onnxruntime, thread_options
from cspd.export.mar.presets import PRESETS
from cspd.tools.gpu.synthetic_head import SyntheticHead

PRODUCTS = ("MatMul", "Gemm")
STEPS = 100
ALLOWED = 0.30
CHECKED_ROWS = (2, 8, 32, 128)
WIDTH, LAYERS = 1024, 32  # of the chain that rates are measured on: 134 MB, beyond any cache


@dataclass(frozen=True)
class Count:
    """One call of a graph: multiply-adds times two, bytes of weights and of activations (float32).

    `products` is the number of matrix products.
    """

    flops: float
    weights: float
    activations: float
    products: int


@dataclass(frozen=True)
class Machine:
    """Rates of a machine: `flops` per second, `bandwidth` in bytes per second, `launch` seconds.

    `launch` is the cost of one kernel; `width` the bytes of a number; `overlaps` whether arithmetic
    hides behind memory traffic.
    """

    name: str
    flops: float
    bandwidth: float
    launch: float
    width: int
    overlaps: bool
    source: str

    def seconds(self, count: Count) -> float:
        """Expected time of one call."""
        traffic = (count.weights + count.activations) * self.width / 4 / self.bandwidth
        arithmetic = count.flops / self.flops
        busy = max(traffic, arithmetic) if self.overlaps else traffic + arithmetic
        return busy + KERNELS_PER_PRODUCT * count.products * self.launch


KERNELS_PER_PRODUCT = 2  # the product, and whatever is fused between it and the next
EFFICIENCY = 0.6  # of peak arithmetic and of peak bandwidth
# Peaks are those of the vendors' data sheets: dense fp16 with fp32 accumulation.
GPUS = tuple(
    Machine(name, EFFICIENCY * tera * 1e12, EFFICIENCY * giga * 1e9, 2.5e-6, 2, True, source)
    for name, tera, giga, source in (
        ("H100 SXM", 989, 3350, "989 TFLOP/s fp16, 3.35 TB/s"),
        ("A100 SXM 80 GB", 312, 2039, "312 TFLOP/s fp16, 2.04 TB/s"),
        ("RTX 4090", 165, 1008, "165 TFLOP/s fp16, 1.01 TB/s"),
    )
)


def count_graph(path: Path, axes: Mapping[str, int]) -> Count:
    """Work of one call of the ONNX file at `path` with axes of the given sizes."""
    model = onnx.load(str(path), load_external_data=False)
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = axes[dim.dim_param]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    constants = _constants(inferred)
    shapes |= constants
    total = Count(0, 0, 0, 0)
    for node in inferred.node:
        if node.op_type in PRODUCTS:
            total = _add(total, _product(path, node, shapes, constants))
    return total


def _constants(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights, also behind the transposes and casts that engines fold."""
    found = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("Transpose", "Cast") and node.input[0] in found:
            shape = found[node.input[0]]
            turned = node.op_type == "Transpose" and len(shape) == 2
            found[node.output[0]] = shape[::-1] if turned else shape
    return found


def _product(
    path: Path, node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]],
    constants: Mapping[str, tuple[int, ...]],
) -> Count:  # fmt: skip
    sides = [shapes.get(name, ()) for name in node.input[:2]]
    out = shapes.get(node.output[0], ())
    if not all(sides) or not out or 0 in (*sides[0], *sides[1], *out):
        raise CspdError(f"{path}: shape of product {node.name} is unknown; give sizes of all axes")
    inner = sides[0][-1]
    if node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute):
        inner = sides[0][0]
    read = [4.0 * prod(shape) for shape in sides]
    fixed = [name in constants for name in node.input[:2]]
    weights = sum(size for size, constant in zip(read, fixed, strict=True) if constant)
    return Count(2.0 * prod(out) * inner, weights, sum(read) - weights + 4.0 * prod(out), 1)


def _add(a: Count, b: Count) -> Count:
    return Count(*(getattr(a, name) + getattr(b, name) for name in vars(a)))


@dataclass(frozen=True)
class Work:
    """Calls of one autoregressive step of the head by kind of sampling."""

    calls: float
    rows: float


# Calls, and rows per call, of four tokens together, measured on the shipped pair with head_bench.
LOSSLESS = {8: Work(calls=20.4, rows=4 * 124 / 20.4), 16: Work(calls=14.8, rows=4 * 143 / 14.8)}


def head_seconds(
    head: SyntheticHead, machine: Machine, tokens: int, window: int | None, *, hoisted: bool
) -> float:
    """Expected time of the head for one autoregressive step; `window` None steps plainly."""
    work = Work(STEPS, tokens) if window is None else LOSSLESS[window]
    axes = {"rows": round(work.rows), "branches": 2, "steps": STEPS, "tokens": tokens}
    if not hoisted:
        return work.calls * machine.seconds(count_graph(head.file("denoiser"), axes))
    before = machine.seconds(count_graph(head.file("head_modulation"), axes))
    return before + work.calls * machine.seconds(_hoisted_call(head, axes))


def _hoisted_call(head: SyntheticHead, axes: Mapping[str, int]) -> Count:
    """A call of the hoisted denoiser: its products, and the rows of modulations that it reads."""
    count = count_graph(head.file("denoiser_hoisted"), axes)
    config = PRESETS[head.preset]
    width = (3 * config.head_depth + 2) * config.head_width
    read = 4.0 * axes["rows"] * axes["branches"] * width
    return replace(count, activations=count.activations + read)


def measure_machine(threads: int = 0) -> Machine:
    """This CPU's two rates in ONNX Runtime, from a chain of products of few and of many rows."""
    few, many = 2, 256
    with tempfile.TemporaryDirectory() as folder:
        run = _chain(Path(folder) / "chain.onnx", threads)
        low, high = run(few), run(many)
    weights, flops = 4.0 * WIDTH * WIDTH * LAYERS, 2.0 * WIDTH * WIDTH * LAYERS
    # Two equations: low = weights / bandwidth + few * flops / rate, high likewise.
    rate = (many - few) * flops / (high - low)
    bandwidth = weights / max(low - few * flops / rate, 1e-9)
    return Machine("this CPU", rate, bandwidth, 0.0, 4, False, "measured")


def _chain(path: Path, threads: int):  # type: ignore[no-untyped-def]
    """`run(rows)`: least seconds of `LAYERS` products of `rows` rows."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for layer in range(LAYERS):
        matrix = rng.standard_normal((WIDTH, WIDTH), dtype=np.float32) / WIDTH**0.5
        weights.append(numpy_helper.from_array(matrix, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"x{layer + 1}"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", WIDTH])
        for name in ("x0", f"x{LAYERS}")
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), str(path))
    ort = import_onnxruntime()
    options = thread_options(ort, threads)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(rows: int) -> float:
        x = rng.standard_normal((rows, WIDTH), dtype=np.float32)
        return least_seconds(lambda: session.run(None, {"x0": x}), threads)

    return run


def least_seconds(call, threads: int, repeats: int = 12) -> float:  # type: ignore[no-untyped-def]
    """Least time of a call, after one that does not count; CPU time if it has one thread."""
    clock = time.process_time if threads == 1 else time.perf_counter
    call()
    times = []
    for _ in range(repeats):
        start = clock()
        call()
        times.append(clock() - start)
    return min(times)


def check(head: SyntheticHead, machine: Machine) -> list[tuple[int, float, float]]:
    """(rows, predicted, measured) seconds of a `denoiser` call with guidance on this CPU."""
    session, found = head.onnx("denoiser"), []
    schedule = make_schedule(ScheduleSpec(), STEPS).table
    for rows in CHECKED_ROWS:
        axes = {"rows": rows, "branches": 2, "steps": STEPS, "tokens": rows}
        inputs = session.spec.example_inputs(axes) | {"schedule": schedule}
        measured = least_seconds(lambda: session(**inputs), head.threads)  # noqa: B023
        found.append((rows, machine.seconds(count_graph(head.file("denoiser"), axes)), measured))
    return found


@click.group(cls=Commands)
def main() -> None:
    """Predict the time of a diffusion head."""


PRESET = click.option(
    "--preset", type=click.Choice(["mar-b", "mar-l", "mar-h"]), default="mar-b", show_default=True
)


@main.command("predict")
@PRESET
def predict_command(preset: str) -> None:
    """Predicted time of the head of one autoregressive step on GPUs that nobody measured."""
    torch.manual_seed(0)
    tokens = 4
    assumed = (
        f"PREDICTED, not measured. {preset} head, {tokens} tokens with guidance, {STEPS} steps, "
        f"fp16. Assumed: {EFFICIENCY:.0%} of peak arithmetic and bandwidth, "
        f"{KERNELS_PER_PRODUCT} kernels per product of {GPUS[0].launch * 1e6:g} us each (captured "
        "graph), no cache holds the weights between calls, no host; calls and rows of lossless as "
        "measured on the shipped pair."
    )
    sizes = [None, *LOSSLESS]
    ways = [(window, hoisted) for hoisted in (False, True) for window in sizes]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        head = SyntheticHead(preset, Path(folder))
        columns = [
            [1000 * head_seconds(head, m, tokens, w, hoisted=h) for w, h in ways] for m in GPUS
        ]
    for row, (window, hoisted) in enumerate(ways):
        name = "plain" if window is None else f"lossless, window {window}"
        lines.append([name + ", hoisted" * hoisted, *(f"{column[row]:.2f}" for column in columns)])
    best = [
        min(s for s, (w, _) in zip(column, ways, strict=True) if w is None)
        / min(s for s, (w, _) in zip(column, ways, strict=True) if w is not None)
        for column in columns
    ]
    lines.append(["best plain over best lossless", *(f"{ratio:.2f}x" for ratio in best)])
    sources = (f"{machine.name}: {machine.source}" for machine in GPUS)
    names = tuple(machine.name for machine in GPUS)
    note = "\n".join([assumed, *sources])
    print_table(Table("PREDICTED ms per autoregressive step", ("way", *names), lines, note))


@main.command("check")
@PRESET
@click.option("--threads", default=0, show_default="all cores")
def check_command(preset: str, threads: int) -> None:
    """Compare predicted and measured times of the head's calls on this CPU."""
    machine = measure_machine(threads)
    click.echo(
        f"this CPU: {machine.flops / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.1f} GB/s, measured"
    )
    with tempfile.TemporaryDirectory() as folder:
        found = check(SyntheticHead(preset, Path(folder), threads), machine)
    worst = 0.0
    for rows, predicted, measured in found:
        worst = max(worst, abs(predicted / measured - 1))
        click.echo(
            f"{rows:4d} rows: predicted {1000 * predicted:7.2f} ms, measured "
            f"{1000 * measured:7.2f} ms ({predicted / measured - 1:+.0%})"
        )
    if worst > ALLOWED:
        raise CspdError(
            f"prediction is off by {worst:.0%}, expected at most {ALLOWED:.0%}; run it alone on "
            "the machine"
        )


if __name__ == "__main__":
    main()
