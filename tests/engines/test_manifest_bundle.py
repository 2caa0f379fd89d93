"""Bundles nobody vouches for: every damage is an error in one line, nothing leaves the folder."""

import hashlib
import json
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from cspd.engines.backends import open_session
from cspd.engines.bundle import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    check_target,
    hash_file,
    open_bundle,
    publish,
    record_files,
)
from cspd.engines.errors import BundleError, CspdError
from cspd.engines.manifest import EngineRecord, Geometry, GraphRecord, Manifest, ModelRecord
from cspd.engines.schedule import ScheduleSpec
from cspd.engines.spec import Axis, GraphSpec, TensorSpec

SPEC = GraphSpec(
    name="backbone",
    inputs=(TensorSpec(name="x", shape=("rows",)),),
    outputs=(TensorSpec(name="y", shape=("rows",)),),
    axes={"rows": Axis(min=1, opt=2, max=4)},
)
FILES = {
    "target/weights.safetensors": save({"w": torch.ones(2, 3)}),
    "target/backbone.onnx": b"\x08\x0a",
    "decoder/decoder.onnx": b"\x08\x0b",
}


def make_manifest(folder: Path) -> Manifest:
    graph = GraphRecord(spec=SPEC, file="target/backbone.onnx", measured_error=1e-6)
    model = ModelRecord(
        preset="mar-b", config={}, weights="target/weights.safetensors", source="random",
        source_sha256=None, precision="fp32", graphs={"backbone": graph},
    )  # fmt: skip
    return Manifest(
        tool_version="1", libraries={}, opset=20, class_names=("cat", "dog"),
        geometry=Geometry(grid=2, token_dim=4, num_classes=2, image_channels=1, image_size=4),
        schedule=ScheduleSpec(), models={"target": model},
        decoder=graph.model_copy(update={"file": "decoder/decoder.onnx"}),
        files=record_files(folder, FILES),
    )  # fmt: skip


@pytest.fixture
def bundle(tmp_path) -> Path:
    """A small bundle whose graphs are only bytes."""
    folder = tmp_path / "bundle"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / MANIFEST).write_text(make_manifest(folder).model_dump_json())
    return folder


def refused(folder: Path) -> str:
    """Message of the error of opening `folder`: one line, a hint included."""
    with pytest.raises(BundleError) as caught:
        open_bundle(folder)
    message = str(caught.value)
    assert "\n" not in message and "cspd-export" in message and str(folder) in message
    return message


def changed(folder: Path, change) -> None:
    """Apply `change` to the manifest as parsed JSON."""
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def test_intact_bundle(bundle):
    opened = open_bundle(bundle)
    assert opened.manifest == make_manifest(bundle)
    assert opened.sha256 == hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    for name, content in FILES.items():
        assert opened.file(name).read_bytes() == content
    assert opened.graph_file("target/backbone") == bundle / "target/backbone.onnx"
    assert opened.graph_file("decoder") == bundle / "decoder/decoder.onnx"


def test_hash_file(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    # The example of FIPS 180-2, appendix B.1.
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert (hash_file(tmp_path / "f").sha256, hash_file(tmp_path / "f").bytes) == (digest, 3)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["same size", "longer", "shorter", "empty"])
def test_changed_file_is_never_handed_out(bundle, name, damage):
    content = FILES[name]
    flipped = bytes([content[0] ^ 1]) + content[1:]
    damaged = {
        "same size": flipped,
        "longer": content + b"x",
        "shorter": content[:-1],
        "empty": b"",
    }
    (bundle / name).write_bytes(damaged[damage])
    with pytest.raises(BundleError, match=f"{name}: differs from the hash"):
        open_bundle(bundle).file(name)


def test_graph_with_changed_weights_is_not_handed_out(bundle):
    (bundle / "target/weights.safetensors").write_bytes(b"weights of somebody else")
    with pytest.raises(BundleError, match=r"weights\.safetensors: differs"):
        open_bundle(bundle).graph_file("target/backbone")


def test_missing_file(bundle):
    (bundle / "target/backbone.onnx").unlink()
    with pytest.raises(BundleError, match=r"backbone\.onnx: missing from the bundle"):
        open_bundle(bundle).graph_file("target/backbone")


def test_folder_in_place_of_a_file(bundle):
    (bundle / "decoder/decoder.onnx").unlink()
    (bundle / "decoder/decoder.onnx").mkdir()
    with pytest.raises(BundleError, match="missing from the bundle"):
        open_bundle(bundle).graph_file("decoder")


def test_linked_file_is_judged_by_its_bytes(bundle, tmp_path):
    path, outside = bundle / "target/backbone.onnx", tmp_path / "outside.onnx"
    path.rename(outside)
    path.symlink_to(outside)
    assert open_bundle(bundle).graph_file("target/backbone") == path
    outside.write_bytes(outside.read_bytes() + b"x")
    with pytest.raises(BundleError, match="differs from the hash"):
        open_bundle(bundle).file("target/backbone.onnx")
    outside.unlink()
    with pytest.raises(BundleError, match="missing from the bundle"):
        open_bundle(bundle).file("target/backbone.onnx")


def test_linked_folder_is_judged_by_the_bytes_in_it(bundle, tmp_path):
    (bundle / "target").rename(tmp_path / "elsewhere")
    (bundle / "target").symlink_to(tmp_path / "elsewhere")
    assert open_bundle(bundle).graph_file("target/backbone").is_file()


def test_weights_that_no_runtime_reaches_name_the_command_that_copies(bundle, tmp_path):
    weights = bundle / "target/weights.safetensors"
    weights.rename(tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    command = f"cp -rL {bundle} {bundle.name}-copy"
    with pytest.raises(
        BundleError, match=r"is a link out of the folder of backbone\.onnx"
    ) as caught:
        open_bundle(bundle).graph_file("target/backbone")
    assert str(caught.value).endswith(command)
    subprocess.run(shlex.split(command), cwd=tmp_path, check=True)
    copied = tmp_path / f"{bundle.name}-copy"
    assert open_bundle(copied).graph_file("target/backbone").is_file()


def test_bundle_reached_through_a_link_works(bundle, tmp_path):
    (tmp_path / "link").symlink_to(bundle)
    assert open_bundle(tmp_path / "link").file("target/backbone.onnx").is_file()


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "a/../../secret",
        "/etc/passwd",
        "a\\..\\secret",
        "a//b",
        "./a",
        "",
        "a/",
        "a\0b",
    ],
)
def test_file_name_that_leaves_the_bundle(bundle, name):
    (bundle.parent / "secret").write_bytes(b"")
    record = {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0}
    changed(bundle, lambda m: m["files"].update({name: record}))
    assert "leaves the bundle" in refused(bundle)


@pytest.mark.parametrize("where", ["weights", "graph", "decoder", "decoder_weights"])
def test_every_named_file_needs_a_hash(bundle, where):
    def change(manifest):
        model = manifest["models"]["target"]
        match where:
            case "weights":
                model["weights"] = "extra"
            case "graph":
                model["graphs"]["backbone"]["file"] = "extra"
            case "decoder":
                manifest["decoder"]["file"] = "extra"
            case "decoder_weights":
                manifest["decoder_weights"] = "extra"

    changed(bundle, change)
    assert "files without a hash: ['extra']" in refused(bundle)


def test_engines_are_among_the_files_that_need_a_hash(bundle):
    manifest = make_manifest(bundle)
    engine = EngineRecord.model_construct(file="extra")
    decoder = manifest.decoder.model_copy(update={"engines": {"tensorrt": engine}})
    assert set(manifest.referenced_files()) == set(FILES)
    with_engine = manifest.model_copy(update={"decoder": decoder})
    assert set(with_engine.referenced_files()) == {*FILES, "extra"}


CHANGES = {
    "unknown field": (lambda m: m.update(plugins=["evil.so"]), "plugins: Extra inputs"),
    "unknown nested field": (lambda m: m["geometry"].update(depth=3), "geometry.depth: Extra"),
    "newer schema": (lambda m: m.update(schema_version=2), "schema_version"),
    "older schema": (lambda m: m.update(schema_version=0), "schema_version"),
    "missing field": (lambda m: m.pop("geometry"), "geometry: Field required"),
    "no target": (lambda m: m.update(models={}), "no target model"),
    "unknown role": (lambda m: m["models"].update(judge=m["models"]["target"]), "models.judge"),
    "class names": (lambda m: m.update(class_names=["cat"]), "1 class names for 2 classes"),
    "a long class name": (
        lambda m: m.update(class_names=["cat", "d" * 201]), "class_names.1: String should have",
    ),
    "short hash": (
        lambda m: m["files"]["decoder/decoder.onnx"].update(sha256="abc"), "sha256",
    ),
    "negative size": (lambda m: m["files"]["decoder/decoder.onnx"].update(bytes=-1), "bytes"),
    "no grid": (lambda m: m["geometry"].update(grid=0), "geometry.grid"),
    "colours": (lambda m: m["geometry"].update(image_channels=4), "image_channels"),
    "precision": (lambda m: m["models"]["target"].update(precision="int8"), "precision"),
    "axis range": (
        lambda m: m["decoder"]["spec"]["axes"]["rows"].update(min=9), "decoder.spec.axes.rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_invalid_manifest(bundle, case):
    change, fragment = CHANGES[case]
    changed(bundle, change)
    assert fragment in refused(bundle)


def test_missing_folder_and_missing_manifest(bundle, tmp_path):
    assert "no manifest.json there" in refused(tmp_path / "nowhere")
    (bundle / MANIFEST).unlink()
    assert "so it is not a bundle" in refused(bundle)


def test_oversized_manifest_is_not_parsed(bundle):
    content = (bundle / MANIFEST).read_bytes()
    (bundle / MANIFEST).write_bytes(content + b" " * (MAX_MANIFEST_BYTES - len(content)))
    assert open_bundle(bundle).manifest.opset == 20
    (bundle / MANIFEST).write_bytes(content + b" " * (MAX_MANIFEST_BYTES - len(content) + 1))
    assert "larger than 16 MiB" in refused(bundle)


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b'"text"', b"\xff\xfe\x00", b"<!doctype html>", b"[" * 100_000, b"NaN"],
    ids=["empty", "null", "list", "text", "binary", "html", "deep", "nan"],
)
def test_manifest_that_is_something_else(bundle, content):
    (bundle / MANIFEST).write_bytes(content)
    refused(bundle)


FROM_FIXTURE = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60
)


@FROM_FIXTURE
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_manifest(bundle, share):
    whole = make_manifest(bundle).model_dump_json().encode()
    (bundle / MANIFEST).write_bytes(whole[: int(share * len(whole))])
    refused(bundle)


@FROM_FIXTURE
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(1, 255))
def test_one_wrong_byte_in_the_manifest(bundle, place, byte):
    """Refused, or read as a manifest that differs from the original; never another exception."""
    original = make_manifest(bundle)
    content = bytearray(original.model_dump_json().encode())
    content[int(place * len(content))] ^= byte
    (bundle / MANIFEST).write_bytes(content)
    try:
        opened = open_bundle(bundle)
    except BundleError as error:
        assert str(bundle) in str(error)
    else:
        assert opened.manifest != original


def test_unknown_graph_lists_the_known_ones(bundle):
    opened = open_bundle(bundle)
    for label in ("draft/backbone", "target/denoiser", "nothing"):
        with pytest.raises(BundleError, match=f"no graph {label}, it has decoder, target/backbone"):
            opened.graph_file(label)


def test_unknown_backend(bundle):
    with pytest.raises(CspdError, match="backend 'abacus' is unknown, expected one of onnxrun"):
        open_session(open_bundle(bundle), "decoder", "abacus")


def staged(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / MANIFEST).write_text(text)
    return folder


def test_publish_to_a_free_place(tmp_path):
    publish(staged(tmp_path / "new", "new"), tmp_path / "out", overwrite=False)
    assert (tmp_path / "out" / MANIFEST).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_publish_into_an_empty_folder(tmp_path):
    (tmp_path / "out").mkdir()
    publish(staged(tmp_path / "new", "new"), tmp_path / "out", overwrite=False)
    assert (tmp_path / "out" / MANIFEST).read_text() == "new"


def test_publish_over_a_bundle_needs_overwrite(tmp_path):
    staging = staged(tmp_path / "new", "new")
    staged(tmp_path / "out", "old")
    with pytest.raises(CspdError, match="holds a bundle already; add --overwrite"):
        publish(staging, tmp_path / "out", overwrite=False)
    assert (tmp_path / "out" / MANIFEST).read_text() == "old"
    publish(staging, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / MANIFEST).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_bundle_is_never_replaced(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    else:
        out.write_text("years of work")
    with pytest.raises(CspdError, match="exists and is not a bundle"):
        check_target(out, overwrite=True)
    assert (out / "thesis.txt" if kind == "folder" else out).read_text() == "years of work"
