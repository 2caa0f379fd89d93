"""A copy of a bundle with engines for this machine, from its verified ONNX files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from cspd.engines.bundle import MANIFEST, Bundle, open_bundle
from cspd.engines.errors import CspdError
from cspd.engines.manifest import EngineRecord, FileRecord, GraphRecord, Manifest
from cspd.engines.trt.build import build_engine
from cspd.engines.trt.options import BuildOptions


def with_engines(
    bundle: Bundle, options: BuildOptions, out: Path, more_time: Callable[[], bool] = lambda: True
) -> tuple[Bundle, dict[str, str]]:
    """The bundle at `out`, and why some graphs have no engine there, by label.

    A graph that cannot be built does not stop the others; none is begun once `more_time` is False.
    """
    for name in bundle.manifest.files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(bundle.file(name), out / name)
    engines: dict[str, EngineRecord] = {}
    failures: dict[str, str] = {}
    for label, graph in bundle.manifest.graphs().items():
        if not graph.spec.engines:
            continue
        if not more_time():
            failures[label] = "no time left to build it"
            continue
        name = f"{graph.file.removesuffix('.onnx')}.{options.flavour}.engine"
        try:
            report = build_engine(out / graph.file, graph.spec, options, out / name)
        except CspdError as error:
            failures[label] = str(error)
        else:
            engines[label] = EngineRecord(file=name, **report.model_dump())
    manifest = _manifest(bundle.manifest, engines, options.flavour)
    (out / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
    return open_bundle(out), failures


def _manifest(manifest: Manifest, engines: dict[str, EngineRecord], flavour: str) -> Manifest:
    """`manifest` with `engines` by graph label, and their files."""

    def graph(label: str, record: GraphRecord) -> GraphRecord:
        more = {flavour: engines[label]} if label in engines else {}
        return record.model_copy(update={"engines": {**record.engines, **more}})

    models = {
        role: model.model_copy(
            update={"graphs": {n: graph(f"{role}/{n}", g) for n, g in model.graphs.items()}}
        )
        for role, model in manifest.models.items()
    }
    files = {e.file: FileRecord(sha256=e.sha256, bytes=e.bytes) for e in engines.values()}
    changed = manifest.model_copy(
        update={
            "models": models,
            "decoder": graph("decoder", manifest.decoder),
            "files": {**manifest.files, **files},
        }
    )
    return Manifest.model_validate(changed.model_dump())
