"""Everything that needs a GPU in one command under eight minutes, into one JSON file.

With PyTorch alone (`gpu_torch`): the numbers and images of the CPU, and times of single graphs, of
the shipped pair, and of SYNTHETIC models of published sizes. With TensorRT: runs the tests marked
`gpu`; builds the engines of every graph of a bundle for this GPU, compares and times them one by
one, alone and as a captured loop; climbs the parity ladder with them; measures whole images.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from cspd.engines.backends import open_session
from cspd.engines.bundle import Bundle
from cspd.engines.doctor import diagnose
from cspd.engines.errors import CspdError
from cspd.engines.sessions.cuda_graph import CapturedLoop, Run, relative_error
from cspd.engines.sessions.session import Session
from cspd.engines.trt.options import BuildOptions
from cspd.engines.trt.session import TrtSession
from cspd.runtime.commands.run import measure
from cspd.runtime.config import HeadChoice, make_config
from cspd.runtime.costs.sizes import DEFAULT_WINDOW
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.scale.stopping import StopWish
from cspd.runtime.sessions import Opener, Sessions
from cspd.runtime.settings import shipped_bundle, usable_bundle
from cspd.tools.gpu import with_torch as gpu_torch
from cspd.tools.gpu.engine_bundle import with_engines
from cspd.tools.parity import command as parity
from cspd.tools.parity.measure import Row, Skipped

# Cheapest first: what time is left decides how far the ladder is climbed.
LADDER = ("backends", "trajectory", "decisions", "image")
METHODS = ("target", "cspd", "lossless", "draft")
MAX_TOKENS = 1 << 20  # more than a head is ever called with
REPEATS = 20
BATCH = 8
RESERVE = 30  # seconds: no piece of work is begun with less
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
@click.argument("bundle", required=False, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--backend", type=click.Choice(["torch", "tensorrt", "tensorrt-rtx"]), default="torch",
    show_default=True,
)  # fmt: skip
@click.option("--seconds", type=click.IntRange(60, 3600), default=460, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("gpu_check.json"))
def main(bundle: Path | None, backend: str, seconds: int, out: Path) -> None:
    """Check BUNDLE, or the shipped pair, on the GPU of this machine; findings go to --out."""
    deadline = Deadline(time.monotonic() + seconds)
    doctor = diagnose()
    report: dict[str, Any] = {
        "schema_version": 1, "backend": backend, "doctor": doctor.model_dump(mode="json"),
    }  # fmt: skip
    if not (doctor.gpus and doctor.runs(backend)):
        raise click.ClickException(f"{backend} cannot run on a GPU here; see cspd-run doctor")
    try:
        opened = usable_bundle(bundle or shipped_bundle())
    except CspdError as error:
        raise click.ClickException(str(error)) from None

    def write() -> None:
        report["seconds"] = round(seconds - deadline.left(), 1)
        out.write_text(json.dumps(report, indent=1) + "\n")

    if backend == "torch":

        def keep(parts: dict[str, Any]) -> None:
            report["parts"] = parts
            write()

        gpu_torch.check(opened, deadline.left, keep)
        report["ok"] = all(part.get("ok", True) for part in report["parts"].values())
    else:
        check_engines(opened, backend, deadline, report)
    write()
    click.echo(f"{'passed' if report['ok'] else 'FAILED'}: {out}")
    sys.exit(0 if report["ok"] else 1)


def check_engines(opened: Bundle, backend: str, deadline: Deadline, report: dict[str, Any]) -> None:
    """Fill `report` with what TensorRT engines of every graph do."""
    report["tests"] = run_tests(deadline.left() / 4)
    with tempfile.TemporaryDirectory() as folder:
        built, failed = with_engines(
            opened, BuildOptions(flavour=backend), Path(folder), lambda: deadline.left() > 200
        )
        report["not_built"] = failed
        report["graphs"] = check_graphs(built, backend, deadline)
        report["benchmark"] = attempt(lambda: benchmark(built, backend, "cuda", deadline))
        report["ladder"] = attempt(lambda: climb(built, backend, deadline))
    report["ok"] = succeeded(report)


def succeeded(report: Mapping[str, Any]) -> bool:
    """Whether every part of the report did all of its work and found nothing wrong."""
    parts = [report["tests"], report["benchmark"], report["ladder"], *report["graphs"].values()]
    return not report["not_built"] and all(part["ok"] for part in parts)


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The findings of `work`, or how it failed; the rest of the check continues."""
    try:
        return work()
    except (CspdError, RuntimeError) as error:
        return {"ok": False, "error": str(error)}


def ways(*, tables: bool) -> dict[str, dict[str, Any]]:
    """Options of every way that is timed, by name; if there are `tables`, also without them."""
    found: dict[str, dict[str, Any]] = {method: {"method": method} for method in METHODS}
    found["lossless"]["window"] = DEFAULT_WINDOW
    if tables:
        no_table = HeadChoice(role="target", window=DEFAULT_WINDOW, up_to=MAX_TOKENS, table=False)
        for method in ("target", "lossless"):
            found[f"{method}, no table of modulations"] = {**found[method], "heads": (no_table,)}
    return found


def benchmark(
    bundle: Bundle, backend: str, device: str, deadline: Deadline, opener: Opener = open_session
) -> dict[str, Any]:
    """Time of a batch of images in every way, after one batch to warm up and capture."""
    results: dict[str, Any] = {"ok": True, "methods": {}}
    pipeline = Pipeline(Sessions(bundle, backend, device, opener=opener))
    labels = tuple(range(bundle.manifest.geometry.num_classes))
    for name, options in ways(tables=pipeline.heads.has_tables("target")).items():
        if deadline.left() < RESERVE:
            results["ok"] = False
            results["methods"][name] = "no time left"
            continue
        values = {**bundle.manifest.defaults, **options, "backend": backend}
        config = make_config(**values, labels=labels, num_images=BATCH, batch_size=BATCH)
        cold, warm = (measure(pipeline, config, StopWish(), True).tally for _ in range(2))
        results["methods"][name] = {
            "first_batch_seconds": cold.seconds,
            "seconds": warm.seconds,
            "images": BATCH,
            "acceptance_rate": warm.statistics.verdicts.acceptance_rate,
            "graphs": {name: asdict(stats) for name, stats in warm.calls.items()},
        }
    results["cuda_graphs"] = {
        role: asdict(stats) for role, stats in pipeline.heads.captures.items()
    }
    results["notes"] = pipeline.sessions.notes
    return results


def climb(bundle: Bundle, backend: str, deadline: Deadline) -> dict[str, Any]:
    """The parity ladder with `backend` against PyTorch on the CPU, as far as time allows."""
    ladder = parity.make_ladder(
        bundle, backends=(backend,), num_iter=4, head_steps=20, seeds=1, budget=2.0
    )
    rows: list[Row] = []
    skipped: list[Skipped] = []
    left: list[str] = []
    for rung in LADDER:
        if deadline.left() < RESERVE:
            left.append(rung)
            continue
        found, unable = parity.climb(ladder, [rung])
        rows, skipped = rows + found, unable
    record = parity.to_json(ladder, rows, skipped, [])
    ran = any(row.rung == "backends" for row in rows)
    return {"ok": record["passed"] and ran and not left, "not_climbed": left, **record}


def run_tests(seconds: float) -> dict[str, Any]:
    """Outcome of the tests marked `gpu`."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "--no-header"]
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"ok": False, "output": [f"stopped after {seconds:.0f} s"]}
    return {"ok": done.returncode == 0, "output": done.stdout.splitlines()[-40:]}


def check_graphs(bundle: Bundle, backend: str, deadline: Deadline) -> dict[str, dict[str, Any]]:
    """Findings for every graph with an engine; one that fails does not stop the others."""
    results: dict[str, dict[str, Any]] = {}
    with torch.cuda.stream(torch.cuda.Stream()):
        for label, graph in bundle.manifest.graphs().items():
            if deadline.left() < RESERVE:
                results[label] = {"ok": False, "error": "no time left"}
            elif backend in graph.engines:
                results[label] = attempt(partial(check_graph, bundle, label, backend))
    return results


def check_graph(bundle: Bundle, label: str, backend: str) -> dict[str, Any]:
    """Parity at three sizes, and time of one graph."""
    session = Sessions(bundle, backend, "cuda")(label).session
    assert isinstance(session, TrtSession)
    spec = session.spec
    reference = Sessions(bundle)(label)
    errors = {which: parity_at(session, reference, which) for which in ("min", "opt", "max")}
    limits = {tensor.name: tensor.tolerance or 0.0 for tensor in spec.outputs}
    result: dict[str, Any] = {
        "ok": all(error <= limits[n] for size in errors.values() for n, error in size.items()),
        "build": bundle.graph(label).engines[backend].model_dump(mode="json"),
        "relative_error": errors,
        "limits": limits,
        "latency_ms": latency_ms(lambda inputs: session(**inputs), inputs_of(session, "opt")),
        "notes": session.notes,
    }
    if spec.name == "denoiser":
        result["loop"] = captured_loop(session)
        session.save_cache()
    return result


def inputs_of(session: Session, which: str) -> dict[str, Tensor]:
    """Example inputs of the sizes `which` on the session's device."""
    inputs = session.spec.example_inputs(session.spec.sizes(which), seed=1)
    if "schedule" in inputs:
        inputs["schedule"] *= CALM
    return {name: tensor.to(session.device) for name, tensor in inputs.items()}


def parity_at(session: Session, reference: Session, which: str) -> dict[str, float]:
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
