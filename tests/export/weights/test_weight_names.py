"""Wrappers and dicts that people really have; averaged weights first, whatever they are called."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from weights import (
    decoder_zeros,
    draft_state,
    error_of,
    other_state,
    prefixed,
    same,
    write_sparse_safetensors,
)

from cspd.export.build import BuildOptions
from cspd.export.mar.model import Mar
from cspd.export.mar.presets import PRESETS
from cspd.export.pairs import mar_plan
from cspd.export.weights.checkpoint import load_mar, load_vae

WRAPPERS = ("_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.")


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("prefix", [*WRAPPERS, "model_ema.", "ema_model.", "ema_model.module."])
def test_prefix_of_all_names_is_taken_off(tmp_path, prefix):
    save_file(prefixed(prefix, draft_state()), tmp_path / "w.safetensors")
    loaded = load_mar(tmp_path / "w.safetensors", "fashion-draft")
    assert same(loaded.state, draft_state())
    assert loaded.source == f"safetensors/{prefix}"
    assert loaded.warnings == (f"w.safetensors: names taken without '{prefix}'",)


@pytest.mark.parametrize("prefix", ["model.", "module.model.", "model._orig_mod."])
def test_prefix_that_says_not_averaged(tmp_path, prefix):
    path = saved(tmp_path / "w.pth", prefixed(prefix, draft_state()))
    assert "--allow-non-ema" in error_of(lambda: load_mar(path))
    loaded = load_mar(path, allow_non_ema=True)
    assert same(loaded.state, draft_state()) and loaded.source == f"state_dict/{prefix}"
    assert "without averaging" in loaded.warnings[0]


PAIRS = [
    ("model", "ema"), ("model", "model_ema"), ("state_dict", "ema_state_dict"),
    ("state_dict", "state_dict_ema"), ("module", "ema_model"),
    ("model_state_dict", "model_ema_state_dict"),
]  # fmt: skip


@pytest.mark.parametrize(("plain", "averaged"), PAIRS)
@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
def test_averaged_dict_comes_first(tmp_path, plain, averaged, prefix):
    content = {plain: prefixed(prefix, other_state()), averaged: prefixed(prefix, draft_state())}
    loaded = load_mar(saved(tmp_path / "w.pth", content), "fashion-draft")
    assert same(loaded.state, draft_state())
    assert loaded.source == (f"{averaged}/{prefix}" if prefix else averaged)
    assert len(loaded.warnings) == bool(prefix)


@pytest.mark.parametrize("label", ["model", "state_dict", "model_state_dict", "module"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_any_other_dict_needs_consent(tmp_path, label, prefix):
    content = {label: prefixed(prefix, draft_state()), "epoch": 3}
    path = saved(tmp_path / "w.pth", content)
    message = error_of(lambda: load_mar(path))
    assert "--allow-non-ema" in message and f"'{label}" in message
    loaded = load_mar(path, allow_non_ema=True)
    assert same(loaded.state, draft_state())
    assert "without averaging" in loaded.warnings[0]


@pytest.mark.parametrize("averaged", ["model_ema.", "ema_model.", "ema."])
@pytest.mark.parametrize("label", ["state_dict", None])
def test_averaged_names_among_others(tmp_path, averaged, label):
    """As training modules store both in one state dict, with the counters of their averages."""
    state = prefixed("online_model.", other_state()) | prefixed(averaged, draft_state())
    state |= {"step": torch.tensor(7), averaged + "num_updates": torch.tensor(7)}
    loaded = load_mar(saved(tmp_path / "w.pth", {label: state} if label else state))
    assert same(loaded.state, draft_state())
    assert f"{len(draft_state()) + 2} other tensors are not used" in loaded.warnings[-1]


def test_average_of_the_framework(tmp_path):
    """torch.optim.swa_utils.AveragedModel counts beside the module that it wraps."""
    state = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(1, 1)).state_dict()
    counters = {name: tensor for name, tensor in state.items() if not name.startswith("module.")}
    assert counters
    path = saved(tmp_path / "w.pth", {"ema": prefixed("module.", draft_state()) | counters})
    assert same(load_mar(path).state, draft_state())


def test_prefix_of_some_names_only(tmp_path):
    state = prefixed("module.", draft_state())
    state["z_proj.bias"] = state.pop("module.z_proj.bias")
    message = error_of(lambda: load_mar(saved(tmp_path / "w.pth", state)))
    assert f"{len(state) - 1} names start with 'module.'" in message
    assert "1 do not (z_proj.bias)" in message and "save the state_dict" in message


def test_dict_that_no_one_knows(tmp_path):
    path = saved(tmp_path / "w.pth", {"weights": dict(draft_state()), "epoch": 3})
    message = error_of(lambda: load_mar(path))
    assert "['weights', 'epoch']" in message and "{'model_ema': network.state_dict()}" in message


UNUSABLE = {
    "empty": ({}, "its 'model_ema' is empty"),
    "None": (None, "its 'model_ema' is NoneType"),
    "nested": ({"state_dict": {"w": torch.zeros(1)}}, "holds 'state_dict', which is dict"),
    "number among tensors": ({"w": torch.zeros(1), "epoch": 3}, "holds 'epoch', which is int"),
    "number as a name": ({1: torch.zeros(1)}, "has a name that is no text but int (1)"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_known_dict_that_holds_no_weights_is_named_with_the_reason(tmp_path, case):
    value, reason = UNUSABLE[case]
    path = saved(tmp_path / "w.pth", {"model_ema": value})
    message = error_of(lambda: load_mar(path))
    assert "its 'model_ema'" in message and reason in message
    assert "expected tensors by name" in message and "expected one of" not in message
    saved(path, {"model_ema": value, "model": dict(draft_state())})
    message = error_of(lambda: load_mar(path))
    assert "holds 'model', but" in message and reason in message and "--allow-non-ema" in message
    assert same(load_mar(path, allow_non_ema=True).state, draft_state())


@pytest.mark.parametrize(("name", "value"), [(1, torch.zeros(1)), ("epoch", 3)])
def test_the_odd_entry_among_bare_tensors_is_named(tmp_path, name, value):
    message = error_of(lambda: load_mar(saved(tmp_path / "w.pth", {**draft_state(), name: value})))
    assert ("int (1)" if name == 1 else "holds 'epoch', which is int") in message
    assert "expected tensors by name alone" in message


def test_build_reports_the_prefix_and_records_it(tmp_path):
    with torch.device("meta"):
        names = prefixed("module.model_ema.", Mar(PRESETS["mar-b"]).state_dict())
    write_sparse_safetensors(tmp_path / "b.safetensors", names, "F16", 2)
    saved(tmp_path / "kl16.ckpt", {"state_dict": prefixed("first_stage_model.", decoder_zeros())})
    lines: list[str] = []
    plan = mar_plan(
        {"target": "mar-b"}, {"target": tmp_path / "b.safetensors"}, tmp_path, BuildOptions(),
        random_weights=False, allow_non_ema=False, clip_timesteps=None, warn=lines.append,
    )  # fmt: skip
    assert lines == [
        "b.safetensors: names taken without 'module.model_ema.'",
        "kl16.ckpt: names taken without 'first_stage_model.'",
        f"{tmp_path}: its kl16.ckpt is read",
    ]
    assert plan.models["target"].origin == "safetensors/module.model_ema."
    assert plan.decoder.origin == "state_dict/first_stage_model."


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "module.", "model.", "vae."])
@pytest.mark.parametrize("label", ["state_dict", "model", None])
def test_vae_in_every_wrapper(tmp_path, prefix, label):
    state = prefixed(prefix, decoder_zeros() | {"encoder.conv_in.bias": torch.zeros(1)})
    if prefix in ("first_stage_model.", "vae."):
        state |= {"model.diffusion_model.out.bias": torch.zeros(1)}
    loaded = load_vae(saved(tmp_path / "kl16.ckpt", {label: state} if label else state))
    assert same(loaded.state, decoder_zeros())
    assert loaded.source == (label or "state_dict") + (f"/{prefix}" if prefix else "")
    assert (f"'{prefix}'" in "".join(loaded.warnings)) == bool(prefix)
