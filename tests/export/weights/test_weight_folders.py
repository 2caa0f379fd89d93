"""Folders, shards, and the authors' layout."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from weights import decoder_zeros, draft_state, error_of, other_state, same

from cspd.export.weights.checkpoint import load_mar, load_vae
from cspd.export.weights.files import file_sha256
from cspd.export.weights.folders import DEFAULT_PATHS, FOLDER_NAMES, find_default_weights

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("name", [n for n in FOLDER_NAMES["mar"] if not n.endswith(".json")])
def test_known_file_of_a_folder(tmp_path, name):
    state = dict(draft_state())
    save_file(other_state(), tmp_path / "a.safetensors")
    save_file(other_state(), tmp_path / "b.safetensors")
    path = tmp_path / name
    save_file(state, path) if name.endswith("tensors") else torch.save({"model_ema": state}, path)
    loaded = load_mar(tmp_path, "fashion-draft")
    assert same(loaded.state, state) and loaded.path == path
    assert f"{tmp_path}: its {name} is read" in loaded.warnings


@pytest.mark.parametrize("name", ["kl16.ckpt", "diffusion_pytorch_model.bin", "any.pt"])
def test_vae_in_a_folder(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    torch.save({"state_dict": decoder_zeros()}, tmp_path / name)
    assert load_vae(tmp_path).path == tmp_path / name


def test_folder_without_weights_is_listed(tmp_path):
    assert "it holds nothing" in error_of(lambda: load_mar(tmp_path))
    (tmp_path / "logs").mkdir()
    (tmp_path / "config.json").write_text("{}")
    message = error_of(lambda: load_vae(tmp_path))
    assert "no file" in message and "config.json, logs/" in message and "kl16.ckpt" in message
    for number in range(12):
        (tmp_path / f"model-{number:02}.safetensors").touch()
    message = error_of(lambda: load_mar(tmp_path))
    assert "several files" in message and "model-07.safetensors and 4 more" in message


@pytest.fixture
def sharded(tmp_path):
    """The draft in two shards and their index, which the test may change."""
    state = dict(draft_state())
    names = list(state)
    places = {name: FIRST if i % 2 else SECOND for i, name in enumerate(names)}
    for shard in (FIRST, SECOND):
        save_file({n: t for n, t in state.items() if places[n] == shard}, tmp_path / shard)
    write_index(tmp_path, places)
    return tmp_path, places


def write_index(folder, places: dict) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_shards_are_one_state_dict(sharded):
    folder, _ = sharded
    for path in (folder, folder / INDEX):
        loaded = load_mar(path, "fashion-draft")
        assert same(loaded.state, draft_state()) and loaded.path == folder / INDEX
        assert loaded.source == "safetensors"
    # The hash is that of what sha256sum prints for the shards.
    printed = "".join(f"{file_sha256(folder / name)}  {name}\n" for name in (FIRST, SECOND))
    (folder / "sums").write_text(printed)
    assert loaded.sha256 == file_sha256(folder / "sums")


def test_shards_may_be_links(sharded):
    """As the cache of a hub stores them."""
    folder, _ = sharded
    for name in (FIRST, SECOND):
        (folder / name).rename(folder / f"blob-{name}")
        os.symlink(f"blob-{name}", folder / name)
    assert same(load_mar(folder).state, draft_state())


def test_missing_shard(sharded):
    folder, _ = sharded
    (folder / SECOND).unlink()
    message = error_of(lambda: load_mar(folder))
    assert f"1 of 2 shards are missing ({SECOND})" in message and "download" in message


def test_tensor_in_two_shards(sharded):
    folder, places = sharded
    state = {name: tensor for name, tensor in draft_state().items()}
    name = next(name for name in places if places[name] == FIRST)
    kept = {n: t for n, t in state.items() if places[n] == SECOND}
    save_file({**kept, name: state[name]}, folder / SECOND)
    message = error_of(lambda: load_mar(folder))
    assert f"{SECOND}: 1 tensors are in another shard too ({name})" in message


def test_name_twice_in_the_index(sharded):
    folder, places = sharded
    content = json.dumps(places)[:-1] + f', "z_proj.bias": "{FIRST}"}}'
    (folder / INDEX).write_text(f'{{"weight_map": {content}}}')
    assert "z_proj.bias stands in it twice" in error_of(lambda: load_mar(folder))


@pytest.mark.parametrize("more", [True, False])
def test_shards_that_hold_something_else(sharded, more):
    folder, places = sharded
    if more:
        write_index(folder, {**places, "extra.bias": FIRST})
        expected = f"{FIRST}: 1 tensors are missing, the index has them here (extra.bias)"
    else:
        write_index(folder, {n: s for n, s in places.items() if n != "mask_token"})
        expected = "1 tensors are not in the index (mask_token)"
    assert expected in error_of(lambda: load_mar(folder))


OUTSIDE = ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", "C:w",
           "a\0b", "x" * 5000, 7, None, [FIRST]]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=range(len(OUTSIDE)))
def test_index_that_names_other_places(sharded, name):
    folder, places = sharded
    save_file(dict(draft_state()), folder.parent / "secret.safetensors")
    write_index(folder, {**places, "z_proj.bias": name})
    message = error_of(lambda: load_mar(folder))
    assert "the shard of z_proj.bias is" in message and "beside the index" in message


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000]
)
def test_index_that_is_none(sharded, content):
    folder, _ = sharded
    (folder / INDEX).write_text(content)
    assert "not an index of shards" in error_of(lambda: load_mar(folder / INDEX))


def test_index_of_too_many_names(sharded):
    folder, _ = sharded
    write_index(folder, {f"layer.{i}": FIRST for i in range(30_000)})
    assert "30,000 tensors" in error_of(lambda: load_mar(folder))
    (folder / INDEX).write_bytes(b"{" + b" " * (5 << 20))
    assert "an index of 5,242,881 bytes" in error_of(lambda: load_mar(folder))


@pytest.mark.parametrize("name", list(DEFAULT_PATHS))
def test_default_weights(tmp_path, name):
    message = error_of(lambda: find_default_weights(name, tmp_path))
    assert all(str(tmp_path / path) in message for path in DEFAULT_PATHS[name])
    assert "--random-weights" in message
    for relative in reversed(DEFAULT_PATHS[name]):
        path = tmp_path / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert find_default_weights(name, tmp_path) == path


def test_default_weights_of_an_unknown_model(tmp_path):
    assert "fashion-draft" in error_of(lambda: find_default_weights("fashion-draft", tmp_path))
