"""Measured costs on the tiny bundle: where they are kept, when they are used, what is chosen."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from narrow import check_narrow

from cspd.engines.bundle import open_bundle
from cspd.engines.console.terminal import print_table
from cspd.engines.errors import CspdError
from cspd.runtime.commands import run
from cspd.runtime.commands.cli import main, shipped_bundle
from cspd.runtime.commands.replay import replay
from cspd.runtime.commands.tune import cost_table
from cspd.runtime.config import make_config
from cspd.runtime.costs import measure as tuning
from cspd.runtime.costs.predict import CostRecord
from cspd.runtime.heads.base import Rows, part_of
from cspd.runtime.heads.plain import LoopHead
from cspd.runtime.heads.speculative_loop import SpeculativeLoopHead
from cspd.runtime.heads.switch import Switch
from cspd.runtime.noise import Noise, Purpose
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.progress import working
from cspd.runtime.sessions import Sessions
from cspd.runtime.store.distribution import certificate, distribution

BASE = {"num_iter": 6, "head_steps": 10, "cfg": 3.0, "batch_size": 2, "labels": (3, 417)}


def config(**values):
    return make_config(**{**BASE, "num_images": 2, "method": "auto", **values})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pipeline(tiny_bundle, tmp_path):
    """A copy, so that nothing is written beside the shared one."""
    shutil.copytree(tiny_bundle.folder, tmp_path / "bundle")
    return Pipeline(Sessions(open_bundle(tmp_path / "bundle"), threads=1))


def keep(pipeline, plain_ms, round_ms, settings, role="target"):
    """Save costs for `settings` as if they had been measured."""
    key = tuning.cost_key(tuning.facts(pipeline.heads, role, settings))
    costs = CostRecord(
        key=key, num_steps=10, plain=((1.0, plain_ms), (32.0, plain_ms)),
        rounds=((1.0, round_ms), (512.0, round_ms)),
    )  # fmt: skip
    found = tuning.HeadCosts(role=role, guided=True, costs=costs, acceptance=(0.9,) * 10)
    return tuning.save(pipeline.bundle, found)


def test_measured_once_and_kept_beside_the_bundle(pipeline, tmp_path, monkeypatch, capsys):
    """And said while it is measured, not when saved costs are read."""
    pipeline.working = working
    found = tuning.tuned(pipeline.heads, "target", config(), pipeline.working)
    assert capsys.readouterr().err == "measuring the target head, once per machine\n"
    (path,) = (tmp_path / "bundle.tuned").iterdir()
    assert found.costs.num_steps == 10 and len(found.acceptance) == 10
    assert all(0 < share < 1 for share in found.acceptance)
    monkeypatch.setattr(tuning, "measure", None)  # a second measurement would fail
    assert tuning.tuned(pipeline.heads, "target", config(), pipeline.working) == found
    assert capsys.readouterr().err == ""
    text = path.read_text().replace(found.costs.key, "0" * 64)
    path.write_text(text)
    with pytest.raises(CspdError, match="cspd-run tune"):
        tuning.tuned(pipeline.heads, "target", config(), pipeline.working)
    path.write_text("{")
    with pytest.raises(CspdError, match="delete it"):
        tuning.tuned(pipeline.heads, "target", config(), pipeline.working)


@pytest.mark.parametrize(
    "changes",
    [{"cfg": 1.0}, {"head_steps": 12}, {"threads": 2}, {"sha256": "1" * 64}, {"role": "draft"}],
)
def test_another_setting_has_another_key(pipeline, changes):
    role, changed = changes.pop("role", "target"), dict(changes)
    base = tuning.facts(pipeline.heads, "target", config())
    pipeline.sessions.threads = changed.pop("threads", 1)
    if "sha256" in changed:
        pipeline.bundle.__dict__["sha256"] = changed.pop("sha256")
    other = tuning.facts(pipeline.heads, role, config(**changed))
    assert tuning.cost_key(base) != tuning.cost_key(other)


NAN, INFINITE = float("nan"), float("inf")
BAD_COSTS = {
    "NaN": ("plain", [[1.0, NAN]]), "infinite": ("rounds", [[INFINITE, 1.0]]),
    "negative": ("plain", [[1.0, -3.0]]), "zero": ("rounds", [[1.0, 0.0]]),
    "no plain": ("plain", []), "no rounds": ("rounds", []),
    "whole chains": ("whole", [[0, 1.0, 1.0]]), "no steps": ("num_steps", 0),
    "other steps": ("num_steps", 9), "schema": ("schema_version", 2),
}  # fmt: skip
BAD_SHARES = {"share": [2.0] * 10, "negative share": [-0.1] * 10, "NaN": [NAN] * 10, "few": [0.5]}


@pytest.mark.parametrize(
    ("where", "value"),
    [
        *((("costs", name), value) for name, value in BAD_COSTS.values()),
        *((("no_table", name), value) for name, value in BAD_COSTS.values()),
        *((("acceptance",), value) for value in BAD_SHARES.values()),
    ],
)
def test_costs_that_are_no_costs_are_refused(pipeline, where, value):
    """Each would otherwise decide how the run samples, or end in a trace."""
    settings = config()
    path = keep(pipeline, 10.0, 1.0, settings)
    document = json.loads(path.read_text())
    document["no_table"] = document["costs"] if where[0] == "no_table" else None
    place = document
    for name in where[:-1]:
        place[name] = place = dict(place[name])
    place[where[-1]] = value
    path.write_text(json.dumps(document))
    with pytest.raises(CspdError, match=r"not a record of costs \(.*delete it, or measure again"):
        tuning.saved(pipeline.heads, "target", settings)


def test_the_granted_cpus_are_part_of_the_key(pipeline, monkeypatch):
    base = tuning.facts(pipeline.heads, "target", config())
    monkeypatch.setattr(tuning, "available_cpus", lambda: 64)
    other = tuning.facts(pipeline.heads, "target", config())
    assert other["cpus"] == "64" and tuning.cost_key(base) != tuning.cost_key(other)
    pipeline.sessions.threads = 0
    assert tuning.facts(pipeline.heads, "target", config())["threads"] == "64"


def test_kept_in_the_cache_where_the_bundle_cannot_be_written(pipeline, tmp_path, cache):
    (tmp_path / "bundle.tuned").write_text("in the way")
    path = keep(pipeline, 1.0, 1.0, config())
    assert path.is_relative_to(cache)
    assert tuning.load(pipeline.bundle, "target", tuning.cost_key(
        tuning.facts(pipeline.heads, "target", config())
    )) is not None  # fmt: skip


def test_nothing_is_written_into_the_package(cache):
    (folder,) = tuning.folders(open_bundle(shipped_bundle()))
    assert folder.is_relative_to(cache)


def test_auto_takes_the_cheaper_way_and_writes_it_down(pipeline):
    settings = config()
    keep(pipeline, 10.0, 100.0, settings)
    resolved, why = pipeline.resolve(settings)
    assert resolved.heads[0].up_to == 0 and "plain stepping" in why["target"].reason
    assert isinstance(pipeline.head("target", resolved), LoopHead)
    keep(pipeline, 100.0, 0.1, settings)
    resolved, why = pipeline.resolve(settings)
    head = pipeline.head("target", resolved)
    assert isinstance(head, SpeculativeLoopHead) and head.options.window == resolved.heads[0].window
    # What was chosen is not chosen again.
    assert pipeline.resolve(resolved) == (resolved, {})


def test_mixed_head_draws_what_either_way_would(pipeline):
    """Few tokens speculatively, many plainly; both are used."""
    choice = {"role": "target", "window": 4, "up_to": 5}
    mixed = config(heads=(choice,))
    head = pipeline.head("target", mixed)
    assert isinstance(head, Switch)
    assert isinstance(head.head, SpeculativeLoopHead) and isinstance(head.other, LoopHead)
    rows = Rows(torch.zeros(1, 6, 1), *torch.zeros(4, 6))
    assert head.suits(part_of(rows, 0, 5), None) and not head.suits(rows, None)
    images = [image for images, _ in pipeline.generate(mixed) for image in images]
    assert len(images) == 2
    calls = pipeline.sessions.calls
    assert calls["target/speculative_loop"].calls > 0 and calls["target/denoiser_loop"].calls > 0


def test_run_says_what_was_chosen_and_replays(pipeline, tmp_path, capsys):
    settings = config()
    keep(pipeline, 100.0, 0.1, settings)
    job = run.Job(run.Machine("cpu", 1), baseline=True)
    record, outcomes = run.generate(pipeline.bundle, settings, tmp_path / "out", job)
    assert "target head: speculation with" in capsys.readouterr().err
    assert record["choices"]["target"].startswith("speculation with")
    assert record["config"]["heads"][0]["role"] == "target"
    assert record["distribution"].startswith("exact")
    assert [outcome.config.method for outcome in outcomes] == ["auto", "target"]
    shutil.rmtree(tmp_path / "bundle.tuned")
    _, _, same = replay(pipeline.bundle, tmp_path / "out" / "00001.png", device="cpu", threads=1)
    assert same and not (tmp_path / "bundle.tuned").exists()


def test_interrupted_run_keeps_the_choices_it_began_with(pipeline, tmp_path):
    """Costs measured since would choose otherwise: the images must not change on the way."""
    settings, out = config(num_images=4), tmp_path / "out"
    keep(pipeline, 100.0, 0.1, settings)
    job = run.Job(run.Machine("cpu", 1), quiet=True)
    first, _ = run.generate(pipeline.bundle, settings, out, job)
    images = {path.name: path.read_bytes() for path in out.glob("*.png")}
    (out / "run.json").unlink()
    (out / "00003.png").unlink()
    keep(pipeline, 10.0, 100.0, settings)
    assert pipeline.resolve(settings)[0].heads[0].up_to == 0
    again, _ = run.generate(pipeline.bundle, settings, out, job)
    assert again["config"] == first["config"] and again["choices"] == first["choices"]
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == images
    # A finished one too; a new one in its place follows the new costs.
    assert run.generate(pipeline.bundle, settings, out, job)[0] == again
    no_table = run.Job(run.Machine("cpu", 1), quiet=True, overwrite=True)
    other, _ = run.generate(pipeline.bundle, settings, out, no_table)
    assert other["config"]["heads"][0]["up_to"] == 0


def test_a_run_that_need_not_repeat_chooses_beforehand_too(pipeline):
    settings = config(reproducible=False)
    keep(pipeline, 1000.0, 0.1, settings)
    resolved, reasons = pipeline.resolve(settings)
    assert resolved.heads[0].up_to > 0 and set(reasons) == {"target"}
    head = pipeline.head("target", resolved)
    assert isinstance(head, SpeculativeLoopHead) and head.options.row_buckets == ()


@pytest.mark.parametrize("method", ["target", "cspd"])
def test_heads_of_both_models_speculate(pipeline, method):
    settings = config(method=method, head="lossless", window=4, gamma=4)
    assert len([image for images, _ in pipeline.generate(settings) for image in images]) == 2
    roles = ("target", "draft") if method == "cspd" else ("target",)
    for role in roles:
        assert pipeline.sessions.calls[f"{role}/speculative_loop"].calls > 0
    assert not any("denoiser_loop" in label for label in pipeline.sessions.calls)


@pytest.mark.parametrize("steps", [10, "10:4"])
def test_relaxed_denoising_composes(pipeline, steps):
    settings = config(method="lossless", relax="tv=0.05", head_steps=steps, window=4)
    head = pipeline.head("target", settings)
    assert isinstance(head, SpeculativeLoopHead)
    assert head.numbers(Noise(0), Purpose.DENOISE).budget == 0.05
    images = [image for images, _ in pipeline.generate(settings) for image in images]
    assert len(images) == 2
    assert distribution(settings).startswith(
        "approximate: relaxed denoising of the target model (--relax tv=0.05)"
    )
    assert "within 0.05 of the target's in total variation" in certificate(settings)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"method": "target"}, "exact: samples of the target model"),
        ({"method": "draft"}, "exact: samples of the draft model"),
        ({"method": "auto"}, "exact: samples of the target model"),
        ({"method": "lossless", "head_steps": "10:5"}, "lossy: 10 to 5 denoising steps"),
        ({"method": "target", "head_steps": 5}, "lossy against the model's own 10 denoising"),
        ({"method": "cspd", "head_steps": 5}, "lossy against the model's own 10 denoising"),
        ({"method": "cspd", "relax": "tv=0.1", "head": "lossless"}, "approximate"),
    ],
)
def test_law_in_words(tiny_bundle, values, expected):
    assert expected in distribution(config(**values), tiny_bundle.manifest)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ("--relax", "tv=0.05", "--method", "target"),
            "--relax tv=0.05 changes nothing with --method target",
        ),
        (("--method", "lossless", "--head", "plain"), "--head plain contradicts"),
        (("--relax", "tv=2", "--method", "lossless"), "--relax is"),
        (("--head-steps", "50:1"), "--head-steps is '50:1'"),
        (("--head-steps", "10:2000"), "--head-steps is 10:2000"),
    ],
)
def test_contradictions_are_refused(tiny_bundle, tmp_path, options, expected):
    arguments = ["generate", str(tiny_bundle.folder), "--out", str(tmp_path / "out"), *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and expected in result.stderr
    assert not (tmp_path / "out").exists()


def test_tune_command(pipeline, tmp_path):
    result = CliRunner().invoke(
        main, ["tune", str(tmp_path / "bundle"), "--threads", "1", "--json"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [record["role"] for record in found["heads"]] == ["draft", "target"]
    costs = sorted(str(path) for path in (tmp_path / "bundle.tuned").iterdir())
    assert sorted(found["made"]) == costs and len(costs) == 2
    assert result.stderr.splitlines() == ["measuring the draft head", "measuring the target head"]


def test_tune_table_shows_what_was_measured_and_what_follows(capsys):
    whole = ((8, 1.0, 5.0), (16, 1.0, 3.0), (8, 32.0, 50.0), (16, 32.0, 60.0))
    costs = CostRecord(
        key="k", num_steps=10, plain=((1.0, 4.0), (32.0, 40.0)), rounds=((1.0, 0.1),), whole=whole
    )
    found = tuning.HeadCosts(role="target", guided=True, costs=costs, acceptance=(0.9,) * 10)
    print_table(cost_table(found))
    check_narrow(capsys.readouterr().out)
    assert [list(cells) for cells in zip(*cost_table(found).rows, strict=True)] == [
        ["1", "32"], ["4.00", "40.00"], ["5.00", "50.00"], ["3.00", "60.00"],
        ["window 16", "stepping"],
    ]  # fmt: skip


def test_a_window_that_no_graph_takes_is_refused_in_the_words_of_the_user(pipeline):
    with pytest.raises(CspdError, match=r"--window is 40, the bundle was built for 1\.\.32"):
        list(pipeline.generate(config(method="lossless", window=40)))
