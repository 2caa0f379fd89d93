"""Everything that needs a GPU in one command under eight minutes, into one JSON file.

Runs the tests marked `gpu`, then builds the engines of every graph of a bundle for this GPU,
compares them with ONNX Runtime on the CPU, and measures them, alone and as a captured loop.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from cspd.engines.backends import open_session
from cspd.engines.bundle import Bundle, open_bundle
from cspd.engines.cuda_graph import CapturedLoop, Run, relative_error
from cspd.engines.doctor import diagnose
from cspd.engines.errors import CspdError
from cspd.engines.session import Session
from cspd.engines.trt_build import build_engine
from cspd.engines.trt_load import EngineFile, Placement, load_engine
from cspd.engines.trt_options import BuildOptions
from cspd.engines.trt_session import TrtSession

REPEATS = 20
LOOP_STEPS = 100
LOOP_ROWS = 64
CALM = 0.1  # of the schedule in example inputs: random coefficients would make the loop explode


@dataclass(frozen=True)
class Deadline:
    """The end of the time that may be used, on `time.monotonic`."""

    end: float

    def left(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--backend", type=click.Choice(["tensorrt", "tensorrt-rtx"]), default="tensorrt")
@click.option("--seconds", type=click.IntRange(60, 3600), default=460, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("gpu_check.json"))
def main(bundle: Path, backend: str, seconds: int, out: Path) -> None:
    """Check BUNDLE on the GPU of this machine and write the findings to --out."""
    deadline = Deadline(time.monotonic() + seconds)
    doctor = diagnose()
    report: dict[str, Any] = {
        "schema_version": 1, "backend": backend, "doctor": doctor.model_dump(mode="json"),
    }  # fmt: skip
    if not doctor.runs(backend):
        raise click.ClickException(f"{backend} cannot run here; see cspd-run doctor")
    try:
        opened = open_bundle(bundle)
    except CspdError as error:
        raise click.ClickException(str(error)) from None
    report["tests"] = run_tests(deadline.left() / 2)
    report["graphs"] = check_graphs(opened, backend, deadline)
    report["ok"] = report["tests"]["ok"] and all(g["ok"] for g in report["graphs"].values())
    report["seconds"] = round(seconds - deadline.left(), 1)
    out.write_text(json.dumps(report, indent=1) + "\n")
    click.echo(f"{'passed' if report['ok'] else 'FAILED'}: {out}")
    sys.exit(0 if report["ok"] else 1)


def run_tests(seconds: float) -> dict[str, Any]:
    """Outcome of the tests marked `gpu`."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "--no-header"]
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"ok": False, "output": [f"stopped after {seconds:.0f} s"]}
    return {"ok": done.returncode == 0, "output": done.stdout.splitlines()[-40:]}


def check_graphs(bundle: Bundle, backend: str, deadline: Deadline) -> dict[str, dict[str, Any]]:
    """Findings for every graph of the bundle; one that fails does not stop the others."""
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.cuda.stream(torch.cuda.Stream()):
        for label in bundle.manifest.graphs():
            if deadline.left() < 30:
                results[label] = {"ok": False, "error": "no time left"}
                continue
            try:
                results[label] = check_graph(bundle, label, backend, Path(folder))
            except (CspdError, RuntimeError) as error:
                results[label] = {"ok": False, "error": str(error)}
    return results


def check_graph(bundle: Bundle, label: str, backend: str, folder: Path) -> dict[str, Any]:
    """Build, parity at three sizes, and time of one graph."""
    spec, path = bundle.graph(label).spec, folder / f"{label.replace('/', '-')}.engine"
    built = build_engine(bundle.graph_file(label), spec, BuildOptions(flavour=backend), path)
    device = torch.device("cuda", torch.cuda.current_device())
    file = EngineFile(path, backend, built.version, built.sha256)
    placement = Placement(device, torch.cuda.get_device_name(), spec.capturable, folder)
    session = TrtSession(spec, load_engine(file, placement), device=device)
    reference = open_session(bundle, label, "onnxruntime")
    errors = {which: parity(session, reference, which) for which in ("min", "opt", "max")}
    limits = {tensor.name: tensor.tolerance or 0.0 for tensor in spec.outputs}
    result: dict[str, Any] = {
        "ok": all(error <= limits[n] for size in errors.values() for n, error in size.items()),
        "build": built.model_dump(mode="json"),
        "relative_error": errors,
        "limits": limits,
        "latency_ms": latency_ms(lambda inputs: session(**inputs), inputs_of(session, "opt")),
        "notes": session.loaded.notes,
    }
    if spec.name == "denoiser":
        result["loop"] = captured_loop(session)
    return result


def inputs_of(session: Session, which: str) -> dict[str, Tensor]:
    """Example inputs of the sizes `which` on the session's device."""
    inputs = session.spec.example_inputs(session.spec.sizes(which), seed=1)
    if "schedule" in inputs:
        inputs["schedule"] *= CALM
    return {name: tensor.to(session.device) for name, tensor in inputs.items()}


def parity(session: Session, reference: Session, which: str) -> dict[str, float]:
    """Relative error of the norm of every output against `reference`, at the sizes `which`."""
    inputs = inputs_of(session, which)
    found = {name: value.cpu() for name, value in session(**inputs).items()}
    expected = reference(**{name: tensor.cpu() for name, tensor in inputs.items()})
    return {name: relative_error(found[name], expected[name]) for name in expected}


def latency_ms(run: Callable[[dict[str, Tensor]], Any], inputs: dict[str, Tensor]) -> float:
    """Median time of one call on the device, after one call to warm up."""
    run(inputs)
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(inputs)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times), 4)


def captured_loop(session: TrtSession) -> dict[str, Any]:
    """Time of a whole denoising loop, called step by step and as a CUDA graph."""

    def make_run() -> Run:
        fork = session.fork()

        def run(x: Tensor, **conditions: Tensor) -> Mapping[str, Tensor]:
            for step in reversed(range(LOOP_STEPS)):
                index = torch.full((len(x),), step, dtype=torch.int32, device=x.device)
                x = fork(x=x, step=index, **conditions)["mean"].clone()
            return {"sample": x}

        return run

    rows = min(LOOP_ROWS, session.spec.axes["rows"].max)
    sizes = {**session.spec.sizes("opt"), "rows": rows, "tokens": rows, "steps": LOOP_STEPS}
    inputs = session.spec.example_inputs(sizes, seed=2)
    inputs["schedule"] *= CALM
    inputs = {name: t.to(session.device) for name, t in inputs.items() if name != "step"}
    reasons: list[str] = []
    loop = CapturedLoop(make_run, on_fallback=reasons.append)
    eager = make_run()
    return {
        "rows": rows,
        "steps": LOOP_STEPS,
        "eager_ms": latency_ms(lambda values: eager(**values), inputs),
        "captured_ms": latency_ms(lambda values: loop(**values), inputs),
        "replayed": loop.stats.replayed,
        "fallbacks": reasons,
    }


if __name__ == "__main__":
    main()
