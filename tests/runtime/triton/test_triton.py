"""The Triton repository, as far as it can be checked without a Triton server."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

import fake_triton
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from cspd.engines.bundle import MANIFEST, hash_file, open_bundle
from cspd.engines.errors import BundleError, CspdError
from cspd.engines.manifest import EngineRecord
from cspd.engines.sessions.ort import ort_session
from cspd.engines.spec import Axis, GraphSpec, TensorSpec
from cspd.export.cli import main
from cspd.runtime.commands.cli import shipped_bundle
from cspd.runtime.config import make_config
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.sessions import Sessions
from cspd.runtime.triton import repository as triton
from cspd.runtime.triton.config import batch_axis

PARAMETERS = {"backend": "onnxruntime", "threads": "1", "max_images": "4"}
QUICK = {"num_iter": 4, "head_steps": 5, "cfg": 6.0}


@pytest.fixture(scope="module")
def bundle():
    return open_bundle(shipped_bundle())


@pytest.fixture(scope="module")
def repository(bundle, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "repository"
    triton.write_repository(bundle, out, "cpu", PARAMETERS)
    return out


def config_of(folder: Path) -> ModelConfig:
    """The config as Triton's own schema reads it; unknown fields and bad types raise."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_one_model_per_graph_and_one_for_the_loop(bundle, repository):
    expected = {label.replace("/", "_") for label in bundle.manifest.graphs()} | {"cspd"}
    assert {path.name for path in repository.iterdir()} == expected
    for folder in repository.iterdir():
        assert config_of(folder).name == folder.name
        assert [path.name for path in folder.iterdir() if path.is_dir()] == ["1"]


def test_configs_say_what_the_contract_says(bundle, repository):
    types = {"float32": DataType.TYPE_FP32, "int32": DataType.TYPE_INT32}
    for label, graph in bundle.manifest.graphs().items():
        config = config_of(repository / label.replace("/", "_"))
        batched = config.max_batch_size > 0
        assert (config.backend, config.HasField("dynamic_batching")) == ("onnxruntime", batched)
        for ports, tensors in (
            (config.input, graph.spec.inputs),
            (config.output, graph.spec.outputs),
        ):
            assert [port.name for port in ports] == [tensor.name for tensor in tensors]
            for port, tensor in zip(ports, tensors, strict=True):
                shape = [-1 if isinstance(axis, str) else axis for axis in tensor.shape]
                dims = list(port.reshape.shape) if port.HasField("reshape") else list(port.dims)
                assert [-1] * batched + dims == shape
                assert port.data_type == types[tensor.dtype]
                assert len(port.dims) > 0  # Triton refuses a tensor without sizes


def test_only_graphs_whose_rows_are_independent_are_batched(bundle, repository):
    limits = {
        label: config_of(repository / label.replace("/", "_")).max_batch_size
        for label in bundle.manifest.graphs()
    }
    batched = {label for label, limit in limits.items() if limit}
    assert batched == {"target/backbone", "draft/backbone", "decoder"}
    for label in batched:
        assert limits[label] == bundle.graph(label).spec.axes["batch"].max


def tensors(**shapes) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=name, shape=shape) for name, shape in shapes.items())


@pytest.mark.parametrize(
    "inputs, outputs, expected",
    [
        (tensors(x=("n", 2)), tensors(y=("n",)), "n"),
        (tensors(x=("n", 2), z=("m",)), tensors(y=("n",)), None),
        (tensors(x=("n", "n")), tensors(y=("n",)), None),
        (tensors(x=(4, 2)), tensors(y=(4,)), None),
        (tensors(x=("n",), z=()), tensors(y=("n",)), None),
        (tensors(x=("n",)), tensors(y=(2, "n")), None),
        (
            (TensorSpec(name="i", dtype="int32", shape=("n",), below="n"),), tensors(y=("n",)),
            None,
        ),
    ],
)  # fmt: skip
def test_batch_axis(inputs, outputs, expected):
    axes = {"n": Axis(min=1, opt=2, max=4), "m": Axis(min=1, opt=2, max=4)}
    assert batch_axis(GraphSpec(name="g", inputs=inputs, outputs=outputs, axes=axes)) == expected


def test_every_graph_runs_from_its_folder(bundle, repository):
    """Weights resolve from where each file lies, and the results are those of the bundle."""
    for label, graph in bundle.manifest.graphs().items():
        path = repository / label.replace("/", "_") / "1" / "model.onnx"
        path = path / "model.onnx" if path.is_dir() else path
        inputs = graph.spec.example_inputs({n: max(a.min, 2) for n, a in graph.spec.axes.items()})
        got = ort_session(str(path), graph.spec, threads=1)(**inputs)
        expected = ort_session(str(bundle.graph_file(label)), graph.spec, threads=1)(**inputs)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=0, equal_nan=True)


def test_weights_are_stored_once(repository, bundle):
    for role in ("target", "draft"):
        files = list(repository.glob(f"{role}_*/1/model.onnx/weights.safetensors"))
        assert len(files) == len(bundle.manifest.models[role].graphs)
        assert len({path.stat().st_ino for path in files}) == 1


def test_without_hard_links_files_are_copied(bundle, repository, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    triton.write_repository(bundle, tmp_path / "copied", "cpu", PARAMETERS)
    assert contents(tmp_path / "copied") == contents(repository)


def test_two_exports_are_the_same_bytes(bundle, repository, tmp_path):
    triton.write_repository(bundle, tmp_path / "again", "cpu", PARAMETERS)
    assert contents(tmp_path / "again") == contents(repository)


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling"])
def test_nothing_is_ever_replaced(bundle, tmp_path, kind):
    out = tmp_path / "out"
    match kind:
        case "folder":
            out.mkdir()
            (out / "thesis.txt").write_text("work")
        case "file":
            out.write_text("work")
        case "link":
            (tmp_path / "empty").mkdir()
            out.symlink_to(tmp_path / "empty")
        case "dangling":
            out.symlink_to(tmp_path / "nowhere")
    before = contents(tmp_path)
    with pytest.raises(CspdError, match="choose another --out"):
        triton.write_repository(bundle, out, "cpu", PARAMETERS)
    assert contents(tmp_path) == before


def test_damaged_bundle_leaves_nothing_behind(bundle, tmp_path):
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    (tmp_path / "bundle/draft/denoiser.onnx").write_bytes(b"something else")
    with pytest.raises(BundleError, match="differs from the hash"):
        triton.write_repository(
            open_bundle(tmp_path / "bundle"), tmp_path / "out", "cpu", PARAMETERS
        )
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_graphs_with_an_engine_use_it_on_a_gpu(bundle, tmp_path):
    """The plan here is a few bytes: only the layout and the config are looked at."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    (folder / "decoder/decoder.plan").write_bytes(b"plan")
    record = hash_file(folder / "decoder/decoder.plan")
    engine = EngineRecord(
        file="decoder/decoder.plan", flavour="tensorrt", version="10.8", gpu="a GPU",
        compute_capabilities=(), profile={}, seconds=1, peak_memory_bytes=None, **dict(record),
    )  # fmt: skip
    manifest = bundle.manifest.model_dump()
    manifest["decoder"]["engines"] = {"tensorrt": engine.model_dump()}
    manifest["files"][engine.file] = record.model_dump()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    triton.write_repository(open_bundle(folder), tmp_path / "out", "cuda", PARAMETERS)
    config = config_of(tmp_path / "out/decoder")
    assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")
    assert (tmp_path / "out/decoder/1/model.plan").read_bytes() == b"plan"
    assert not (tmp_path / "out/decoder/1/model.onnx").exists()
    assert config_of(tmp_path / "out/target_backbone").backend == "onnxruntime"
    for name in ("decoder", "cspd", "target_backbone"):
        group = config_of(tmp_path / "out" / name).instance_group
        assert [item.kind for item in group] == [ModelInstanceGroup.KIND_GPU]


@pytest.fixture
def loop(repository, monkeypatch):
    """The Python model as Triton would load it, on the stand-in, and its config."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_triton.module())
    folder = repository / "cspd"
    spec = importlib.util.spec_from_file_location("triton_loop", folder / "1/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = config_of(folder)
    model = module.TritonPythonModel()
    parameters = {key: {"string_value": v.string_value} for key, v in config.parameters.items()}
    model.initialize({
        "model_config": json.dumps({"parameters": parameters}), "model_name": "cspd",
        "model_repository": str(folder), "model_version": "1", "model_instance_kind": "CPU",
        "model_instance_device_id": "0",
    })  # fmt: skip
    return model, config


@pytest.mark.parametrize("method", ["target", "cspd"])
def test_the_loop_makes_the_images_of_the_pipeline(loop, bundle, method):
    model, config = loop
    labels = [7, 8, 9]
    request = fake_triton.make_request(
        config, labels=labels, method=method.encode(), seed=5, **QUICK
    )
    (response,) = model.execute([request])
    outputs = fake_triton.check_response(config, response)
    # As the command chooses it: three images in one batch of three.
    settings = make_config(
        labels=labels, num_images=3, method=method, seed=5, batch_size=3, **QUICK
    )
    made = [
        i for batch, _ in Pipeline(Sessions(bundle, threads=1)).generate(settings) for i in batch
    ]
    assert np.array_equal(outputs["images"], np.stack([image.pixels for image in made]))
    assert outputs["accepted"].tolist() == [image.verdicts.accepted for image in made]
    assert outputs["proposed"].tolist() == [image.verdicts.proposed for image in made]
    assert (outputs["proposed"] > 0).all() == (method == "cspd")
    record = json.loads(outputs["config"][0])
    assert record == {"config": settings.model_dump(mode="json"), "bundle": bundle.sha256}


def test_no_request_waits_for_a_measurement(loop, monkeypatch):
    """A method by costs speculates with the usual window, and says so in what comes back."""
    model, config = loop
    monkeypatch.setattr("cspd.runtime.costs.measure.measure", lambda *_: pytest.fail("measured"))
    (response,) = model.execute(
        [fake_triton.make_request(config, labels=[1], method=b"lossless", **QUICK)]
    )
    outputs = fake_triton.check_response(config, response)
    assert json.loads(outputs["config"][0])["config"]["window"] == 8


@pytest.mark.parametrize(
    "values, message",
    [
        ({"labels": []}, r"labels: \[0\], expected \[1..4\]"),
        ({"labels": [1] * 5}, r"labels: \[5\], expected"),
        ({"labels": [10]}, "class 10, expected 0..9"),
        ({"labels": [-1]}, "class -1"),
        ({"labels": [1], "method": b"magic"}, "^method is "),
        ({"labels": [1], "method": b"\xff"}, "^method is "),
        ({"labels": [1], "cfg": float("nan")}, "^cfg is "),
        ({"labels": [1], "num_iter": 1000}, "^num_iter is "),
        ({"labels": [1], "head_steps": 1}, "^head_steps is "),
    ],
)
def test_a_bad_request_gets_an_error_of_its_own(loop, values, message):
    model, config = loop
    good = fake_triton.make_request(config, labels=[1], method=b"target", **QUICK)
    bad, fine = model.execute([fake_triton.make_request(config, **values), good])
    assert re.search(message, str(bad.error)) and "\n" not in str(bad.error)
    assert fake_triton.check_response(config, fine)["images"].shape[0] == 1


def test_command(bundle, repository, tmp_path):
    arguments = ["triton", str(bundle.folder), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, [*arguments, "--threads", "1", "--max-images", "4"])
    out = tmp_path / "out"
    files = [path for path in out.rglob("*") if path.is_file()]
    assert (done.exit_code, done.output) == (
        0,
        f"{len(bundle.manifest.graphs()) + 1} models, {len(files)} files in {out}; "
        f"next: tritonserver --model-repository={out}\n",
    )
    assert contents(out) == contents(repository)
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 1 and "not an empty folder" in again.output
