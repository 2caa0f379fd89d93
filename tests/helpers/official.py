"""Checkpoints as the authors of MAR publish them: names and layout (LTH14/mar)."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor


def official_names(encoder: int, decoder: int, head: int) -> set[str]:
    """Names of the authors' checkpoints: timm 0.9 blocks, SimpleMLPAdaLN head (LTH14/mar)."""

    def with_bias(*layers: str) -> set[str]:
        return {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}

    found = {"class_emb.weight", "fake_latent", "mask_token"}
    found |= {f"{place}_pos_embed_learned" for place in ("encoder", "decoder", "diffusion")}
    found |= with_bias("z_proj", "z_proj_ln", "encoder_norm", "decoder_embed", "decoder_norm")
    block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for stack, depth in (("encoder", encoder), ("decoder", decoder)):
        for i in range(depth):
            found |= with_bias(*(f"{stack}_blocks.{i}.{layer}" for layer in block))
    net = "diffloss.net"
    found |= with_bias(
        f"{net}.time_embed.mlp.0",
        f"{net}.time_embed.mlp.2",
        f"{net}.cond_embed",
        f"{net}.input_proj",
        f"{net}.final_layer.linear",
        f"{net}.final_layer.adaLN_modulation.1",
    )
    for i in range(head):
        layers = ("in_ln", "mlp.0", "mlp.2", "adaLN_modulation.1")
        found |= with_bias(*(f"{net}.res_blocks.{i}.{layer}" for layer in layers))
    return found


def write_checkpoint(folder: Path, averaged: dict[str, Tensor]) -> None:
    """The folder of a training run of theirs; plain weights differ from the `averaged` ones."""
    torch.save(
        {
            "model": {name: tensor + 1 for name, tensor in averaged.items()},
            "model_ema": averaged,
            "optimizer": {"state": {}, "param_groups": []},
            "epoch": 799,
            "scaler": {"scale": 65536.0},
            "args": argparse.Namespace(model="mar_base", diffloss_d=6, ema_rate=0.9999),
        },
        folder / "checkpoint-last.pth",
    )
