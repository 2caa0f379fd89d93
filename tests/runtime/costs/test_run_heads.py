"""The table of modulations of engines: measured with and without, chosen by cost, written down.

ONNX Runtime stands in for the engines: it runs the same graphs, one session each.
"""

import shutil
from collections import Counter

import pytest

from cspd.engines.backends import open_session
from cspd.engines.bundle import open_bundle
from cspd.runtime.commands import run
from cspd.runtime.commands.tune import cost_table
from cspd.runtime.config import make_config
from cspd.runtime.costs import measure as tuning
from cspd.runtime.costs.predict import CostRecord
from cspd.runtime.heads import drafts
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.sessions import Sessions

STEPS = 5
FAST, SLOW = 1e6, 1e7  # more than anything takes here, so that no clock can change a choice
STEPPING = {"denoiser": "denoiser_hoisted"}
ROUNDS = {"speculative_round": "speculative_round_hoisted"}


def config(**values):
    base = {
        "labels": (3, 417), "num_images": 2, "batch_size": 2, "num_iter": 4, "head_steps": STEPS,
        "cfg": 2.0, "backend": "tensorrt-rtx",
    }  # fmt: skip
    return make_config(**{**base, **values})


def by_onnxruntime(bundle, label, backend, **options):
    return open_session(bundle, label, "onnxruntime", threads=1)


@pytest.fixture
def pipeline(hoisted_bundle, tmp_path, monkeypatch):
    """On a copy, so that no costs lie beside the shared bundle. ONNX Runtime runs the graphs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(hoisted_bundle.folder, tmp_path / "bundle")
    return Pipeline(
        Sessions(open_bundle(tmp_path / "bundle"), "tensorrt-rtx", threads=1, opener=by_onnxruntime)
    )


def costs(key: str, plain_ms: float, round_ms: float) -> CostRecord:
    """Stepping and rounds that take so long for any number of tokens or rows."""
    plain, rounds = ((1.0, plain_ms), (32.0, plain_ms)), ((1.0, round_ms), (512.0, round_ms))
    return CostRecord(key=key, num_steps=STEPS, plain=plain, rounds=rounds)


def keep(pipeline, settings, on_table: float, no_table: float, round_share: float = 1.0) -> None:
    """Save costs of stepping with and without a table; a round takes a share of them."""
    key = tuning.cost_key(tuning.facts(pipeline.heads, "target", settings))
    found = tuning.HeadCosts(
        role="target", guided=True, costs=costs(key, on_table, round_share * on_table),
        no_table=costs(key, no_table, round_share * no_table), acceptance=(0.9,) * STEPS,
    )  # fmt: skip
    tuning.save(pipeline.bundle, found)


def used(pipeline) -> set[str]:
    """Graphs of the target's head that ran."""
    calls = {
        label.partition("/")[2]: stats.calls for label, stats in pipeline.sessions.calls.items()
    }
    return {name for name in (*STEPPING, *STEPPING.values(), *ROUNDS, *ROUNDS.values())
            if calls.get(name)}  # fmt: skip


def test_both_ways_are_measured(pipeline):
    found = tuning.tuned(pipeline.heads, "target", config(method="auto"))
    assert used(pipeline) == {*STEPPING, *STEPPING.values(), *ROUNDS, *ROUNDS.values()}
    assert found.no_table is not None and found.no_table != found.costs
    shapes = [(r.num_steps, len(r.plain), len(r.rounds), len(r.whole)) for r in
              (found.costs, found.no_table)]  # fmt: skip
    assert shapes[0] == shapes[1] and shapes[0][0] == STEPS
    assert found == tuning.saved(pipeline.heads, "target", config(method="auto"))


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize(
    ("options", "graphs", "share"),
    [
        ({"method": "target"}, STEPPING, 1.0),
        ({"method": "lossless", "window": 3}, ROUNDS, 1.0),
        ({"method": "auto"}, STEPPING, 10.0),
        ({"method": "auto"}, ROUNDS, 0.01),
        ({"method": "auto", "reproducible": False}, STEPPING, 10.0),
        ({"method": "auto", "reproducible": False}, ROUNDS, 0.01),
    ],
)
def test_the_cheaper_way_is_taken(pipeline, options, graphs, share, table):
    settings = config(**options)
    on_table, no_table = (FAST, SLOW) if table else (SLOW, FAST)
    keep(pipeline, settings, on_table, no_table, share)
    resolved, why = pipeline.resolve(settings)
    if settings.reproducible:
        assert [choice.table for choice in resolved.heads] == [table]
        words = "looked up in a table" if table else "computed again in every call"
        assert words in why["target"].reason
    assert len([image for images, _ in pipeline.generate(resolved) for image in images]) == 2
    assert used(pipeline) == set(graphs.values() if table else graphs)


def test_what_was_chosen_stays_without_costs(pipeline, tmp_path):
    settings = config(method="target")
    keep(pipeline, settings, SLOW, FAST)
    resolved, _ = pipeline.resolve(settings)
    shutil.rmtree(tmp_path / "bundle.tuned")
    assert pipeline.resolve(resolved) == (resolved, {})
    list(pipeline.generate(resolved))
    assert used(pipeline) == {"denoiser"}


def test_the_baseline_takes_the_cheaper_way_too(pipeline, tmp_path):
    """Else a ratio would compare with a slower target than there is."""
    settings = config(method="lossless", window=3)
    keep(pipeline, settings, SLOW, FAST)
    job = run.Job(run.Machine("cpu", 1), baseline=True, quiet=True, opener=by_onnxruntime)
    record, outcomes = run.generate(pipeline.bundle, settings, tmp_path / "out", job)
    assert "computed again in every call" in record["choices"]["target"]
    assert [outcome.config.heads[0].table for outcome in outcomes] == [False, False]


@pytest.mark.parametrize("method", ["target", "lossless"])
def test_without_costs_nothing_is_measured_for_what_was_asked_for(pipeline, method):
    settings = config(method=method, window=3)
    assert pipeline.resolve(settings) == (settings, {})
    assert pipeline.sessions.calls == {}


def test_where_loops_are_graphs_there_is_no_other_way(pipeline):
    elsewhere = Pipeline(Sessions(pipeline.bundle, "onnxruntime", threads=1))
    settings = config(method="target", backend="onnxruntime")
    keep(elsewhere, settings, SLOW, FAST)
    assert elsewhere.resolve(settings) == (settings, {})
    assert tuning.tuned(elsewhere.heads, "target", config(method="auto", cfg=1.0)).no_table is None


def test_a_run_has_one_head(pipeline, monkeypatch):
    """Over four batches, costs are read once and the tables of drafts made once."""
    settings = config(method="auto", num_images=8)
    keep(pipeline, settings, FAST, SLOW, round_share=0.01)
    counts = Counter()

    def count(module, name):
        good = getattr(module, name)

        def counted(*arguments):
            counts[name] += 1
            return good(*arguments)

        monkeypatch.setattr(module, name, counted)

    count(tuning, "load")
    count(drafts, "draft_tables")
    images = [image for batch, _ in pipeline.generate(settings) for image in batch]
    assert len(images) == 8 and used(pipeline) & set(ROUNDS.values())
    assert counts == {"load": 1, "draft_tables": 1}
    # Other images of the same settings have the same head; other settings another.
    resolved, _ = pipeline.resolve(settings)
    head = pipeline.head("target", resolved)
    assert pipeline.head("target", resolved.model_copy(update={"seed": 5, "labels": (7,)})) is head
    assert pipeline.head("target", resolved.model_copy(update={"batch_size": 4})) is not head


def test_tune_shows_both_ways():
    key, whole = "k", ((8, 1.0, 30.0), (16, 1.0, 40.0))
    on_table = costs(key, 50.0, 1.0).model_copy(update={"whole": whole})
    no_table = costs(key, 20.0, 1.0).model_copy(update={"whole": whole})
    found = tuning.HeadCosts(
        role="target", guided=True, costs=on_table, no_table=no_table, acceptance=(0.9,) * STEPS
    )
    table = cost_table(found)
    assert "with / without a table" in table.title
    assert table.rows[0] == [
        "1",
        "50.00 / 20.00",
        "30.00 / 30.00",
        "40.00 / 40.00",
        "stepping, no table",
    ]
