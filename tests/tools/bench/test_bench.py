import json
import shutil
from typing import ClassVar

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from narrow import check_narrow

from cspd.engines.errors import CspdError
from cspd.runtime.config import AS_RELEASED
from cspd.runtime.decode.plan import MaskPlan, WindowPlan
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.sessions import Sessions
from cspd.tools.bench import command as bench
from cspd.tools.bench import run as bench_run
from cspd.tools.bench.cells import output
from cspd.tools.bench.plan import TRIES, Scale, make_plan, plan_hash
from cspd.tools.bench.replay import AcceptancePattern, ReplayPipeline, load_pattern
from cspd.tools.bench.results import Results
from cspd.tools.bench.run import JOURNAL, Journal, make_header, read_lines
from cspd.tools.bench.tables import acceptance_by_known, tries_shares
from cspd.tools.bench.verdict import verdict_table
from cspd.tools.judge.bootstrap import Judged
from cspd.tools.report.sections import bench_cards
from cspd.tools.report.sources import Source

OPTIONS = ["--quick", "--num-iter", "4", "--head-steps", "3", "--batch-size", "1"]
OPTIONS += ["--batch-size", "2", "--threads", "1", "--repeats", "1"]


class FixedJudge:
    identity: ClassVar = {"name": "test", "extractor_sha256": "0", "statistics_sha256": "1"}

    def check(self, image_channels: int) -> None:
        pass

    def score(self, pixels: np.ndarray, labels: np.ndarray, seed: int) -> Judged:
        scores = {"n": len(pixels), "accuracy": 0.5, "frechet": float(pixels.mean())}
        wide = torch.tensor([-1.0, 1.0]).repeat(100) / 10
        return Judged(scores, {"accuracy": wide})


@pytest.fixture(scope="module")
def finished(tiny_bundle, tmp_path_factory):
    """A quick benchmark of the tiny pair: its folder and what it printed."""
    out = tmp_path_factory.mktemp("bench")
    arguments = [str(tiny_bundle.folder), *OPTIONS, "--json", "--out", str(out)]
    result = CliRunner().invoke(bench.command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return out, result


def test_plan_serves_every_table_and_figure(tiny_bundle):
    points = make_plan(tiny_bundle.manifest, {"seed": 3}, Scale())
    served = {tag for point in points for tag in point.serves}
    tables = {f"table {n}" for n in (1, 2, 3, 4)} | {f"figure {n}" for n in (8, 11, 13, 14)}
    assert served == tables | {"readme", "pareto", "peers", "main"}
    assert len({point.id for point in points}) == len(points)
    configs = [(point.config, point.backend) for point in points]
    assert len(set(configs)) == len(configs)
    assert all(point.config.seed == 3 for point in points)
    # Quality figures rest on as many images as were asked for, and every class is asked for alike.
    assert all(p.repeats * p.config.batch_size >= 1000 for p in points if p.quality)


def test_plan_holds_the_honest_baselines(tiny_bundle):
    points = make_plan(tiny_bundle.manifest, {}, Scale())
    readme = [point.config for point in points if "readme" in point.serves]
    length = tiny_bundle.manifest.geometry.num_tokens
    steps = {config.num_iter for config in readme if config.method == "target"}
    cspd = next(config for config in readme if config.method == "cspd")
    plan = MaskPlan(length, length)
    equal = WindowPlan(plan, cspd.gamma, cspd.prefill).target_rounds
    assert {length, length // 4, equal} == steps
    assert {"target", "draft", "cspd"} <= {config.method for config in readme}
    variants = [config for config in readme if config.method == "cspd"]
    assert [config.verify for config in variants].count("prefix") == 1
    released = [config for config in variants if config.on_reject == "residual"]
    assert [config.model_dump(include=set(AS_RELEASED)) for config in released] == [AS_RELEASED]


@pytest.mark.parametrize(("gamma", "prefill"), [(1, 0.0), (2, 0.2), (4, 0.05), (16, 0.5)])
def test_equal_calls_are_the_calls_that_are_made(tiny_bundle, gamma, prefill):
    (point, *_) = make_plan(tiny_bundle.manifest, {}, Scale.quick())
    changes = {"method": "cspd", "gamma": gamma, "prefill": prefill, "head_steps": 3}
    config = point.config.model_copy(update={**changes, "num_iter": 9, "batch_size": 2})
    (_, statistics), *_ = Pipeline(Sessions(tiny_bundle, threads=1)).generate(config, [0, 1])
    plan = MaskPlan(tiny_bundle.manifest.geometry.num_tokens, 9)
    assert statistics.target_calls == WindowPlan(plan, gamma, prefill).target_rounds


def test_dry_run_measures_nothing(tiny_bundle, tmp_path):
    arguments = [str(tiny_bundle.folder), *OPTIONS, "--dry-run", "--out", str(tmp_path / "o")]
    result = CliRunner().invoke(bench.command, arguments)
    assert result.exit_code == 0 and "settings," in result.stdout
    assert not (tmp_path / "o").exists()


def test_every_measurement_is_complete(finished):
    results = Results(read_lines(finished[0] / JOURNAL))
    for point in results.points.values():
        lines = results.batches(point.id)
        assert len(lines) == point.repeats, point.id
        for line in lines:
            inside = sum(graph["seconds"] for graph in line["graphs"].values())
            assert 0 < inside < line["seconds"]
            assert line["host_seconds"] == pytest.approx(line["seconds"] - inside)
            assert line["peak_memory_mb"] > 50
            verdicts = line["verdicts"]
            replaced = verdicts["resampled"] + verdicts["replaced_by_target"]
            judged = verdicts["accepted"] + replaced + verdicts["fallback"]
            assert verdicts["proposed"] - verdicts["discarded"] == judged
            prefix = point.config.method == "cspd" and point.config.verify == "prefix"
            assert (line["target_calls"] > line["target_rounds"]) == prefix
    kinds = [line["kind"] for line in results.lines]
    assert kinds.count("start") == 2 and "probe" in kinds


def test_warm_up_does_not_count(finished):
    lines = read_lines(finished[0] / JOURNAL)
    warm = [line for line in lines if line.get("repeat") == bench_run.WARM_UP]
    results = Results(lines)
    assert warm and all(line not in results.batches(line["point"]) for line in warm)


def test_probe_counts_agree_with_the_run(finished):
    results = Results(read_lines(finished[0] / JOURNAL))
    (line,) = results.of("map", "probe")
    assert sum(line["accepted_at"]) == line["verdicts"]["accepted"]
    assert sum(line["judged_at"]) == line["verdicts"]["proposed"]
    for accepted, judged in zip(line["accepted_at"], line["judged_at"], strict=True):
        assert 0 <= accepted <= judged <= 2


def test_more_tries_of_the_residual_replace_more_tokens(finished):
    found = tries_shares(Results(read_lines(finished[0] / JOURNAL)))
    assert [tries for tries, _, _ in found] == list(TRIES)
    shares = [share for _, _, share in found]
    assert 0 < shares[0] and shares == sorted(shares) and shares[-1] <= 1


def test_tables_hold_the_paper_s(finished):
    out, result = finished
    record = json.loads(result.stdout)
    assert {"readme", "table 1", "table 3", "table 4", "figure 8", "figure 11", "figure 13",
            "figure 14", "figure 15", "time", "start"} <= set(record["tables"])  # fmt: skip
    text = (out / "tables.md").read_text()
    assert "as many target calls as cspd" in text
    for table in record["tables"].values():
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    results = Results(read_lines(out / JOURNAL))
    by_known = acceptance_by_known(results)
    assert sum(judged for _, judged in by_known.values()) > 0
    first = record["tables"]["readme"]["rows"][0]
    assert first[1] == "exact" and first[3] == "1.00x"


def test_outputs(finished):
    results = Results(read_lines(finished[0] / JOURNAL))
    outputs = {}
    for item in results.serving("readme"):
        outputs.setdefault(item.point.config.method, []).append(output(item, results.main))
    assert set(outputs["cspd"]) == {"approximate"}
    assert outputs["draft"] == ["lossy (the draft alone)"]
    assert outputs["target"][0] == "exact" and set(outputs["target"][1:]) == {"lossy (fewer steps)"}


def test_a_finished_run_is_not_measured_again(finished, tiny_bundle, monkeypatch):
    out, _ = finished

    def refuse(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(bench_run.Bench, "measure", refuse)
    before = (out / JOURNAL).read_text()
    arguments = [str(tiny_bundle.folder), *OPTIONS, "--out", str(out)]
    result = CliRunner().invoke(bench.command, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and (out / JOURNAL).read_text() == before


def test_a_resumed_run_warms_up_again(finished, tiny_bundle, tmp_path, monkeypatch):
    out = shutil.copytree(finished[0], tmp_path / "bench")
    text = (out / JOURNAL).read_text().splitlines(keepends=True)
    lines = [json.loads(line) for line in text]
    lost = next(i for i, x in enumerate(lines) if x["kind"] == "batch" and x["repeat"] == 0)
    (out / JOURNAL).write_text("".join(text[:lost] + text[lost + 1 :]))
    measured = []
    real = bench_run.Bench.measure
    monkeypatch.setattr(
        bench_run.Bench, "measure", lambda *a: measured.append(a[2]) or real(*a)
    )  # fmt: skip
    arguments = [str(tiny_bundle.folder), *OPTIONS, "--out", str(out)]
    assert CliRunner().invoke(bench.command, arguments, catch_exceptions=False).exit_code == 0
    assert measured == [bench_run.WARM_UP, 0]
    assert len((out / JOURNAL).read_text().splitlines()) == len(text)


def test_an_interrupted_run_goes_on(finished, tiny_bundle, tmp_path, monkeypatch):
    out = shutil.copytree(finished[0], tmp_path / "bench")
    text = (out / JOURNAL).read_text().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(text) if json.loads(line).get("repeat") == 0) + 3
    (out / JOURNAL).write_text("".join(text[:cut]) + text[cut][: len(text[cut]) // 2])
    arguments = [str(tiny_bundle.folder), *OPTIONS, "--out", str(out)]
    result = CliRunner().invoke(bench.command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    again = read_lines(out / JOURNAL)
    assert again[:cut] == [json.loads(line) for line in text[:cut]]
    keys = [(line.get("point"), line.get("repeat")) for line in again]
    assert len(set(keys)) == len(keys) == len(text)


def test_results_of_another_plan_are_refused(finished, tiny_bundle):
    points = make_plan(tiny_bundle.manifest, {"seed": 1}, Scale.quick())
    header = make_header(tiny_bundle, points, 1)
    with pytest.raises(CspdError, match="another bundle, plan"):
        Journal(finished[0], header)
    assert plan_hash(points) != plan_hash(make_plan(tiny_bundle.manifest, {}, Scale.quick()))


def test_kept_images_are_scored_once(tiny_bundle, tmp_path):
    scale = Scale(repeats=1, quality_images=4, batch_sizes=(2,), peers=())
    base = {"num_iter": 2, "head_steps": 2, "prefill": 0.0}
    points = [p for p in make_plan(tiny_bundle.manifest, base, scale) if "readme" in p.serves]
    journal = Journal(tmp_path, make_header(tiny_bundle, points, 1))
    bench_run.Bench(tiny_bundle, journal, threads=1, say=lambda _: None).run(points)
    for _ in range(2):
        bench.judge_points(journal, points, FixedJudge())
    scores = [line for line in journal.lines if line["kind"] == "score"]
    assert len(scores) == sum(point.quality for point in points) > 0
    assert all(line["score"]["n"] >= 4 for line in scores)
    table = bench.readme_table(Results(journal.lines))
    assert len({row[0] for row in table.rows}) == len(points)
    assert "n = 4" in table.columns[-1] and table.rows[0][-2] == "50.0 ± 19.6%"


def test_journal_of_an_older_version_is_refused(finished):
    header, *rest = read_lines(finished[0] / JOURNAL)
    with pytest.raises(CspdError, match=r"schema 1, expected 2; measure again"):
        Results([header | {"schema": 1}, *rest])


def test_readme_option_prints_finished_results(finished):
    result = CliRunner().invoke(bench.command, ["--readme", "--out", str(finished[0])])
    assert result.exit_code == 0
    assert result.stdout.startswith("### Methods side by side")
    missing = CliRunner().invoke(bench.command, ["--readme", "--out", str(finished[0] / "no")])
    assert isinstance(missing.exception, CspdError)


def test_finished_results_are_printed_for_a_terminal(finished, tiny_bundle):
    arguments = [str(tiny_bundle.folder), *OPTIONS, "--out", str(finished[0])]
    result = CliRunner().invoke(bench.command, arguments)
    assert result.exit_code == 0, result.output
    tables, _, ending = result.stdout.rpartition("\n\n")
    check_narrow(tables)
    assert "Which method?" in tables and "settings in" in ending


def synthetic(bundle):
    return type(bundle)(bundle.folder, bundle.manifest.model_copy(update={"synthetic": True}))


@pytest.mark.parametrize(
    ("verify", "rate"), [("parallel", 1.0), ("parallel", 0.0), ("prefix", 1.0)]
)
def test_replayed_acceptance_is_the_pattern_s(tiny_bundle, verify, rate):
    pattern = AcceptancePattern(source="x", shares=(0.0, 1.0), rates=(rate, rate))
    pipeline = ReplayPipeline(Sessions(tiny_bundle, threads=1), pattern=pattern)
    (point, *_) = make_plan(tiny_bundle.manifest, {}, Scale.quick())
    changes = {"method": "cspd", "num_iter": 6, "head_steps": 3, "verify": verify, "gamma": 4}
    config = point.config.model_copy(update=changes)
    (images, statistics), *_ = pipeline.generate(config, [0, 1])
    assert statistics.verdicts.acceptance_rate == rate
    assert len(images) == 2 and statistics.verdicts.resampled == 0


def test_a_pattern_follows_the_share_of_known_tokens(finished):
    pattern = AcceptancePattern(source="x", shares=(0.1, 0.5, 0.9), rates=(0.2, 0.4, 0.6))
    assert [pattern.rate(share) for share in (0.0, 0.45, 0.75, 1.0)] == [0.2, 0.4, 0.6, 0.6]
    results = Results(read_lines(finished[0] / JOURNAL))
    measured = load_pattern(results)
    assert len(measured.shares) == len(acceptance_by_known(results))
    assert all(0 <= rate <= 1 for rate in measured.rates)


def test_borrowed_acceptance_is_for_random_weights_and_says_so(finished, tiny_bundle, tmp_path):
    with pytest.raises(CspdError, match="trained weights"):
        bench.acceptance_pattern(tiny_bundle, finished[0])
    borrower = synthetic(tiny_bundle)
    pattern = bench.acceptance_pattern(borrower, finished[0])
    scale = Scale(repeats=1, quality_images=0, batch_sizes=(2,), peers=())
    base = {"num_iter": 4, "head_steps": 2}
    points = [p for p in make_plan(borrower.manifest, base, scale) if "readme" in p.serves]
    journal = Journal(tmp_path, make_header(borrower, points, 1, pattern))
    bench_run.Bench(borrower, journal, threads=1, say=lambda _: None, pattern=pattern).run(points)
    results = Results(journal.lines)
    note = bench.readme_table(results).note
    assert "SYNTHETIC" in note and "REPLAYED" in note
    with pytest.raises(CspdError, match="trained weights"):
        load_pattern(results)


def test_points_of_other_work_warm_up_apart(tiny_bundle):
    (point, *_) = make_plan(tiny_bundle.manifest, {}, Scale.quick())

    def key(**changes) -> str:
        config = point.config.model_copy(update=changes)
        return point.model_copy(update={"config": config}).warm_key

    lossless = {"method": "lossless", "window": 8}
    work = [{}, lossless, {"method": "lossless"}, {"method": "cspd"}, {"num_iter": 3},
            {"method": "cspd", "gamma": 4}, {"method": "cspd", "on_reject": "residual"},
            {"head_steps": 7}, {"batch_size": 3}, {"cfg": 3.0}, {"head": "lossless"},
            {"modulation_memory": 1}, {"method": "cspd", "verify": "prefix"}]  # fmt: skip
    assert len({key(**{"cfg": 1.0, **changes}) for changes in work}) == len(work)
    # Other numbers in the same graphs.
    for same in ({"temperature": 0.9}, {"gamma": 4}, {"seed": 5}, {"align": False}):
        assert key(**same) == key()


def test_costs_are_measured_before_the_clock(tiny_bundle, tmp_path, monkeypatch):
    """A measured batch of `lossless` makes no call that its own image does not need."""
    scale = Scale(repeats=1, quality_images=0, batch_sizes=(1,), peers=())
    points = make_plan(tiny_bundle.manifest, {"num_iter": 3, "head_steps": 4}, scale)
    point = next(p for p in points if p.config.head_mode == "auto")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    journal = Journal(tmp_path, make_header(tiny_bundle, [point], 1))
    bench_ = bench_run.Bench(tiny_bundle, journal, threads=1, say=lambda _: None)
    first, second = (bench_.measure(point, repeat) for repeat in (0, 0))
    calls = [{name: graph["calls"] for name, graph in line["graphs"].items()}
             for line in (first, second)]  # fmt: skip
    assert calls[0] == calls[1]


def test_a_busy_machine_is_judged_by_processor_time(finished, tmp_path):
    lines = read_lines(finished[0] / JOURNAL)
    cpus = int(lines[0]["host"]["cpus"])

    def results(load: float) -> Results:
        changed = [line if line["kind"] != "batch" else
                   {**line, "load": load, "seconds": 3.0 * line["images"],
                    "cpu_seconds": line["images"] * (2.0 if "target-" in line["point"] else 1.0)}
                   for line in lines]  # fmt: skip
        return Results(changed)

    quiet, busy = results(cpus), results(cpus + 1)
    for found, clock, expected in ((quiet, "wall-clock time", 1.0), (busy, "processor time", 2.0)):
        reference = found.summary(found.main)
        item = next(iter(found.serving("readme", method="cspd")))
        assert found.clock == clock and found.speedup(item, reference) == expected
        rows = bench.readme_table(found).rows
        assert next(row for row in rows if row[0].startswith("cspd"))[3] == f"about {expected:.1f}x"
        source = Source("bench", finished[0], {"lines": found.lines})
        card = next(c for c in bench_cards(source) if "speed of cspd" in c.label)
        assert card.value == f"about {expected:.1f}x"


def test_what_is_known_to_fail_is_refused_before_the_work(tiny_bundle, tmp_path):
    cases = {
        ("--num-iter", "99"): "--num-iter is 99",
        ("--images", "40"): "--images is 40; scores need 100",
        ("--images", "100"): "no judge for this bundle",
    }
    for options, words in cases.items():
        arguments = [str(tiny_bundle.folder), *OPTIONS, *options, "--out", str(tmp_path / "o")]
        result = CliRunner().invoke(bench.command, arguments)
        assert isinstance(result.exception, CspdError) and words in str(result.exception)
        assert not (tmp_path / "o").exists()


@pytest.fixture(scope="module")
def crafted(tiny_bundle):
    """Makes results of the README's settings from a time and scores for each method and steps."""
    scale = Scale(repeats=10, quality_images=100, batch_sizes=(10,), peers=())
    points = make_plan(tiny_bundle.manifest, {}, scale)
    header = make_header(tiny_bundle, points, 1)
    wave = torch.tensor([-1.0, 1.0]).repeat(100)

    def batch(point, repeat, seconds):
        return {"kind": "batch", "point": point.id, "repeat": repeat, "images": 10,
                "seconds": 10 * seconds * (1 + 0.01 * (repeat % 3)), "cpu_seconds": 1.0,
                "graphs": {}, "host_seconds": 0.0, "peak_memory_mb": 1.0, "load": 0.0,
                "rounds": {}, "target_rounds": point.config.num_iter,
                "target_calls": point.config.num_iter, "draft_calls": 0,
                "distance_sum": 0.0, "verdicts": dict.fromkeys(COUNTS, 0)}  # fmt: skip

    def make(measured: dict[tuple[str, int | None], tuple[float, float | None, float]]) -> Results:
        lines = [header]
        for point in points:
            config = point.config
            found = measured.get(
                (config.method, config.num_iter), measured.get((config.method, None))
            )
            seconds, accuracy, noise = found
            lines += [batch(point, repeat, seconds) for repeat in range(10)]
            if accuracy is not None:
                redrawn = {"accuracy": (accuracy + noise * wave).tolist()}
                scored = {"score": {"n": 100, "accuracy": accuracy}, "redrawn": redrawn}
                lines.append({"kind": "score", "point": point.id, "repeat": -2, **scored})
        return Results(lines)

    return make


COUNTS = (
    "proposed", "accepted", "resampled", "replaced_by_target", "fallback", "discarded",
)  # fmt: skip
OTHERS = {("draft", None): (0.1, 0.5, 0.01), ("lossless", None): (1.5, 0.9, 0.01)}


def test_the_verdict_names_the_fastest_ways(crafted):
    # 4 steps: worse beyond the noise. 8 steps: within it. cspd: as good as 8 steps, and slower.
    table = verdict_table(crafted({
        **OTHERS, ("target", None): (0.2, 0.7, 0.01), ("target", 16): (1.0, 0.90, 0.0),
        ("target", 8): (0.5, 0.89, 0.01), ("cspd", None): (0.8, 0.89, 0.01),
    }))  # fmt: skip
    answers = {row[0]: row[1:] for row in table.rows}
    assert answers["fastest exact way"][0] == "target, 16 steps"
    equal = answers["fastest way at equal quality"]
    assert equal[0] == "target, 8 steps" and equal[1].startswith("2.00x ± 0.0")
    assert equal[2] == "-1.0 ± 2.0%"
    cspd = answers["where cspd stands"]
    assert cspd[0] == "cspd, gamma 8, is slower than target --num-iter 8 at this quality"
    assert cspd[1].startswith("1.25x ± 0.0")


def test_a_lossless_that_is_faster_is_the_exact_way(crafted):
    table = verdict_table(crafted({
        **OTHERS, ("lossless", None): (0.4, 0.9, 0.01), ("target", None): (0.5, 0.7, 0.01),
        ("target", 16): (1.0, 0.90, 0.0), ("cspd", None): (0.3, 0.95, 0.01),
    }))  # fmt: skip
    answers = {row[0]: row[1] for row in table.rows}
    assert answers["fastest exact way"].startswith("lossless")
    assert answers["fastest way at equal quality"].startswith("cspd")
    assert answers["where cspd stands"].endswith("better than every target measured")


def test_a_lead_within_its_interval_is_none(crafted):
    """Batches differ by up to 2 % here: half a percent is no difference."""
    table = verdict_table(crafted({
        **OTHERS, ("lossless", None): (0.995, 0.9, 0.01), ("target", None): (0.2, 0.7, 0.01),
        ("target", 16): (1.0, 0.90, 0.0), ("target", 8): (0.8, 0.89, 0.01),
        ("cspd", None): (0.797, 0.89, 0.01),
    }))  # fmt: skip
    answers = {row[0]: row[1] for row in table.rows}
    assert answers["fastest exact way"] == "target, 16 steps"
    assert answers["where cspd stands"].endswith("as fast as target --num-iter 8 at this quality")


def test_a_verdict_without_scores_says_nothing_about_quality(crafted, finished):
    table = verdict_table(crafted({
        ("draft", None): (0.1, None, 0), ("lossless", None): (2.0, None, 0),
        ("target", None): (1.0, None, 0), ("cspd", None): (0.5, None, 0),
    }))  # fmt: skip
    assert [row[0] for row in table.rows] == ["fastest exact way", "where cspd stands"]
    assert "of unmeasured quality" in table.rows[1][1] and len(table.columns) == 3
    assert not any("accuracy" in column for column in json.loads(finished[1].stdout)[
        "tables"]["readme"]["columns"])  # fmt: skip
