"""The decoder of diffusers' `AutoencoderKL` under the names of latent diffusion, which are ours.

diffusers counts the levels of the decoder from the latents, latent diffusion from the image, and it
stores the attention's 1 x 1 convolutions as matrices.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from cspd.export.mar.vae import MULTIPLIERS

NUMBER = r"(\d{1,3})"
MIDDLE = {
    r"decoder\.conv_norm_out\.": "decoder.norm_out.",
    r"decoder\.mid_block\.resnets\.0\.": "decoder.mid.block_1.",
    r"decoder\.mid_block\.resnets\.1\.": "decoder.mid.block_2.",
    r"decoder\.mid_block\.attentions\.0\.group_norm\.": "decoder.mid.attn_1.norm.",
    r"decoder\.mid_block\.attentions\.0\.(?:to_q|query)\.": "decoder.mid.attn_1.q.",
    r"decoder\.mid_block\.attentions\.0\.(?:to_k|key)\.": "decoder.mid.attn_1.k.",
    r"decoder\.mid_block\.attentions\.0\.(?:to_v|value)\.": "decoder.mid.attn_1.v.",
    r"decoder\.mid_block\.attentions\.0\.(?:to_out\.0|proj_attn)\.": "decoder.mid.attn_1.proj_out.",
}
ATTENTION = re.compile(r"decoder\.mid\.attn_1\.(?:q|k|v|proj_out)\.weight")


def is_diffusers(state: Mapping[str, Tensor]) -> bool:
    """Whether `state` has diffusers' names of a VAE's decoder."""
    return any(name.startswith(("decoder.up_blocks.", "decoder.mid_block.")) for name in state)


def latent_diffusion_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with diffusers' names and matrices turned into those of latent diffusion.

    Names that have no counterpart stay as they are, for the comparison with the network to find.
    """
    named = {_name(name): tensor for name, tensor in state.items()}
    return {
        name: tensor[..., None, None] if tensor.ndim == 2 and ATTENTION.fullmatch(name) else tensor
        for name, tensor in named.items()
    }


def _name(name: str) -> str:
    for pattern, ours in MIDDLE.items():
        name = re.sub(f"^{pattern}", ours, name)
    name = name.replace(".conv_shortcut.", ".nin_shortcut.")
    name = re.sub(rf"^decoder\.up_blocks\.{NUMBER}\.", _level, name)
    name = re.sub(rf"^(decoder\.up\.\d+)\.resnets\.{NUMBER}\.", r"\1.block.\2.", name)
    return re.sub(r"^(decoder\.up\.\d+)\.upsamplers\.0\.conv\.", r"\1.upsample.conv.", name)


def _level(match: re.Match[str]) -> str:
    level = len(MULTIPLIERS) - 1 - int(match[1])
    return f"decoder.up.{level}." if level >= 0 else match[0]
