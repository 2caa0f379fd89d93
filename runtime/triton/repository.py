"""`cspd-export triton`: a bundle as a model repository of NVIDIA Triton Inference Server.

One model per graph, and one, `cspd`, that runs the decoding loop. The weights lie in the repository
once: the graphs that share them hold hard links, or copies where the file system has no links.
"""

from __future__ import annotations

import importlib.resources
import os
import shutil
import tempfile
from pathlib import Path

import click

from cspd.engines.atomic import link_file
from cspd.engines.backends import BACKENDS, ENGINES
from cspd.engines.bundle import MANIFEST, Bundle, open_bundle
from cspd.engines.console.commands import OUTPUT, SPEED, Choice, Verb, finish, json_option, option
from cspd.engines.console.idle_options import refuse_idle
from cspd.engines.errors import CspdError
from cspd.engines.manifest import GraphRecord
from cspd.engines.words import shell
from cspd.runtime.settings import usable_bundle
from cspd.runtime.triton.config import KINDS, graph_config, loop_config

LOOP = "cspd"
VERSION = "1"
PLAN_BACKEND = "tensorrt"


def write_repository(bundle: Bundle, out: Path, device: str, parameters: dict[str, str]) -> None:
    """Write the repository of `bundle` to `out`, which appears when it is complete.

    `device` is "cpu" or "cuda"; `parameters` are those of the Python model. Raises CspdError for a
    damaged bundle, a folder that is not empty, or a full disk.
    """
    _check_out(out)
    staging = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        _write_loop(bundle, staging / LOOP, device, parameters)
        copy = open_bundle(staging / LOOP / VERSION / "bundle")
        for label in copy.manifest.graphs():
            _write_graph(copy, label, staging / label.replace("/", "_"), device)
        staging.chmod(0o755)
        if out.exists():
            out.rmdir()
        staging.rename(out)
    except OSError as error:
        raise CspdError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _check_out(out: Path) -> None:
    """Raise CspdError unless `out` is free or an empty folder."""
    try:
        free = not os.path.lexists(out) or (not out.is_symlink() and not any(out.iterdir()))
    except OSError as error:
        raise CspdError(f"{out}: {error.strerror}; choose another --out") from None
    if not free:
        raise CspdError(f"{out}: exists and is not an empty folder; choose another --out")


def _write_loop(bundle: Bundle, folder: Path, device: str, parameters: dict[str, str]) -> None:
    """The Python model with its own copy of the bundle, every hash checked on the copy."""
    copy = folder / VERSION / "bundle"
    copy.mkdir(parents=True)
    for name in (MANIFEST, *sorted(bundle.manifest.files)):
        source = bundle.folder / name if name == MANIFEST else bundle.file(name)
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy / name)
    copied = open_bundle(copy)
    if copied.sha256 != bundle.sha256:
        raise CspdError(f"{bundle.folder}: was changed while it was copied; run it again")
    for name in copied.manifest.files:
        copied.file(name)
    source_text = importlib.resources.files("cspd.runtime.triton").joinpath("model.py").read_text()
    (folder / VERSION / "model.py").write_text(source_text)
    config = loop_config(LOOP, bundle.manifest.geometry, device, parameters)
    (folder / "config.pbtxt").write_text(config)


def _write_graph(bundle: Bundle, label: str, folder: Path, device: str) -> None:
    """The model of one graph: its TensorRT plan on a GPU if it has one, its ONNX file otherwise."""
    graph = bundle.graph(label)
    version = folder / VERSION
    version.mkdir(parents=True)
    plan = graph.engines.get(PLAN_BACKEND) if device == "cuda" else None
    if plan is not None:
        link_file(bundle.file(plan.file), version / "model.plan")
    else:
        _write_onnx(bundle, label, graph, version)
    backend = PLAN_BACKEND if plan is not None else "onnxruntime"
    text = graph_config(folder.name, graph.spec, backend, device)
    (folder / "config.pbtxt").write_text(text)


def _write_onnx(bundle: Bundle, label: str, graph: GraphRecord, version: Path) -> None:
    """An ONNX file with external data is a folder of the name that the file would have."""
    weights = _weights(bundle, label)
    if not weights:
        link_file(bundle.graph_file(label), version / "model.onnx")
        return
    (version / "model.onnx").mkdir()
    link_file(bundle.graph_file(label), version / "model.onnx" / "model.onnx")
    for name in weights:
        link_file(bundle.file(name), version / "model.onnx" / Path(name).name)


def _weights(bundle: Bundle, label: str) -> list[str]:
    """Files that the graph `label` may refer to by name."""
    role, _, _ = label.partition("/")
    model = bundle.manifest.models.get(role)  # type: ignore[call-overload]
    names = [bundle.manifest.decoder_weights]
    if model is not None:
        names = [model.weights, model.first_weights]
    return [name for name in names if name]


@click.command("triton", cls=Verb, example="cspd-export triton bundles/mar-h-b --out repository")
@click.argument("bundle", type=click.Path(path_type=Path))
@option(
    "--device",
    default="cpu",
    type=Choice(list(KINDS)),
    group=SPEED,
    help="Where the models run; with cuda, graphs that have a TensorRT engine use it.",
)
@option(
    "--backend",
    default="onnxruntime",
    type=Choice(list(BACKENDS)),
    group=SPEED,
    help="What runs the networks inside the loop.",
)
@option(
    "--threads",
    default=0,
    show_default="all cores",
    type=click.IntRange(0, 1024),
    group=SPEED,
    help="CPU threads of the loop.",
)
@option(
    "--max-images",
    default=64,
    type=click.IntRange(1, 4096),
    group=SPEED,
    help="Most images of one request.",
)
@option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    group=OUTPUT,
    help="Folder to write; a new or an empty one.",
)
@json_option
def command(
    bundle: Path, out: Path, device: str, backend: str, threads: int, max_images: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Write BUNDLE as a model repository of NVIDIA Triton Inference Server."""
    opened = usable_bundle(bundle)
    if backend in ENGINES:
        if device == "cpu":
            refuse_idle(["backend"], f"{backend} runs on GPUs only; add --device cuda")
        check_engines(opened, backend)
    parameters = {"backend": backend, "threads": str(threads), "max_images": str(max_images)}
    write_repository(opened, out, device, parameters)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    models = sum(1 for path in out.iterdir())
    record = {"schema": 1, "kind": "triton", "models": models}
    name = shell(out)
    finish(
        as_json, record, files,
        f"{models} models, {len(files)} files in {name}; "
        f"next: tritonserver --model-repository={name}",
    )  # fmt: skip


def check_engines(bundle: Bundle, backend: str) -> None:
    """Raise CspdError unless graphs of `bundle` have engines of `backend`."""
    if not any(backend in graph.engines for graph in bundle.manifest.graphs().values()):
        raise CspdError(
            f"{bundle.folder}: has no engines of {backend}; build them with cspd-export build "
            f"--backend {backend}, or use --backend onnxruntime"
        )
