"""Defaults that a bundle cannot run are refused by every entry, with one message."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from spoilt import change_manifest, shipped_copy

import cspd
from cspd.engines.bundle import MANIFEST
from cspd.engines.errors import BundleError
from cspd.export.cli import main as export
from cspd.runtime.commands.cli import main as run
from cspd.runtime.config import check_config
from cspd.runtime.settings import configure, shipped_bundle, usable_bundle

# A default, and what is said of it.
WRONG = {
    "gama": (8, "gama: there is no such setting; did you mean gamma?"),
    "as_released": (True, "as_released: there is no such setting"),
    "strict": (True, "strict: there is no such setting"),
    "labels": ([1], "labels is chosen by each run, it has no default"),
    "class_balanced": (True, "class_balanced is chosen by each run"),
    "method": ("fast", "method is 'fast', expected one of target, draft, cspd, lossless, auto"),
    "num_iter": (50, "num_iter is 50, expected 1..49, the number of tokens of an image"),
    "gamma": ("8", "gamma is '8', expected a whole number, 1 or more"),
    "cfg": (float("nan"), "cfg is nan, expected 0..100"),
    "temperature": (True, "temperature is True, expected a number, more than 0, at most 10"),
    "prefill": ([0.5], "prefill is [0.5], expected a number, 0..1"),
    "align": (1, "align is 1, expected true or false"),
    "head": ("lossless", 'head="lossless" contradicts method="auto"'),
    "head_steps": (1001, "head_steps is 1001, expected 2..951 for this model"),
    "relax": ("tv", "relax is 'tv', "),
    "window": (33, "window is 33, expected 1..32"),
    "batch_size": (8.5, "batch_size is 8.5, expected a whole number, 1..4096"),
    "backend": ("abacus", "backend is 'abacus', expected one of onnxruntime, "),
    # Engines that the bundle does not have.
    "backend ": ("tensorrt-rtx", 'backend="tensorrt-rtx": the bundle has no such engines'),
    "reproducible": (None, "reproducible is null, expected true or false"),
}


@pytest.fixture
def bundle(tmp_path):
    """A manifest alone: defaults are looked at before any file."""
    (tmp_path / "bundle").mkdir()
    shutil.copy(shipped_bundle() / MANIFEST, tmp_path / "bundle")
    return tmp_path / "bundle"


def said(bundle) -> str:
    with pytest.raises(BundleError) as caught:
        usable_bundle(bundle)
    return str(caught.value)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_default_is_named(bundle, name):
    value, words = WRONG[name]
    more = {"method": "auto"} if name == "head" else {}
    change_manifest(bundle, lambda m: m["defaults"].update({**more, name.strip(): value}))
    message = said(bundle)
    assert message.startswith(f"{bundle / MANIFEST}: defaults: {words}")
    assert message.endswith("; rebuild the bundle with cspd-export build") and "--" not in message


@pytest.mark.parametrize("method", ["cspd", "draft"])
def test_a_method_needs_its_models(bundle, method):
    def alone(manifest):
        del manifest["models"]["draft"]
        manifest["defaults"] = {"method": method}

    change_manifest(bundle, alone)
    assert f'defaults: method="{method}": the bundle has no draft model' in said(bundle)


@pytest.mark.parametrize("setting", ["method", "head"])
def test_speculation_needs_its_graph(bundle, setting):
    def change(manifest):
        del manifest["models"]["target"]["graphs"]["speculative_round"]
        manifest["defaults"] = {setting: "lossless"}

    change_manifest(bundle, change)
    expected = f'{setting}="lossless": the bundle has no graph target/speculative_round'
    assert expected in said(bundle)


def test_every_default_that_a_run_can_have_passes(bundle):
    good = {
        "method": "lossless", "num_iter": 49, "gamma": 8, "cfg": 3, "cfg_schedule": "constant",
        "temperature": 0.9, "prefill": 0, "align": False, "head_steps": "50:20", "window": 32,
        "relax": "tv=0.05", "batch_size": 2, "backend": "torch", "reproducible": False,
    }  # fmt: skip
    change_manifest(bundle, lambda m: m.update(defaults=good))
    opened = usable_bundle(bundle)
    assert opened.manifest.defaults == good
    assert json.loads(opened.manifest.model_dump_json())["defaults"] == good


def test_a_bundle_answers_only_for_what_it_says(bundle):
    """It has 49 tokens, where a run takes 64 steps unless told otherwise."""
    change_manifest(bundle, lambda m: m.update(defaults={}))
    assert usable_bundle(bundle).manifest.defaults == {}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    bundle = shipped_copy(tmp_path_factory.mktemp("broken"))
    change_manifest(bundle, lambda m: m["defaults"].update(num_iter=50))
    return bundle


ENTRIES = {
    "generate": (run, ["generate", "BUNDLE"]),
    "generate, its own setting": (run, ["generate", "BUNDLE", "--num-iter", "4"]),
    "generate, dry run": (run, ["generate", "BUNDLE", "--dry-run"]),
    "replay": (run, ["replay", "IMAGE", "BUNDLE"]),
    "tune": (run, ["tune", "BUNDLE"]),
    "bench": (run, ["bench", "BUNDLE", "--dry-run"]),
    "evaluate": (run, ["evaluate", "BUNDLE"]),
    "serve": (run, ["serve", "BUNDLE"]),
    "inspect": (export, ["inspect", "BUNDLE", "--no-verify"]),
    "parity": (export, ["parity", "BUNDLE"]),
    "triton": (export, ["triton", "BUNDLE", "--out", "out"]),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_says_the_same(broken, tmp_path, monkeypatch, entry):
    monkeypatch.chdir(tmp_path)
    Path("image.png").touch()
    command, words = ENTRIES[entry]
    values = {"BUNDLE": str(broken), "IMAGE": "image.png"}
    result = CliRunner().invoke(command, [values.get(word, word) for word in words])
    assert result.exit_code == 1, result.output
    assert result.output == f"Error: {said(broken)}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.png"]


def test_python_says_the_same(broken):
    with pytest.raises(BundleError) as caught:
        cspd.load(broken)
    assert str(caught.value) == said(broken)


def test_a_small_bundle_that_says_nothing_takes_what_it_can(bundle):
    """49 tokens, where 64 steps are usual."""
    change_manifest(bundle, lambda m: m.update(defaults={}))
    config = configure(usable_bundle(bundle), None, {})
    assert (config.num_iter, config.gamma) == (49, 8)
    check_config(config, usable_bundle(bundle).manifest)
