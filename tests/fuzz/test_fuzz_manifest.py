"""Manifests nobody vouches for: read, shown, exported, run."""

import json

from harness import budget, check, quick, run_case, run_command, run_here
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import Edit, apply, damaged, edits

from cspd.engines.bundle import MANIFEST, open_bundle
from cspd.export.cli import main as export_main
from cspd.runtime.commands.cli import main as run_main
from cspd.runtime.commands.cli import shipped_bundle

TEXT = (shipped_bundle() / MANIFEST).read_bytes()
DOCUMENT = json.loads(TEXT)
GRAPHS, CONFIG = ("models", "draft", "graphs"), ("models", "draft", "config")
OUTPUT = (*GRAPHS, "backbone", "spec", "outputs", 0)
FILE = DOCUMENT["files"]["decoder/decoder.onnx"]


def put(folder, content: bytes) -> None:
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).write_bytes(content)


@budget(full=1500, ci=25)
@given(content=st.one_of(damaged(TEXT), st.binary(max_size=200)))
@example(content=b"[" * 100_000)
@example(content=b'{"a":' * 5000)
def test_read_bytes(arena, content):
    read(arena.fresh(), content)


@budget(full=2500, ci=25)
@given(changes=edits(DOCUMENT, most=6))
def test_read(arena, changes):
    read(arena.fresh(), apply(DOCUMENT, changes))


def read(folder, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)

    def call():
        bundle = open_bundle(folder)
        assert bundle.sha256 and bundle.manifest.graphs()

    check(run_here("manifest: read", call, folder))


@budget(full=600, ci=12)
@given(changes=edits(DOCUMENT), options=st.sampled_from([[], ["--json"]]))
@example(changes=[Edit(("tool_version",), "[/red]\x1b[31m\n")], options=[])
@example(changes=[Edit(("models", "draft", "preset"), "[/red]")], options=[])
@example(changes=[Edit((*GRAPHS, "backbone"), "[/red]", "rename")], options=[])
@example(changes=[Edit((*GRAPHS, "backbone"), "../../etc/passwd", "rename")], options=[])
@example(changes=[Edit(("a\nb",), 1)], options=[])
@example(changes=[Edit(("files", "[/red].safetensors"), FILE)], options=[])
def test_inspect(arena, changes, options):
    bundle = arena.bundle()
    put(bundle, apply(DOCUMENT, changes))
    call = run_command(export_main, ["inspect", str(bundle), "--no-verify", *options])
    check(run_here("manifest: inspect", call, arena.root / "case"))


@budget(full=25, ci=4)
@given(changes=edits(DOCUMENT))
@example(changes=[Edit(("files", "x" * 5000), FILE)])
def test_triton(arena, changes):
    bundle = arena.bundle()
    put(bundle, apply(DOCUMENT, changes))
    out = arena.root / "case" / "out"
    call = run_command(export_main, ["triton", str(bundle), "--out", str(out)])
    check(run_case("manifest: triton", call, arena.root / "case"))


@budget(full=60, ci=6)
@given(
    changes=edits(DOCUMENT),
    method=st.sampled_from(["target", "cspd", "draft", "lossless"]),
    backend=st.sampled_from(["onnxruntime", "onnxruntime", "torch"]),
)
@example(changes=[Edit(("geometry", "grid"), 2**31)], method="draft", backend="onnxruntime")
@example(changes=[Edit(("geometry", "token_dim"), 2**31)], method="draft", backend="onnxruntime")
@example(changes=[Edit(("geometry", "image_size"), 29)], method="draft", backend="torch")
@example(
    changes=[Edit(("models", "draft", "config", "grid"), "x")], method="draft", backend="torch"
)
@example(changes=[Edit((*CONFIG, "a"), 1)], method="draft", backend="torch")
@example(changes=[Edit((*OUTPUT, "name"), "other")], method="draft", backend="onnxruntime")
@example(changes=[Edit((*OUTPUT, "shape"), [2])], method="draft", backend="onnxruntime")
@example(changes=[Edit(("defaults", "num_iter"), "x")], method="draft", backend="onnxruntime")
@example(changes=[Edit(("defaults", "magic"), 1)], method="draft", backend="onnxruntime")
def test_generate(arena, changes, method, backend):
    bundle = arena.bundle()
    put(bundle, apply(DOCUMENT, changes))
    out = arena.root / "case" / "out"
    arguments = ["generate", str(bundle), "--out", str(out), *quick(method)]
    call = run_command(run_main, [*arguments, "--backend", backend])
    check(run_case("manifest: generate", call, arena.root / "case"))


def test_the_untouched_manifest_generates(arena):
    """The quick run itself is sound, so that what is refused above is refused for a reason."""
    bundle = arena.bundle()
    for method in ("target", "cspd", "draft", "lossless"):
        for backend in ("onnxruntime", "torch"):
            arguments = ["generate", str(bundle), "--out", str(bundle.parent / method / backend)]
            arguments += [*quick(method), "--backend", backend]
            call = run_command(run_main, arguments)
            assert run_case("manifest: generate", call, bundle.parent).kind == "ok"
