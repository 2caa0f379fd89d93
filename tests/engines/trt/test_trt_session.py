"""The session's dealings with TensorRT, against a run time that checks them; loading of engines.

The fake computes with ONNX Runtime from raw addresses, so results prove that shapes, addresses and
order are right. On a machine with a GPU the real engines run (marked gpu).
"""

import hashlib
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fake_gpu import FakeEngine, FakeStreams
from tiny_graphs import GetGraph, narrowed

from cspd.engines.backends import open_session
from cspd.engines.build_report import profile_shapes
from cspd.engines.bundle import Bundle
from cspd.engines.errors import BundleError, CspdError
from cspd.engines.manifest import EngineRecord, FileRecord, GraphRecord
from cspd.engines.trt import load as trt_load
from cspd.engines.trt import session as trt_session
from cspd.engines.trt.build import build_engine
from cspd.engines.trt.load import EngineFile, LoadedEngine, Placement, load_engine
from cspd.engines.trt.options import BuildOptions
from cspd.engines.trt.session import TrtSession

CPU = torch.device("cpu")


@pytest.fixture
def backbone(graph: GetGraph):
    return graph("backbone", "fp32")


@pytest.fixture
def engine(backbone) -> FakeEngine:
    return FakeEngine(backbone)


def open_fake(engine: FakeEngine, spec=None, streams=None) -> TrtSession:
    loaded = LoadedEngine(engine, engine.new_context)
    return TrtSession(spec or engine.spec, loaded, device=CPU, streams=streams or FakeStreams())


def sizes(batch: int, visible: int, positions: int) -> dict[str, int]:
    return {"batch": batch, "visible": visible, "positions": positions}


@pytest.mark.parametrize("shape", [(1, 0, 1), (3, 7, 5), (4, 16, 16)], ids=str)
def test_results_are_those_of_the_module(backbone, engine, shape):
    session = open_fake(engine)
    inputs = backbone.spec.example_inputs(sizes(*shape), seed=3)
    result = session(**inputs)["z"]
    with torch.inference_mode():
        expected = backbone.module(*inputs.values())
    assert result.shape == expected.shape
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_the_same_session_takes_one_shape_after_another(backbone, engine):
    session = open_fake(engine)
    for seed, shape in enumerate([(4, 16, 16), (1, 0, 1), (2, 3, 4), (1, 0, 2)]):
        inputs = backbone.spec.example_inputs(sizes(*shape), seed)
        with torch.inference_mode():
            expected = backbone.module(*inputs.values())
        torch.testing.assert_close(session(**inputs)["z"], expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_copied_and_outputs_keep_their_place(backbone, engine):
    session = open_fake(engine)
    inputs = backbone.spec.example_inputs(sizes(2, 3, 4))
    first = session(**inputs)["z"]
    (context,) = engine.contexts
    assert {n: context.addresses[n] for n in inputs} == {n: t.data_ptr() for n, t in inputs.items()}
    assert session(**inputs)["z"].data_ptr() == first.data_ptr() == context.addresses["z"]


def test_a_strided_input_is_read_as_it_looks(backbone, engine):
    session = open_fake(engine)
    inputs = backbone.spec.example_inputs(sizes(2, 3, 4))
    expected = session(**inputs)["z"].clone()
    wide = torch.zeros(2, inputs["tokens"].shape[1], 8)
    wide[..., ::2] = inputs["tokens"]
    strided = wide[..., ::2]
    assert not strided.is_contiguous()
    torch.testing.assert_close(session(**{**inputs, "tokens": strided})["z"], expected)


def test_work_goes_to_the_stream_that_is_current_at_the_call(backbone, engine):
    streams = FakeStreams()
    session = open_fake(engine, streams=streams)
    inputs = backbone.spec.example_inputs(sizes(1, 1, 1))
    session(**inputs)
    streams.handle = 78
    session(**inputs)
    assert engine.log == [(0, 77), (0, 78)]


def test_a_fork_has_its_own_context_and_outputs(backbone, engine):
    session = open_fake(engine)
    fork = session.fork()
    one, two = (backbone.spec.example_inputs(sizes(1, 2, 3), seed) for seed in (1, 2))
    first = session(**one)["z"]
    kept = first.clone()
    fork(**two)
    assert torch.equal(first, kept)
    assert [context for context, _ in engine.log] == [0, 1]


def test_a_request_outside_the_profile_names_the_range(backbone, engine):
    session = open_fake(engine)
    large = backbone.spec.example_inputs(sizes(5, 1, 1))
    with pytest.raises(CspdError, match=r"backbone: tokens is \[5, 16, 4\].*batch in 1\.\.4"):
        session(**large)
    assert engine.log == []


def test_tensors_of_another_device_are_refused(backbone, engine):
    session = open_fake(engine)
    inputs = backbone.spec.example_inputs(sizes(1, 1, 1))
    inputs["tokens"] = inputs["tokens"].to("meta")
    with pytest.raises(CspdError, match="tokens lies on meta, expected cpu"):
        session(**inputs)


def test_a_refusal_of_tensorrt_is_an_error(backbone, engine):
    session = open_fake(engine)
    engine.profile = {**engine.profile, "labels": ((1,), (1,), (1,))}
    with pytest.raises(CspdError, match=r"backbone: TensorRT refuses labels \[2\]"):
        session(**backbone.spec.example_inputs(sizes(2, 1, 1)))


def test_an_engine_with_a_smaller_profile_is_refused(backbone):
    smaller = narrowed(backbone.spec, batch=(1, 1, 2))
    engine = FakeEngine(backbone)
    engine.profile = FakeEngine(SimpleNamespace(path=backbone.path, spec=smaller)).profile
    with pytest.raises(BundleError, match=r"tokens in \[1, 16, 4\]\.\.\[2, 16, 4\].*\[4, 16"):
        open_fake(engine, backbone.spec)


def test_an_engine_of_another_graph_is_refused(backbone, engine):
    engine.names = [*engine.names, "extra"]
    with pytest.raises(BundleError, match=r"'extra'.*rebuild it with cspd-export build"):
        open_fake(engine)


def test_an_engine_that_reads_on_the_host_is_refused(engine):
    engine.location = "HOST"
    with pytest.raises(BundleError, match="reads tokens on the host"):
        open_fake(engine)


def test_capture_is_refused_for_loops(graph: GetGraph, engine):
    loop = FakeEngine(graph("denoiser_loop", "fp32"))
    assert open_fake(loop).capture_refusal() == "denoiser_loop holds a loop"
    assert open_fake(engine).capture_refusal() is None


# Loading


@pytest.fixture
def engine_file(tmp_path) -> EngineFile:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    path = tmp_path / "backbone.engine"
    path.write_bytes(b"engine")
    sha256 = hashlib.sha256(b"engine").hexdigest()
    return EngineFile(path, "tensorrt-rtx", trt.__version__, sha256)


PLACEMENT = Placement(CPU, "no gpu", capturable=True)


def test_a_changed_byte_is_never_loaded(engine_file, monkeypatch):
    engine_file.path.write_bytes(b"engin!")
    monkeypatch.setattr(trt_load, "import_trt", lambda flavour: pytest.fail("looked inside"))
    with pytest.raises(BundleError, match=r"differs from the hash .* cspd-export build --backend"):
        load_engine(engine_file, PLACEMENT)


def test_a_missing_file_is_named(engine_file):
    engine_file.path.unlink()
    with pytest.raises(BundleError, match=r"backbone\.engine: cannot be read \(No such file"):
        load_engine(engine_file, PLACEMENT)


def test_another_version_is_refused_before_it_is_opened(engine_file):
    old = EngineFile(engine_file.path, "tensorrt-rtx", "1.0.0.1", engine_file.sha256)
    with pytest.raises(BundleError, match=r"built with tensorrt-rtx 1\.0\.0\.1, .* is installed"):
        load_engine(old, PLACEMENT)


@pytest.mark.parametrize("content", ["not an engine", "an engine"])
def test_what_does_not_run_here_is_refused_by_tensorrt(
    graph: GetGraph, engine_file, content, request
):
    if content == "an engine":
        if torch.cuda.is_available():
            pytest.skip("there is a GPU, where the engine may run")
        tiny = graph("decoder", "fp32")
        report = build_engine(tiny.path, tiny.spec, BuildOptions(), engine_file.path)
        engine_file = EngineFile(engine_file.path, "tensorrt-rtx", report.version, report.sha256)
        words = "no GPU or driver found, see cspd-run doctor"
    else:
        words = "MALFORMED_ENGINE"
    with pytest.raises(BundleError, match=words) as error:
        load_engine(engine_file, PLACEMENT)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("validity", ["INVALID", "SUBOPTIMAL"])
def test_the_verdict_of_tensorrt_rtx_comes_before_the_loading(engine_file, validity):
    """An engine for other GPUs; the verdict itself needs one, so it is given."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    verdict = trt.EngineValidity.__members__[validity]
    reason = int(trt.EngineInvalidityDiagnostics.UNSUPPORTED_CC)
    runtime = SimpleNamespace(get_engine_validity=lambda blob: (verdict, reason))
    if validity == "SUBOPTIMAL":
        (note,) = trt_load._check_validity(trt, runtime, b"", engine_file, [])
        assert "slower than it could (UNSUPPORTED_CC); rebuild it with" in note
        return
    with pytest.raises(BundleError) as error:
        trt_load._check_validity(trt, runtime, b"", engine_file, ["[x] wrong GPU"])
    assert str(error.value) == (
        "backbone.engine: does not run on this machine (UNSUPPORTED_CC: [x] wrong GPU); "
        "rebuild it with: cspd-export build --backend tensorrt-rtx"
    )


class FakeRuntime:
    """What `trt.Runtime` is to loading; remembers its settings."""

    def __init__(self, logger: object) -> None:
        self.engine_host_code_allowed = None

    def deserialize_cuda_engine(self, blob: bytes) -> object:
        assert self.engine_host_code_allowed is False
        return FakeLoaded() if blob == b"engine" else None


class FakeLoaded:
    device_memory_size_v2 = 4096

    def create_execution_context(self, strategy: str) -> SimpleNamespace:
        context = SimpleNamespace(strategy=strategy, memory=None)
        context.set_device_memory = lambda address, size: setattr(
            context, "memory", (address, size)
        )
        return context


@pytest.fixture
def fake_tensorrt(monkeypatch):
    """The module `tensorrt`, whose libraries need a GPU, as far as loading uses it."""
    severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1)
    module = SimpleNamespace(
        __version__="11.4.0",
        Runtime=FakeRuntime,
        ILogger=type("ILogger", (), vars(severity)),
        ExecutionContextAllocationStrategy=SimpleNamespace(STATIC="static", USER_MANAGED="user"),
    )
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    trt_load.trt_log.cache_clear()
    yield module
    trt_load.trt_log.cache_clear()


def plain_file(path, content: bytes) -> EngineFile:
    path.write_bytes(content)
    return EngineFile(path, "tensorrt", "11.4.0", hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("capturable", [True, False])
def test_contexts_share_the_memory_that_torch_owns(fake_tensorrt, tmp_path, capturable):
    file = plain_file(tmp_path / "x.engine", b"engine")
    loaded = load_engine(file, Placement(CPU, "gpu", capturable))
    one, two = loaded.new_context(), loaded.new_context()
    assert one is not two
    assert one.strategy == ("user" if capturable else "static")
    assert one.memory == two.memory
    assert (one.memory is not None) == capturable
    loaded.save_cache()
    assert [path.name for path in tmp_path.iterdir()] == ["x.engine"]


def test_an_engine_for_another_gpu_is_refused_in_one_line(fake_tensorrt, tmp_path):
    file = replace(plain_file(tmp_path / "x.engine", b"of another GPU"), gpu="NVIDIA A100")
    with pytest.raises(BundleError) as error:
        load_engine(file, Placement(CPU, "NVIDIA H100", True))
    assert str(error.value) == (
        "x.engine: TensorRT cannot load it (built on NVIDIA A100, this is NVIDIA H100: "
        "TensorRT gave no reason); rebuild it with: cspd-export build --backend tensorrt"
    )


class FakeCache:
    def __init__(self) -> None:
        self.content = b"fresh"

    def deserialize(self, blob: bytes) -> bool:
        if blob == b"stale":
            return False
        self.content = blob
        return True

    def serialize(self) -> bytes:
        return self.content + b"+"


def test_compiled_kernels_are_kept_per_engine_and_gpu(tmp_path):
    file = plain_file(tmp_path / "x.engine", b"engine")
    name = trt_load._cache_name(file, "NVIDIA GeForce RTX 4090")
    assert name == f"{file.sha256[:16]}-11.4.0-nvidia-geforce-rtx-4090.cache"
    path = tmp_path / "cache" / name
    config = SimpleNamespace(create_runtime_cache=FakeCache, set_runtime_cache=lambda cache: None)
    empty = LoadedEngine(None, lambda: None)
    trt_load._attach_cache(empty, config, path).save_cache()
    assert path.read_bytes() == b"fresh+"
    assert path.parent.stat().st_mode & 0o077 == 0
    trt_load._attach_cache(empty, config, path).save_cache()
    assert path.read_bytes() == b"fresh++"
    path.write_bytes(b"stale")
    stale = trt_load._attach_cache(empty, config, path)
    assert "kernels are compiled again" in stale.notes[0]
    stale.save_cache()
    assert path.read_bytes() == b"fresh+"


# Opening from a bundle


@pytest.fixture
def bundle(backbone, tmp_path) -> Bundle:
    """A bundle with one graph and a record of its tensorrt-rtx engine."""
    built = EngineRecord(
        file="target/backbone.engine",
        flavour="tensorrt-rtx",
        version="1.7",
        compute_capabilities=(),
        gpu=None,
        profile=profile_shapes(backbone.spec),
        sha256="a" * 64,
        bytes=6,
        seconds=1.0,
        peak_memory_bytes=None,
    )
    record = GraphRecord(
        spec=backbone.spec, file="x.onnx", engines={"tensorrt-rtx": built}, measured_error=0.0
    )
    manifest = SimpleNamespace(
        graphs=lambda: {"target/backbone": record},
        files={"target/backbone.engine": FileRecord(sha256="a" * 64, bytes=6)},
    )
    return Bundle(tmp_path, manifest)


def test_a_bundle_opens_what_its_manifest_vouches_for(bundle, engine, monkeypatch):
    asked = []

    def load(file: EngineFile, placement: Placement) -> LoadedEngine:
        asked.append((file, placement.capturable))
        return LoadedEngine(engine, engine.new_context)

    monkeypatch.setattr(trt_session, "load_engine", load)
    monkeypatch.setattr(trt_session, "_cuda_device", lambda flavour, device: CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    session = open_session(bundle, "target/backbone", "tensorrt-rtx", device="cuda")
    assert session.spec == engine.spec
    path = bundle.folder / "target/backbone.engine"
    assert asked == [(EngineFile(path, "tensorrt-rtx", "1.7", "a" * 64), True)]


def test_a_bundle_without_an_engine_says_how_to_get_one(bundle):
    words = "target/backbone has no tensorrt engine; build it with: cspd-export build --backend"
    with pytest.raises(BundleError, match=words):
        open_session(bundle, "target/backbone", "tensorrt", device="cuda")


def test_engines_do_not_run_on_the_cpu(bundle, monkeypatch):
    with pytest.raises(CspdError, match="tensorrt-rtx runs on a GPU, got cpu; use --device cuda"):
        open_session(bundle, "target/backbone", "tensorrt-rtx", device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CspdError, match="torch sees no GPU; run cspd-run doctor"):
        open_session(bundle, "target/backbone", "tensorrt-rtx", device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("name", ["backbone", "denoiser", "denoiser_loop", "decoder"])
def test_real_engines_agree_with_the_modules(graph: GetGraph, tmp_path, flavour, name):
    pytest.importorskip(flavour.replace("-", "_"), reason=f"{flavour} is not installed")
    tiny, path = graph(name, "fp32"), tmp_path / "graph.engine"
    report = build_engine(tiny.path, tiny.spec, BuildOptions(flavour=flavour), path)
    device = torch.device("cuda", 0)
    file = EngineFile(path, flavour, report.version, report.sha256)
    gpu = torch.cuda.get_device_name(device)
    loaded = load_engine(file, Placement(device, gpu, tiny.spec.capturable, tmp_path / "cache"))
    session = TrtSession(tiny.spec, loaded, device=device)
    stream = torch.cuda.Stream(device)
    for seed, which in enumerate(("min", "opt", "max")):
        inputs = tiny.spec.example_inputs(tiny.spec.sizes(which), seed)
        if "schedule" in inputs:
            inputs["schedule"] *= 0.1
        with torch.inference_mode():
            expected = tiny.module(*inputs.values())
        expected = expected if isinstance(expected, tuple) else (expected,)
        with torch.cuda.stream(stream):
            results = session(**{key: value.to(device) for key, value in inputs.items()})
            results = {key: value.cpu() for key, value in results.items()}
        for tensor, value in zip(tiny.spec.outputs, expected, strict=True):
            torch.testing.assert_close(results[tensor.name], value, rtol=1e-3, atol=1e-4)
    session.save_cache()
