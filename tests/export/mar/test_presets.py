import re
from dataclasses import replace

import pytest
import torch
from official import official_names

from cspd.engines.errors import CspdError
from cspd.export.mar.model import Mar
from cspd.export.mar.presets import PRESETS


def names(preset: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return Mar(PRESETS[preset]).state_dict()


@pytest.mark.parametrize(
    "preset,millions,tensors",
    [("mar-b", 207.9, 364), ("mar-l", 478.3, 476), ("mar-h", 942.4, 604)],
)
def test_sizes_of_the_published_models(preset, millions, tensors):
    state = names(preset)
    assert len(state) == tensors
    assert round(sum(tensor.numel() for tensor in state.values()) / 1e6, 1) == millions


@pytest.mark.parametrize(
    "preset,depths", [("mar-b", (12, 12, 6)), ("mar-l", (16, 16, 8)), ("mar-h", (20, 20, 12))]
)
def test_names_are_the_authors(preset, depths):
    assert set(names(preset)) == official_names(*depths)


@pytest.mark.parametrize(
    "preset,dim,width", [("mar-b", 768, 1024), ("mar-l", 1024, 1280), ("mar-h", 1280, 1536)]
)
def test_shapes_of_the_published_models(preset, dim, width):
    shapes = {name: tuple(tensor.shape) for name, tensor in names(preset).items()}
    assert shapes["class_emb.weight"] == (1000, dim)
    assert shapes["encoder_pos_embed_learned"] == (1, 64 + 256, dim)
    assert shapes["decoder_pos_embed_learned"] == (1, 64 + 256, dim)
    assert shapes["diffusion_pos_embed_learned"] == (1, 256, dim)
    assert shapes["z_proj.weight"] == (dim, 16)
    assert shapes["diffloss.net.input_proj.weight"] == (width, 16)
    assert shapes["diffloss.net.final_layer.linear.weight"] == (32, width)


def test_shipped_pair_meets_its_size_budget():
    target, draft = (
        sum(tensor.numel() for tensor in names(f"fashion-{role}").values())
        for role in ("target", "draft")
    )
    assert 3e6 <= target <= 8e6
    assert 2 * (target + draft) < 20e6  # bytes in float16


def test_pair_members_share_their_tokens():
    for pair in (("mar-b", "mar-l", "mar-h"), ("fashion-target", "fashion-draft")):
        geometries = {
            (config.grid, config.token_dim, config.num_classes)
            for config in (PRESETS[name] for name in pair)
        }
        assert len(geometries) == 1


def test_bad_geometry_is_refused():
    with pytest.raises(
        CspdError, match=re.escape("embed_dim 768 is not a multiple of num_heads 7")
    ):
        replace(PRESETS["mar-b"], num_heads=7)
    with pytest.raises(CspdError, match=re.escape("encoder_depth is 0, expected 1..")):
        replace(PRESETS["mar-b"], encoder_depth=0)
