import hashlib
import json
import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from narrow import check_narrow
from PIL import Image

from cspd.engines.bundle import open_bundle
from cspd.engines.errors import CspdError
from cspd.runtime.commands.cli import shipped_bundle
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.sessions import Sessions
from cspd.tools.judge import evaluate
from cspd.tools.judge.bootstrap import Judged, half_width, replicates
from cspd.tools.judge.evaluate import Evaluation, make_variants, paired_difference, spread
from cspd.tools.judge.judges import (
    ClassifierJudge,
    InceptionJudge,
    find_judge,
    frechet_name,
    import_torch_fidelity,
)
from cspd.tools.judge.metrics import FeatureStats, feature_stats, frechet_distance
from cspd.tools.judge.run import IMAGES, balanced_labels, intact, load_images, make_images

FAST = {"num_iter": 2, "head_steps": 2, "batch_size": 4}


class MeanJudge:
    identity: ClassVar = {"name": "test", "extractor_sha256": "e" * 64, "statistics_sha256": "s"}

    def check(self, image_channels):
        pass

    def score(self, pixels, labels, seed):
        assert len(pixels) == len(labels)
        means = torch.from_numpy(pixels.mean(axis=(1, 2, 3)))
        redrawn = replicates(lambda rows: means[rows].mean().item(), torch.from_numpy(labels), seed)
        return Judged({"n": len(pixels), "frechet": means.mean().item()}, {"frechet": redrawn})


@pytest.fixture
def variants(tiny_bundle):
    """Target and cspd with two seeds, three images; the tiny pair is cut down to three classes."""
    few = tiny_bundle.manifest.geometry.model_copy(update={"num_classes": 3})
    manifest = tiny_bundle.manifest.model_copy(update={"geometry": few})
    bundle = type(tiny_bundle)(tiny_bundle.folder, manifest)
    methods = [{"method": "target"}, {"method": "cspd"}]
    return make_variants(bundle, methods, [0, 1], 3, FAST)


def settings_of(bundle, *methods: dict, **base) -> list[str]:
    """What the table calls each of `methods`."""
    variants = make_variants(bundle, list(methods), [0], 1000, base)
    return [variant.setting for variant in variants]


# A value beside the default for every option that says how images are made.
CHANGED = {
    "head_steps": 5, "cfg": 2.5, "cfg_schedule": "constant", "temperature": 0.9, "prefill": 0.5,
    "accept_temperature": 1.0, "verify": "prefix", "align": False, "on_reject": "residual",
    "residual_temperature": 2.0, "count_in": "steps",
    "window": 3, "batch_size": 3, "reproducible": False, "backend": "torch",
}  # fmt: skip


# Options without which another one does nothing, and is refused.
BESIDE = {"residual_temperature": {"on_reject": "residual"}, "window": {"head": "lossless"}}


@pytest.mark.parametrize("option", CHANGED)
def test_a_setting_names_every_option_that_differs(tiny_bundle, option):
    cspd = {"method": "cspd", **BESIDE.get(option, {})}
    plain, changed = settings_of(tiny_bundle, cspd, {**cspd, option: CHANGED[option]})
    assert plain.startswith("cspd, 6 steps, gamma 8")
    assert changed.startswith(plain) and option.replace("_", "-") in changed


def test_options_that_all_methods_share_are_named_too(tiny_bundle):
    (name,) = settings_of(tiny_bundle, {"method": "target"}, head_steps=5, batch_size=7)
    assert name == "target, 6 steps, head-steps 5"


def test_a_setting_asked_for_twice_is_refused(tiny_bundle):
    with pytest.raises(CspdError, match="twice"):
        settings_of(tiny_bundle, {"method": "target"}, {"method": "target", "num_iter": 6})


def plainly_judged(variants, **scores: list[float]) -> dict[str, Judged]:
    """Scores of `variants` in their order, without intervals."""
    return {variant.name: Judged({name: values[i] for name, values in scores.items()})
            for i, variant in enumerate(variants)}  # fmt: skip


def test_settings_of_one_method_are_not_averaged(tiny_bundle):
    methods = [{"method": "cspd"}, {"method": "cspd", "on_reject": "residual"}]
    variants = make_variants(tiny_bundle, methods, [0, 1], 1000, {})
    judged = plainly_judged(variants, frechet=[0.0, 1.0, 2.0, 3.0])
    rows = spread(variants, judged)
    assert [(row["seeds"], row["mean"]) for row in rows] == [(2, 0.5), (2, 2.5)]
    assert [row["interval"] for row in rows] == [None, None]


def test_options_that_change_nothing_and_contradictions_are_refused(tiny_bundle):
    with pytest.raises(CspdError, match="--gamma 4 changes nothing with --method target"):
        settings_of(tiny_bundle, {"method": "target", "gamma": "4"})
    released = evaluate.parse_method("cspd:as-released=true")
    (name,) = settings_of(tiny_bundle, released)
    assert name == "cspd, 6 steps, gamma 8, as released"
    with pytest.raises(CspdError, match="--as-released means --verify parallel"):
        settings_of(tiny_bundle, {**released, "verify": "prefix"})
    with pytest.raises(CspdError, match="--as-released is 'maybe', expected true or false"):
        settings_of(tiny_bundle, {**released, "as_released": "maybe"})


def silent(_: str) -> None:
    pass


def test_labels_are_balanced_and_in_class_order():
    assert balanced_labels(6, 3) == (0, 0, 1, 1, 2, 2)
    for count in (7, 0):
        with pytest.raises(CspdError, match="multiple of 3"):
            balanced_labels(count, 3)


def test_only_50000_inception_images_make_an_fid_50k():
    assert frechet_name("inception", 50_000) == "FID-50K"
    assert "not FID" in frechet_name("inception with other weights", 50_000)
    for count in (49_999, 1000, 50_001):
        assert "not FID-50K" in frechet_name("inception", count)
    assert "not FID" in frechet_name("shipped classifier", 50_000)


def test_images_go_through_png(tiny_bundle, tmp_path, variants):
    pipeline = Pipeline(Sessions(tiny_bundle, threads=1))
    make_images(pipeline, variants[0], tmp_path, silent)
    config = variants[0].config
    direct = [image for images, _ in pipeline.generate(config) for image in images]
    read = load_images(tmp_path, 3)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, np.stack([image.pixels for image in direct]))
    assert [image.label for image in direct] == [0, 1, 2]


def test_an_interrupted_run_goes_on(tiny_bundle, tmp_path, variants):
    pipeline, variant = Pipeline(Sessions(tiny_bundle, threads=1)), variants[0]
    make_images(pipeline, variant, tmp_path, silent)
    whole = load_images(tmp_path, 3).copy()
    # One image damaged, the last line of the journal cut off.
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "00000.png")
    lines = (tmp_path / IMAGES).read_text().splitlines(keepends=True)
    (tmp_path / IMAGES).write_text("".join(lines[:2]) + lines[2][:20])
    assert intact(tmp_path, variant.config) == [1]
    made: list[str] = []
    make_images(pipeline, variant, tmp_path, made.append)
    assert made[-1].endswith("3/3 images")
    np.testing.assert_array_equal(load_images(tmp_path, 3), whole)
    before = len(made)
    assert make_images(pipeline, variant, tmp_path, made.append) == 0.0 and len(made) == before


def test_lines_that_lie_are_not_believed(tmp_path, variants):
    """Labels follow from the configuration; lines of another kind are left out, without a trace."""
    pixels = np.zeros((16, 16), np.uint8)
    lines = []
    for index in range(3):
        path = tmp_path / f"{index:05d}.png"
        Image.fromarray(pixels).save(path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append({"image": index, "label": 7, "sha256": sha256})
    others = [{"image": "x"}, {"image": 99, "sha256": ""}, {"image": True}, {}, {"image": -1}]
    text = "".join(json.dumps(line) + "\n" for line in [*others, *lines])
    (tmp_path / IMAGES).write_text(text)
    assert intact(tmp_path, variants[0].config) == [0, 1, 2]
    kept = [json.loads(line) for line in (tmp_path / IMAGES).read_text().splitlines()]
    assert [(line["image"], line["label"]) for line in kept] == [(0, 0), (1, 1), (2, 2)]


def test_record_of_an_evaluation(tiny_bundle, tmp_path, variants):
    evaluation = Evaluation(tiny_bundle, variants, MeanJudge(), tmp_path, silent)
    record = evaluation.run(Pipeline(Sessions(tiny_bundle, threads=1)))
    json.dumps(record, allow_nan=False)
    assert record["n"] == 3 and len(record["scores"]) == 4
    assert {row["comparison"] for row in record["paired"]} == {
        "same noise", "noise floor: other seed",
    }  # fmt: skip
    same = [row for row in record["paired"] if row["comparison"] == "same noise"]
    assert [row["seed"] for row in same] == [0, 1]
    assert all(row["setting"].startswith("cspd") for row in same)
    frechet = {row["setting"]: row for row in record["spread"] if row["score"] == "frechet"}
    values = [s["score"]["frechet"] for s in record["scores"] if s["setting"].startswith("target")]
    (target, *_) = [row for name, row in frechet.items() if name.startswith("target")]
    assert target["mean"] == pytest.approx(np.mean(values))
    assert target["sd"] == pytest.approx(np.std(values, ddof=1))
    assert [len(table.rows) for table in evaluate.tables(record)] == [2, 3]
    for item in record["scores"]:
        low, high = item["interval"]["frechet"]
        assert low < item["score"]["frechet"] < high
    # Two independent seeds: the interval of their mean is narrower than that of either.
    halves = [s["interval"]["frechet"][1] - s["score"]["frechet"] for s in record["scores"][:2]]
    both = target["interval"][1] - target["mean"]
    assert both == pytest.approx(math.hypot(*halves) / 2, rel=0.2)
    for row in record["paired"]:
        one, base = (next(s["score"]["frechet"] for s in record["scores"] if s["variant"] == name)
                     for name in (row["variant"], row["against"]))  # fmt: skip
        assert row["differences"]["frechet"]["value"] == pytest.approx(one - base)
    shown = evaluate.tables(record)
    assert " ± " in shown[0].rows[0][-1] and " ± " in shown[1].rows[0][-1]
    assert "paired, not independent" in shown[1].note
    assert [table.title for table in evaluate.tables({**record, "paired": []})] == ["Scores"]


def test_paired_difference_by_hand():
    base = np.zeros((2, 2, 2, 1), np.uint8)
    images = base.copy()
    images[1] = 51  # a fifth of the range
    found = paired_difference(images, base)
    assert found["identical"] == 0.5
    assert found["rmse"] == pytest.approx(0.1) and found["shift"] == pytest.approx(0.1)
    assert found["psnr_db"] == pytest.approx((99 - 20 * math.log10(0.2)) / 2)


def test_spread_of_one_seed_is_unknown(tiny_bundle):
    variants = make_variants(tiny_bundle, [{"method": "target"}], [0], 1000, {})
    (row,) = spread(variants, plainly_judged(variants, frechet=[2.0]))
    assert row["sd"] is None and row["mean"] == 2.0


def test_methods_on_the_command_line():
    assert evaluate.parse_method("cspd:gamma=16, on-reject=target") == {
        "method": "cspd", "gamma": "16", "on_reject": "target",
    }  # fmt: skip
    with pytest.raises(CspdError, match="option=value"):
        evaluate.parse_method("cspd:gamma")


def test_as_many_images_as_the_papers_take(tiny_bundle):
    assert evaluate.usual_count(tiny_bundle) == 50_000  # it has the classes of ImageNet
    assert evaluate.usual_count(open_bundle(shipped_bundle())) == 1000


def test_which_judge_fits(tiny_bundle, tmp_path):
    assert isinstance(
        find_judge(open_bundle(shipped_bundle()).manifest, None, None), ClassifierJudge
    )
    with pytest.raises(CspdError, match="--inception"):
        find_judge(tiny_bundle.manifest, None, None)
    with pytest.raises(CspdError, match="belong together"):
        find_judge(tiny_bundle.manifest, tmp_path / "w", None)


def test_the_command_on_the_shipped_pair(tmp_path):
    # Ten images per class is the least that is scored; two steps make no good images, and show it.
    arguments = ["--num-images", "100", "--num-iter", "1", "--head-steps", "2", "--seeds", "0"]
    arguments += ["--method", "draft", "--threads", "1", "--out", str(tmp_path), "--json"]
    result = CliRunner().invoke(evaluate.command, [*arguments, "--quiet"], catch_exceptions=False)
    record = json.loads(result.stdout)
    assert "not FID" in record["frechet_name"] and "n = 100" in record["frechet_name"]
    (item,) = record["scores"]
    low, high = item["interval"]["accuracy"]
    n, share = 100, item["score"]["accuracy"]
    # At most that of n independent trials, less what the classes explain.
    assert high - share == pytest.approx(share - low)
    assert 0 < high - share < 1.2 * 1.96 * (share * (1 - share) / n) ** 0.5
    assert item["score"]["n"] == 100 and item["score"]["frechet"] > item["score"]["frechet_floor"]
    assert len(record["judge"]["extractor_sha256"]) == 64
    assert record["command"].startswith("evaluate --num-images 100 --seeds 0 --method draft")
    again = CliRunner().invoke(evaluate.command, [*arguments, "--quiet"], catch_exceptions=False)
    assert json.loads(again.stdout) == record
    arguments.remove("--json")
    shown = CliRunner().invoke(evaluate.command, [*arguments, "--quiet"], catch_exceptions=False)
    tables, _, ending = shown.stdout.rpartition("\n\n")
    check_narrow(tables)
    assert "Frechet distance of real images" in tables and "images scored in" in ending


def test_inception_weights_are_looked_at_before_they_are_loaded(tmp_path):
    torch.save({"x": print}, tmp_path / "weights.pth")
    judge = InceptionJudge(tmp_path / "weights.pth", tmp_path / "none.npz")
    with pytest.raises(CspdError, match="not a plain file of weights"):
        judge.score(np.zeros((100, 8, 8, 3), np.uint8), np.zeros(100), 0)


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """RANDOM weights in the layout of torch-fidelity's Inception network: its code, not its FID."""
    import_torch_fidelity()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            pass

    folder = tmp_path_factory.mktemp("random-inception")
    torch.save({}, folder / "none.pth")
    torch.manual_seed(0)
    path = folder / "none.pth"
    network = Untrained("random", ["2048"], feature_extractor_weights_path=str(path))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):  # keeps activations near unit size
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), folder / "RANDOM-weights.pth")
    return folder / "RANDOM-weights.pth"


def test_the_command_with_inception_weights(random_inception, tmp_path, monkeypatch):
    """Everything but the trained weights is real: files, network, torch-fidelity's functions."""
    mu, spread = np.full(2048, 0.4), np.full(2048, 0.25)
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=np.diag(spread))
    seen = []
    real = InceptionJudge._features
    monkeypatch.setattr(
        InceptionJudge, "_features", lambda *a: seen.append(real(*a)) or seen[-1]
    )  # fmt: skip
    arguments = ["--num-images", "100", "--num-iter", "1", "--head-steps", "2", "--seeds", "0"]
    arguments += ["--method", "draft", "--threads", "1", "--json", "--quiet"]
    arguments += ["--inception", str(random_inception), "--reference", str(tmp_path / "stats.npz")]
    arguments += ["--out", str(tmp_path / "out")]
    result = CliRunner().invoke(evaluate.command, arguments, catch_exceptions=False)
    record = json.loads(result.stdout)
    assert record["judge"]["name"] == "inception with other weights"
    assert "not FID" in record["frechet_name"]
    ((features, logits),) = seen
    assert features.shape == (100, 2048) and logits.shape == (100, 1008)
    score = record["scores"][0]["score"]
    ours = FeatureStats(torch.from_numpy(mu), torch.diag(torch.from_numpy(spread)))
    expected = frechet_distance(feature_stats(features), ours)
    assert score["frechet"] == pytest.approx(expected, rel=1e-4)
    assert 1 < score["inception_score"] < 100


def test_inception_scores_against_known_gaussians(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    real = rng.normal(size=(400, 6))
    mu, sigma = real.mean(0), np.cov(real, rowvar=False)
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=sigma, features=real.astype(np.float32))
    judge = InceptionJudge(tmp_path / "weights.pth", tmp_path / "stats.npz")
    features = torch.from_numpy(rng.normal(0.5, 1, size=(200, 6)))
    monkeypatch.setattr(
        InceptionJudge, "_features", lambda self, _: (features.float(), torch.zeros(200, 5))
    )
    judged = judge.score(np.zeros((200, 4, 4, 3), np.uint8), np.zeros(200), 0)
    score = judged.score
    assert 0 < half_width(judged.redrawn["frechet"]) < 0.6
    # Nearly equal covariances, means 0.5 apart in six dimensions.
    assert score["frechet"] == pytest.approx(6 * 0.25, abs=0.4)
    assert score["inception_score"] == pytest.approx(1.0)
    assert 0 < score["precision"] <= 1


def test_statistics_without_mu_are_refused(tmp_path):
    np.savez(tmp_path / "stats.npz", other=np.zeros(3))
    with pytest.raises(CspdError, match="not mu and sigma"):
        _ = InceptionJudge(tmp_path / "w", tmp_path / "stats.npz")._statistics


def refused(bundle, tmp_path, *options: str) -> str:
    """What the command says that refuses `options`, having made no image."""
    arguments = [str(bundle.folder), *options, "--threads", "1", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(evaluate.command, arguments)
    assert isinstance(result.exception, CspdError), result.output
    assert not list(tmp_path.rglob("*.png"))
    return str(result.exception)


def test_what_is_known_to_fail_is_refused_before_the_work(tmp_path):
    shipped = open_bundle(shipped_bundle())
    few = refused(shipped, tmp_path, "--num-images", "40")
    assert few == "--num-images is 40; scores need 100 images or more"
    # The second method cannot run: nothing is made of the first.
    long = refused(shipped, tmp_path, "--num-images", "100", "--method", "target",
                   "--method", "target:num_iter=99")  # fmt: skip
    assert "--num-iter is 99, expected 1..49" in long
    torch.save({}, tmp_path / "w.pth")
    np.savez(tmp_path / "stats.npz", other=np.zeros(3))
    judge = ("--inception", str(tmp_path / "w.pth"), "--reference", str(tmp_path / "stats.npz"))
    assert "not mu and sigma" in refused(shipped, tmp_path, "--num-images", "100", *judge)
    np.savez(tmp_path / "stats.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    assert "shapes" in refused(shipped, tmp_path, "--num-images", "100", *judge)
    np.savez(tmp_path / "stats.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    assert "not the weights of" in refused(shipped, tmp_path, "--num-images", "100", *judge)
