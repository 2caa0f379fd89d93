import json

import pytest
import torch
from golden_vae import GOLDEN, golden_weight, relative
from safetensors.torch import load_file
from weights import error_of

from cspd.export.mar.diffusers_vae import latent_diffusion_names
from cspd.export.mar.vae import VaeDecoder
from cspd.export.weights.checkpoint import load_vae

KEYS = json.loads((GOLDEN / "kl16_diffusers.json").read_text())["keys"]
# diffusers' names of the attention before its release 0.17.
OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(1).expand(shape) for name, shape in KEYS}


@torch.inference_mode()
def test_image_is_that_of_diffusers():
    """Every weight is another one, so that no two of them can be exchanged."""
    state = {name: golden_weight(i, name, shape) for i, (name, shape) in enumerate(KEYS)}
    with torch.device("meta"):
        decoder = VaeDecoder()
    decoder.load_state_dict(latent_diffusion_names(state), assign=True)
    latents = load_file(GOLDEN / "kl16_decoder.vectors.safetensors")["latents"][:1, :, :1, :1]
    image = load_file(GOLDEN / "kl16_diffusers.vectors.safetensors")["image"]
    assert relative(decoder(latents)[0], image) < 1e-5


@pytest.mark.parametrize("label", ["state_dict", None])
def test_names_are_converted_and_reported(tmp_path, label):
    state = zeros() | {"encoder.conv_in.weight": torch.zeros(1), "quant_conv.bias": torch.zeros(1)}
    torch.save({label: state} if label else state, tmp_path / "diffusion_pytorch_model.bin")
    loaded = load_vae(tmp_path)
    with torch.device("meta"):
        expected = VaeDecoder().state_dict()
    assert {n: t.shape for n, t in loaded.state.items()} == {
        n: t.shape for n, t in expected.items()
    }
    assert "diffusers' names" in loaded.warnings[-1]


def test_older_names_of_the_attention():
    older = zeros()
    for new, old in OLDER.items():
        older = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in older.items()}
    assert latent_diffusion_names(older).keys() == latent_diffusion_names(zeros()).keys()


def test_vae_of_another_shape_is_refused_with_what_is_needed(tmp_path):
    """Four levels and four channels, as Stable Diffusion has."""
    state = {n: t for n, t in zeros().items() if ".up_blocks.4." not in n}
    state["decoder.conv_in.weight"] = torch.zeros(1).expand(512, 4, 3, 3)
    torch.save(state, tmp_path / "sd.ckpt")
    message = error_of(lambda: load_vae(tmp_path / "sd.ckpt"))
    assert "missing: decoder.up.0.block.0." in message
    assert "decoder.conv_in.weight is [512, 4, 3, 3], expected [512, 16, 3, 3]" in message
    assert "kl16.ckpt: 16 latent channels" in message


def test_weight_under_two_names(tmp_path):
    name = "decoder.mid_block.attentions.0.query.bias"
    torch.save(zeros() | {name: torch.zeros(512)}, tmp_path / "w.ckpt")
    assert "two names" in error_of(lambda: load_vae(tmp_path / "w.ckpt"))
