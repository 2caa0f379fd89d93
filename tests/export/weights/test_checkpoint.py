import argparse
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from weights import decoder_zeros, error_of, write_sparse_safetensors
from weights import draft_state as weights_of_the_draft

from cspd.engines.schedule import ScheduleSpec, make_schedule
from cspd.export.graphs.denoiser import guided_kernel
from cspd.export.mar.model import Mar
from cspd.export.mar.presets import PRESETS, MarConfig
from cspd.export.weights.checkpoint import load_mar, load_vae
from cspd.export.weights.files import file_sha256
from cspd.export.weights.geometry import infer_config
from cspd.export.weights.random import random_state

GOLDEN = Path(__file__).parents[2] / "golden"
PUBLISHED = ("mar-b", "mar-l", "mar-h")
State = dict[str, torch.Tensor]


def meta_state(config: MarConfig) -> State:
    with torch.device("meta"):
        return Mar(config).state_dict()


@pytest.fixture(scope="module")
def draft_state() -> State:
    return dict(weights_of_the_draft())


def test_averaged_weights_come_first(tmp_path, draft_state):
    path = tmp_path / "checkpoint-last.pth"
    plain = {name: tensor + 1 for name, tensor in draft_state.items()}
    options = argparse.Namespace(model="mar_base", batch_size=64)
    torch.save(
        {"model": plain, "model_ema": draft_state, "epoch": 3, "optimizer": {}, "args": options},
        path,
    )
    loaded = load_mar(path, "fashion-draft")
    assert loaded.source == "model_ema"
    assert loaded.config == PRESETS["fashion-draft"]
    assert loaded.warnings == ()
    assert loaded.sha256 == file_sha256(path)
    assert all(torch.equal(loaded.state[name], draft_state[name]) for name in draft_state)
    assert load_mar(tmp_path).sha256 == loaded.sha256  # the authors' --resume DIR


def test_plain_weights_need_consent(tmp_path, draft_state):
    path = tmp_path / "plain.pth"
    torch.save({"model": draft_state}, path)
    assert "--allow-non-ema" in error_of(lambda: load_mar(path))
    loaded = load_mar(path, allow_non_ema=True)
    assert loaded.source == "model"
    assert "without averaging" in loaded.warnings[0]


def test_safetensors_and_bare_state_dicts(tmp_path, draft_state):
    save_file(draft_state, tmp_path / "a.safetensors")
    torch.save(draft_state, tmp_path / "b.pth")
    torch.save({"model_ema": draft_state}, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    sources = [load_mar(tmp_path / name).source for name in ("a.safetensors", "b.pth", "c.pth")]
    assert sources == ["safetensors", "state_dict", "model_ema"]


def test_tensors_stay_on_disk(tmp_path):
    state = meta_state(PRESETS["mar-b"])
    write_sparse_safetensors(tmp_path / "m.safetensors", state, "F16", 2)
    before = private_bytes()
    loaded = load_mar(tmp_path / "m.safetensors", "mar-b")
    assert sum(tensor.nbytes for tensor in loaded.state.values()) > 400_000_000
    assert private_bytes() - before < 100 << 20
    assert "non-EMA" in loaded.warnings[0] and "hash is not known" in loaded.warnings[0]


def private_bytes() -> int:
    """Memory of this process that is no page of a file: those were read, but cost nothing."""
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def test_pth_is_memory_mapped(tmp_path):
    path = tmp_path / "large.pth"
    config = PRESETS["fashion-target"]
    state = meta_state(config)
    ballast = torch.zeros(60_000_000)
    zeros = {name: torch.zeros(tensor.shape) for name, tensor in state.items()}
    torch.save({"model_ema": zeros, "optimizer": ballast}, path)
    del ballast
    before = private_bytes()
    loaded = load_mar(path)
    assert loaded.config == config
    assert private_bytes() - before < 100 << 20


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("load", [load_mar, load_vae])
def test_malicious_pickle_is_refused_and_not_run(tmp_path, load, zipped):
    path, marker = tmp_path / "evil.pth", tmp_path / "owned"
    torch.save({"model_ema": Attack(marker)}, path, _use_new_zipfile_serialization=zipped)
    message = error_of(lambda: load(path))
    assert "refused" in message and "mkdir" in message
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0.99, 0.5, 0.001])
def test_truncated_files(tmp_path, draft_state, suffix, kept):
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pth":
        torch.save({"model_ema": draft_state}, path)
    else:
        save_file(draft_state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert "cut off" in error_of(lambda: load_mar(path))


def test_missing_file(tmp_path):
    assert "No such file" in error_of(lambda: load_mar(tmp_path / "none.pth"))


def test_wrong_size_names_the_preset_that_fits(tmp_path, draft_state):
    save_file(draft_state, tmp_path / "w.safetensors")
    message = error_of(lambda: load_mar(tmp_path / "w.safetensors", "fashion-target"))
    assert "they fit fashion-draft" in message
    assert "embed_dim 96 instead of 192" in message


def test_missing_unexpected_and_misshapen_tensors(tmp_path, draft_state):
    state = dict(draft_state)
    del state["encoder_norm.weight"]
    state |= {f"extra.{i}": torch.zeros(1) for i in range(5)}
    state["z_proj.bias"] = torch.zeros(7)
    save_file(state, tmp_path / "w.safetensors")
    message = error_of(lambda: load_mar(tmp_path / "w.safetensors"))
    assert "missing: encoder_norm.weight" in message
    assert "unexpected: extra.0, extra.1, extra.2 and 2 more" in message
    assert "z_proj.bias is [7], expected [96]" in message


def test_weights_of_another_network(tmp_path):
    save_file({"layer.weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    message = error_of(lambda: load_mar(tmp_path / "w.safetensors"))
    assert "no weights of a MAR model" in message and "layer.weight" in message


def test_checkpoint_without_weights(tmp_path):
    torch.save({"epoch": 3, "model": {"a": 1}}, tmp_path / "w.pth")
    message = error_of(lambda: load_mar(tmp_path / "w.pth"))
    assert "its 'model' holds 'a', which is int" in message and "'model_ema'" in message


@pytest.mark.parametrize("preset", list(PRESETS))
def test_config_is_derived_from_shapes(preset):
    assert infer_config(meta_state(PRESETS[preset])) == PRESETS[preset]


def test_head_is_derived_and_not_taken_from_the_preset(tmp_path):
    config = MarConfig(**{**vars(PRESETS["fashion-draft"]), "head_width": 128, "head_depth": 4})
    save_file(random_state(Mar(config), seed=0), tmp_path / "w.safetensors")
    loaded = load_mar(tmp_path / "w.safetensors", "fashion-draft")
    assert loaded.config == config
    assert "head_width 128 instead of 96" in loaded.warnings[0]
    assert "head_depth 4 instead of 2" in loaded.warnings[0]


def test_unknown_geometry_needs_heads():
    state = load_file(GOLDEN / "mar_tiny.weights.safetensors")
    assert "fits no preset; the nearest" in error_of(lambda: infer_config(state))
    config = infer_config(state, num_heads=4)
    given = json.loads((GOLDEN / "mar_tiny.json").read_text())["config"]
    assert config.grid == given["img_size"] // given["vae_stride"]
    assert (config.embed_dim, config.encoder_depth) == (32, given["encoder_depth"])
    assert (config.head_width, config.head_depth) == (given["diffloss_w"], given["diffloss_d"])
    assert (config.buffer_size, config.num_heads) == (given["buffer_size"], 4)


def test_blocks_are_counted_before_a_model_is_built():
    state = meta_state(PRESETS["fashion-draft"])
    state |= {f"encoder_blocks.{i}.x": torch.zeros(1) for i in range(300)}
    assert "300 encoder_blocks, at most 256" in error_of(lambda: infer_config(state))


def test_token_count_must_be_a_square():
    state = meta_state(PRESETS["fashion-draft"])
    state["diffusion_pos_embed_learned"] = torch.zeros(1, 50, 96, device="meta")
    assert "50 tokens" in error_of(lambda: infer_config(state))


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_vae_keeps_the_decoder_only(tmp_path, suffix):
    path = tmp_path / f"kl16{suffix}"
    full = decoder_zeros()
    full |= {"encoder.conv_in.weight": torch.zeros(1), "quant_conv.bias": torch.zeros(1)}
    if suffix == ".ckpt":
        torch.save({"model": full, "epoch": 1}, path)
    else:
        write_sparse_safetensors(path, full, "BF16", 2)
    loaded = load_vae(path)
    assert set(loaded.state) == set(decoder_zeros())
    assert loaded.source == ("model" if suffix == ".ckpt" else "safetensors")


def test_mar_given_as_vae(tmp_path, draft_state):
    save_file(draft_state, tmp_path / "w.safetensors")
    message = error_of(lambda: load_vae(tmp_path / "w.safetensors"))
    assert "missing: post_quant_conv.weight" in message


def test_random_weights_are_reproducible():
    with torch.device("meta"):
        model = Mar(PRESETS["fashion-draft"])
    first, again, other = (random_state(model, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["z_proj.weight"], other["z_proj.weight"])
    halved = random_state(model, 0, torch.float16)
    assert all(torch.equal(halved[name], first[name].half()) for name in ("z_proj.weight",))
    assert {tensor.dtype for tensor in halved.values()} == {torch.float16}


@torch.inference_mode()
def test_random_weights_sample_near_unit_size():
    """Through the ill-conditioned official schedule, with the head of mar-b."""
    config = MarConfig(**{**vars(PRESETS["mar-b"]), "encoder_depth": 1, "decoder_depth": 1})
    with torch.device("meta"):
        model = Mar(config)
    model.load_state_dict(random_state(model, 0), assign=True)
    schedule = make_schedule(ScheduleSpec(), 100)
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(16, size, generator=generator) for size in (16, config.embed_dim))
    for step in reversed(range(100)):
        row = schedule.table[step, None]
        noise, variance = model.diffloss.net(x, row[:, 0], z)
        mean, log_std, _, fraction = guided_kernel(noise[None], variance[None], x, x[:, 0], row)
        x = mean + log_std.exp() * torch.randn(x.shape, generator=generator) * (step > 0)
        assert 0 < fraction.min() and fraction.max() < 1
    assert 0.05 < x.std() < 5
