"""The denoising loop of engines inside whole runs: captured per row bucket, or else noted.

Engines are the stand-in of fake_gpu, which computes with ONNX Runtime from raw addresses.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from fake_gpu import FakeEngine, FakeGraphs, FakeStreams
from tiny_pair import CLIPPED

from cspd.engines import machine
from cspd.engines.backends import open_session
from cspd.engines.schedule import make_schedule
from cspd.engines.spec import Axis, GraphSpec
from cspd.engines.trt.load import LoadedEngine
from cspd.engines.trt.session import TrtSession
from cspd.runtime.commands import run
from cspd.runtime.commands.cli import main
from cspd.runtime.config import make_config
from cspd.runtime.heads import captured as captured_module
from cspd.runtime.heads.base import Rows
from cspd.runtime.heads.captured import bucket
from cspd.runtime.heads.plain import LoopHead, StepHead
from cspd.runtime.noise import Noise, Purpose
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.sessions import Sessions

SETTINGS = {
    "labels": (3, 417), "num_images": 3, "batch_size": 2, "num_iter": 4, "head_steps": 5,
    "cfg": 2.0, "backend": "tensorrt-rtx",
}  # fmt: skip
ENGINES_OF_STEPS = ("denoiser", "denoiser_first", "denoiser_hoisted", "head_modulation")
NOTE = "target/denoiser: runs, but slower than it could"


@dataclass(frozen=True)
class EngineGraph:
    """What the stand-in needs of a graph."""

    path: Path
    spec: GraphSpec


@dataclass
class Engines:
    """Opens stand-ins for the graphs of plain sampling, and keeps them by label."""

    opened: dict[str, FakeEngine] = field(default_factory=dict)

    def __call__(self, bundle, label, backend, *, device, threads):
        if label.rpartition("/")[2] not in ENGINES_OF_STEPS:
            return open_session(bundle, label, "onnxruntime", threads=1)
        graph = EngineGraph(bundle.graph_file(label), bundle.graph(label).spec)
        self.opened[label] = engine = FakeEngine(graph)
        notes = (NOTE,) if label == "target/denoiser" else ()
        loaded = LoadedEngine(engine, engine.new_context, notes)
        return TrtSession(graph.spec, loaded, device=torch.device("cpu"), streams=FakeStreams())


@pytest.fixture
def engines() -> Engines:
    return Engines()


def pixels(pipeline: Pipeline, config) -> torch.Tensor:
    images = [image for batch, _ in pipeline.generate(config) for image in batch]
    return torch.stack([torch.from_numpy(image.pixels).int() for image in images])


def by_loop_graph(bundle, method: str) -> torch.Tensor:
    """The same images by the loop graph in ONNX Runtime."""
    config = make_config(**{**SETTINGS, "method": method, "backend": "onnxruntime"})
    return pixels(Pipeline(Sessions(bundle, threads=1)), config)


@pytest.mark.parametrize("method", ["target", "cspd"])
def test_replayed_loops_make_the_images_of_the_loop_graph(tiny_bundle, engines, method):
    graphs = FakeGraphs()
    pipeline = Pipeline(Sessions(tiny_bundle, "tensorrt-rtx", opener=engines), graphs=graphs)
    made = pixels(pipeline, make_config(**SETTINGS, method=method))
    # A rounding at the edge of a grey value may tip over.
    assert (made - by_loop_graph(tiny_bundle, method)).abs().max() <= 1
    assert set(pipeline.heads.captures) == (
        {"target"} if method == "target" else {"target", "draft"}
    )
    assert graphs.captures == sum(stats.captured for stats in pipeline.heads.captures.values())
    for role, stats in pipeline.heads.captures.items():
        # Every bucket runs eagerly once and is replayed after that; two batches need the same ones.
        assert stats.captured == stats.eager == len(engines.opened[f"{role}/denoiser"].contexts) - 1
        assert stats.replayed >= stats.captured > 0
        assert stats.fallbacks == []
    assert pipeline.sessions.notes == [NOTE]
    # A replay counts like the calls it stands for.
    steps = pipeline.heads.captures["target"]
    calls = SETTINGS["head_steps"] * (steps.eager + steps.replayed)
    assert pipeline.sessions.calls["target/denoiser"].calls == calls


def test_hoisted_loops_make_the_images_of_the_other_graphs(hoisted_bundle, engines):
    """In fp16, with the first step in float32."""
    config = make_config(**SETTINGS, method="target")
    pipeline = Pipeline(
        Sessions(hoisted_bundle, "tensorrt-rtx", opener=engines), graphs=FakeGraphs()
    )
    made = pixels(pipeline, config)
    loops = pipeline.heads.captures["target hoisted"]
    assert loops.captured == loops.eager and loops.replayed >= loops.captured > 0
    assert loops.fallbacks == []
    # One table a loop, one first step; nothing is left to the step with conditions.
    count, calls = loops.eager + loops.replayed, pipeline.sessions.calls
    assert calls["target/head_modulation"].calls == calls["target/denoiser_first"].calls == count
    assert calls["target/denoiser_hoisted"].calls == (SETTINGS["head_steps"] - 1) * count
    assert calls["target/denoiser"].calls == 0
    for name in ("denoiser_hoisted", "head_modulation"):
        assert len(engines.opened[f"target/{name}"].contexts) - 1 == loops.captured
    expected = pixels(Pipeline(Sessions(hoisted_bundle, threads=1)), config)
    # The modulations of the other graph are rounded to half precision.
    assert (made - expected).abs().float().mean() < 1 and expected.float().std() > 20


def test_without_memory_for_a_table_nothing_is_hoisted(hoisted_bundle, engines):
    """All 16 tokens of an image with 100 steps and guidance need 3 MiB."""
    pipeline = Pipeline(
        Sessions(hoisted_bundle, "tensorrt-rtx", opener=engines), graphs=FakeGraphs()
    )
    values = {**SETTINGS, "num_images": 1, "batch_size": 1, "num_iter": 1, "head_steps": 100}
    pixels(pipeline, make_config(**values, method="target", modulation_memory=1))
    assert pipeline.heads.captures["target hoisted"].eager == 0
    assert pipeline.heads.captures["target"].eager == 1


def test_speculation_is_hoisted_too(hoisted_bundle, engines):
    config = make_config(**SETTINGS, method="lossless", window=3)
    pipeline = Pipeline(Sessions(hoisted_bundle, "tensorrt-rtx", opener=engines))
    made = pixels(pipeline, config)
    calls = {label: stats.calls for label, stats in pipeline.sessions.calls.items() if stats.calls}
    names = {"backbone", "head_modulation", "speculative_round_hoisted"}
    assert calls.keys() == {f"target/{name}" for name in names} | {"decoder"}
    # One table per autoregressive step of each batch, which all tokens share.
    assert calls["target/head_modulation"] == 2 * SETTINGS["num_iter"]
    assert calls["target/speculative_round_hoisted"] > calls["target/head_modulation"]
    expected = pixels(Pipeline(Sessions(hoisted_bundle, threads=1)), config)
    assert (made - expected).abs().max() <= 1


def test_each_context_sees_one_shape(tiny_bundle, engines):
    pipeline = Pipeline(Sessions(tiny_bundle, "tensorrt-rtx", opener=engines), graphs=FakeGraphs())
    pixels(pipeline, make_config(**SETTINGS, method="target"))
    shapes = [context.shapes["x"] for context in engines.opened["target/denoiser"].contexts[1:]]
    assert len(set(shapes)) == len(shapes)
    assert all(rows & (rows - 1) == 0 for rows, _ in shapes)


@pytest.mark.parametrize("failure", ["capture", "replay"])
def test_a_loop_that_cannot_be_captured_runs_all_the_same(
    tiny_bundle, engines, monkeypatch, failure
):
    if failure == "capture":
        graphs, words = FakeGraphs(RuntimeError("stream is not capturable")), "capture failed"
    else:
        graphs, words = FakeGraphs(), "the first replay differs from the eager run"
        spoil(monkeypatch, graphs)
    pipeline = Pipeline(Sessions(tiny_bundle, "tensorrt-rtx", opener=engines), graphs=graphs)
    made = pixels(pipeline, make_config(**SETTINGS, method="target"))
    assert (made - by_loop_graph(tiny_bundle, "target")).abs().max() <= 1
    stats = pipeline.heads.captures["target"]
    assert (stats.captured, stats.replayed) == (0, 0)
    assert len(pipeline.sessions.notes) == 1 + len(stats.fallbacks) > 1
    assert all(words in note for note in pipeline.sessions.notes[1:])


def spoil(monkeypatch, graphs: FakeGraphs) -> None:
    """Replays of the loop are off by one percent."""
    original = captured_module.step_loop

    def spoiled(*sessions):
        run = original(*sessions)
        return lambda **tensors: {
            name: value * 1.01 if graphs.replaying else value
            for name, value in run(**tensors).items()
        }

    monkeypatch.setattr(captured_module, "step_loop", spoiled)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can capture here")
def test_run_json_and_stderr_tell_of_a_loop_without_a_graph(
    tiny_bundle, engines, tmp_path, monkeypatch
):
    """Torch without CUDA refuses every capture: the real failure, seen through the command."""
    monkeypatch.setattr(run, "Job", partial(run.Job, opener=engines))
    # The bundle's own records name no engines.
    monkeypatch.setattr(machine, "check_engines", lambda *_: None)
    arguments = ["generate", str(tiny_bundle.folder), "--backend", "tensorrt-rtx", "--quiet"]
    arguments += ["--labels", "3", "--method", "target", "--num-iter", "2", "--head-steps", "3"]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["cuda_graphs"]["target"]["captured"] == 0
    assert any("capture failed" in note for note in record["notes"])
    for note in record["notes"]:
        assert f"note: {note}" in result.stderr


def test_more_rows_than_the_engine_takes_are_split(tiny_bundle):
    """Against the loop graph in one piece; a step head in pieces of 3 rows."""
    spec = tiny_bundle.graph("target/denoiser").spec
    axes = {**spec.axes, "rows": Axis(min=1, opt=2, max=3)}
    session = open_session(tiny_bundle, "target/denoiser", "onnxruntime", threads=1)
    session.spec = spec.model_copy(update={"axes": axes})
    whole = LoopHead(open_session(tiny_bundle, "target/denoiser_loop", "onnxruntime", threads=1))
    generator = torch.Generator().manual_seed(0)
    rows = Rows(
        conditions=torch.randn(2, 7, spec.inputs[3].shape[-1], generator=generator),
        guidance=torch.full((7,), 2.0),
        temperature=torch.ones(7),
        images=torch.arange(7),
        positions=torch.arange(7),
    )
    arguments = (rows, make_schedule(CLIPPED, 5), Noise(1), Purpose.DENOISE)
    got, expected = StepHead(session)(*arguments), whole(*arguments)
    for name in ("sample", "mean", "log_std", "sum_log_std"):
        torch.testing.assert_close(
            getattr(got, name), getattr(expected, name), rtol=1e-4, atol=1e-4
        )


def test_kernels_are_kept_after_the_first_batch(tiny_bundle, engines, monkeypatch):
    saved = []
    monkeypatch.setattr(TrtSession, "save_cache", lambda self: saved.append(self.spec.name))
    pipeline = Pipeline(Sessions(tiny_bundle, "tensorrt-rtx", opener=engines), graphs=FakeGraphs())
    pixels(pipeline, make_config(**SETTINGS, method="target"))
    assert saved == ["denoiser"]

    def refuse(self):
        raise OSError("read-only file system")

    monkeypatch.setattr(TrtSession, "save_cache", refuse)
    pixels(pipeline, make_config(**SETTINGS, method="target"))
    assert pipeline.sessions.notes[-1] == "compiled kernels are not kept: read-only file system"


def test_buckets_are_powers_of_two_within_the_profile():
    assert [bucket(n, 24) for n in (1, 2, 3, 4, 5, 16, 17, 24)] == [1, 2, 4, 4, 8, 16, 24, 24]
