"""Files of a bundle cut, flipped, grown, exchanged; and graphs that name files outside of it.

Half of the cases keep the manifest's hash, so that nothing may be read beyond it; in the other half
somebody wrote the matching hash, and the parsers see the damage.
"""

import json
import os

import onnx
import pytest
from broken_graphs import larger
from fuzz_counts import FULL
from harness import budget, check, quick, run_case, run_command, run_here
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import damaged

from cspd.engines.bundle import MANIFEST, hash_file, open_bundle
from cspd.engines.sessions.ort import open_session
from cspd.runtime.commands.cli import main, shipped_bundle

SHIPPED = open_bundle(shipped_bundle())
FILES = sorted(SHIPPED.manifest.files)
CONTENT = {name: SHIPPED.file(name).read_bytes() for name in FILES}
GRAPHS = {graph.file: label for label, graph in SHIPPED.manifest.graphs().items()}


def replace(bundle, name: str, content: bytes, *, vouched: bool) -> None:
    """Put `content` in the place of a file; with `vouched` the manifest gets its hash."""
    (bundle / name).unlink()
    (bundle / name).write_bytes(content)
    if vouched:
        document = json.loads((bundle / MANIFEST).read_bytes())
        document["files"][name] = hash_file(bundle / name).model_dump()
        (bundle / MANIFEST).unlink()
        (bundle / MANIFEST).write_text(json.dumps(document))


def user(name: str) -> tuple[str, str]:
    """Method and backend whose run reads the file `name`."""
    role, _, file = name.partition("/")
    method = "draft" if role == "draft" else "target"
    if file == "speculative_loop.onnx":
        method = "lossless"
    return method, "torch" if file == "denoiser.onnx" else "onnxruntime"


def generate(arena, bundle, target: str, method: str, backend: str):
    out = bundle.parent / "out"
    arguments = ["generate", str(bundle), "--out", str(out), *quick(method)]
    call = run_command(main, [*arguments, "--backend", backend])
    return check(run_case(target, call, bundle.parent))


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(arena, name):
    """First, last and middle byte, every bit, of every file that a bundle holds."""
    for place in (0, len(CONTENT[name]) // 2, len(CONTENT[name]) - 1):
        for bit in range(8) if FULL else (place % 8,):
            content = bytearray(CONTENT[name])
            content[place] ^= 1 << bit
            bundle = arena.bundle()
            replace(bundle, name, bytes(content), vouched=False)
            ending = check(run_here(
                "bundle: flipped bits", lambda b=bundle: open_bundle(b).file(name), bundle.parent
            ))  # fmt: skip
            assert ending.kind == "refused" and "differs from the hash" in ending.text


@budget(full=300, ci=8)
@given(name=st.sampled_from(FILES), data=st.data())
def test_damage_is_found_before_anything_is_read(arena, name, data):
    content = data.draw(damaged(CONTENT[name]))
    bundle = arena.bundle()
    replace(bundle, name, content, vouched=False)
    call = run_here("bundle: damaged", lambda: open_bundle(bundle).file(name), bundle.parent)
    assert (check(call).kind == "refused") == (content != CONTENT[name])


@budget(full=30, ci=4)
@given(name=st.sampled_from(FILES), data=st.data())
def test_damage_that_somebody_vouches_for(arena, name, data):
    bundle = arena.bundle()
    replace(bundle, name, data.draw(damaged(CONTENT[name])), vouched=True)
    method, backend = user(name)
    if name.endswith(".safetensors"):
        backend = data.draw(st.sampled_from(["onnxruntime", "torch"]))
    generate(arena, bundle, "bundle: vouched damage", method, backend)


@budget(full=20, ci=3)
@given(name=st.sampled_from(sorted(GRAPHS)), other=st.sampled_from(FILES))
def test_files_exchanged_with_others(arena, name, other):
    bundle = arena.bundle()
    replace(bundle, name, CONTENT[other], vouched=True)
    generate(arena, bundle, "bundle: exchanged", *user(name))


LOCATIONS = ["../../secret.txt", "../secret.bin", "/etc/passwd", "../../../../../../etc/passwd",
             "link", "folder/secret.bin", "unlisted.bin", "", ".", "..", "/dev/zero",
             "/proc/self/mem", "weights.safetensors/", "./weights.safetensors",
             "../draft/weights.safetensors",
             "a\nb", "x" * 5000, "\u202e", "//etc/passwd", "C:\\secret",
             "weights.safetensors\0"]  # fmt: skip


@budget(full=250, ci=10)
@given(
    name=st.sampled_from([n for n in sorted(GRAPHS) if "/d" in n and n.startswith("d")]),
    location=st.one_of(st.sampled_from(LOCATIONS), st.text(max_size=10)),
    offset=st.sampled_from([None, "0", "-1", "99999999999999", "9" * 30, "x"]),
    length=st.sampled_from([None, "0", "-1", "4", "99999999999999", "9" * 30]),
)
@example(name="draft/denoiser.onnx", location="unlisted.bin", offset=None, length=None)
@example(name="draft/denoiser.onnx", location="link", offset=None, length=None)
def test_names_of_external_data(arena, name, location, offset, length):
    """Only the weights file that the manifest lists is ever opened, whatever a graph names."""
    model = onnx.load_from_string(CONTENT[name])
    for tensor in model.graph.initializer:
        for item in tensor.external_data:
            changed = {"location": location, "offset": offset, "length": length}[item.key]
            item.value = item.value if changed is None else changed
    bundle = arena.bundle()
    (bundle.parent / "secret.bin").write_bytes(CONTENT["draft/weights.safetensors"])
    (bundle / "draft/unlisted.bin").write_bytes(CONTENT["draft/weights.safetensors"])
    os.symlink(bundle.parent / "secret.bin", bundle / "draft/link")
    os.symlink(bundle.parent, bundle / "draft/folder")
    replace(bundle, name, model.SerializeToString(), vouched=True)
    opened = open_bundle(bundle)
    call = run_here(
        "bundle: names of external data",
        lambda: open_session(opened, GRAPHS[name], device="cpu", threads=1), bundle.parent,
    )  # fmt: skip
    external = any(tensor.external_data for tensor in model.graph.initializer)
    ending = check(call)
    if external and location != "weights.safetensors":
        assert ending.kind == "refused" and "wants to read" in ending.text


@budget(full=30, ci=5)
@given(dims=st.lists(st.sampled_from([0, 1, 2**20, 2**31, 2**40, 2**63 - 1, -1]), max_size=4),
       where=st.sampled_from(["external", "raw", "data", "input", "constant"]))  # fmt: skip
@example(dims=[2**40], where="external")
@example(dims=[2**31, 2**31], where="constant")
def test_tensors_of_terabytes(arena, dims, where):
    """Graphs that declare tensors which no machine holds."""
    model = onnx.load_from_string(CONTENT["draft/denoiser.onnx"])
    tensor = next(t for t in model.graph.initializer if t.external_data)
    match where:
        case "external":
            tensor.dims[:] = dims
        case "raw":
            tensor.ClearField("external_data")
            tensor.dims[:], tensor.raw_data, tensor.data_location = dims, bytes(4), 0
        case "data":
            tensor.ClearField("external_data")
            tensor.dims[:], tensor.data_location = dims, 0
            tensor.float_data[:] = [0.0]
        case "input":
            shape = model.graph.input[0].type.tensor_type.shape
            for axis, size in zip(shape.dim, dims, strict=False):
                axis.dim_value = size
        case _:
            size = onnx.helper.make_tensor("n", onnx.TensorProto.INT64, [len(dims)], dims)
            model.graph.node.insert(0, onnx.helper.make_node("ConstantOfShape", ["n"], ["huge"]))
            model.graph.initializer.append(size)
            model.graph.output.append(
                onnx.helper.make_tensor_value_info("huge", onnx.TensorProto.FLOAT, None)
            )
    bundle = arena.bundle()
    replace(bundle, "draft/denoiser.onnx", model.SerializeToString(), vouched=True)
    opened = open_bundle(bundle)

    def call():
        session = open_session(opened, "draft/denoiser", device="cpu", threads=1)
        axes = {name: max(axis.min, 2) for name, axis in session.spec.axes.items()}
        session(**session.spec.example_inputs(axes))

    check(run_case("bundle: tensors of terabytes", call, bundle.parent))


def test_images_that_no_memory_holds(arena):
    """Images of 40,000 x 40,000 do not fit into the child: refused, and none is written."""
    bundle = arena.bundle()
    replace(
        bundle,
        "decoder/decoder.onnx",
        larger(CONTENT["decoder/decoder.onnx"], 40_000),
        vouched=True,
    )
    ending = generate(arena, bundle, "bundle: tensors of terabytes", "target", "onnxruntime")
    assert ending.kind == "refused" and not list(bundle.parent.rglob("*.png"))


KINDS = ["link out", "link in", "folder", "missing", "empty", "fifo", "parent link", "grown"]


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
@pytest.mark.parametrize("kind", KINDS)
def test_something_else_in_the_place_of_a_file(arena, name, kind):
    """Every kind of file times everything that may lie there instead."""
    bundle = arena.bundle()
    path = bundle / name
    content = path.read_bytes()
    path.unlink()
    match kind:
        case "link out":
            (bundle.parent / "elsewhere").write_bytes(content)
            path.symlink_to(bundle.parent / "elsewhere")
        case "link in":
            (bundle / "same").write_bytes(content)
            path.symlink_to(bundle / "same")
        case "folder":
            path.mkdir()
        case "empty":
            path.write_bytes(b"")
        case "fifo":
            os.mkfifo(path)
        case "parent link":
            path.write_bytes(content)
            if path.parent != bundle:
                path.parent.rename(bundle.parent / "moved")
                path.parent.symlink_to(bundle.parent / "moved")
        case "grown":
            path.write_bytes(content)
            os.truncate(path, len(content) + (48 << 20))

    def call():
        opened = open_bundle(bundle)
        for file in opened.manifest.files:
            opened.file(file)

    ending = check(run_here("bundle: exhaustive kinds", call, bundle.parent))
    # A file may be reached through a link: what counts is that its bytes have the right hash.
    assert (ending.kind == "ok") == (kind in ("link out", "link in", "parent link"))
