"""The masked transformer and its diffusion head, named as in the authors' checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cspd.export.mar.head import DiffusionHead
from cspd.export.mar.layers import NORM_EPS, Block, Linear, gather_rows
from cspd.export.mar.presets import MarConfig

# Added to the attention logits of padded keys: exp underflows to exactly 0, and unlike -inf it
# cannot turn a row into NaN.
MASKED_LOGIT = -1e9


class DiffusionLoss(nn.Module):
    """Holder of the head under the name that checkpoints use (`diffloss.net`)."""

    def __init__(self, config: MarConfig) -> None:
        super().__init__()
        self.net = DiffusionHead(
            config.token_dim, config.embed_dim, config.head_width, config.head_depth
        )


class Mar(nn.Module):
    """Masked autoregressive image model (Li et al. 2024, arXiv 2406.11838)."""

    def __init__(self, config: MarConfig) -> None:
        super().__init__()
        self.config = config
        dim, length = config.embed_dim, config.buffer_size + config.num_tokens
        heads, eps = config.num_heads, config.norm_eps
        self.class_emb = nn.Embedding(config.num_classes, dim)
        self.fake_latent = nn.Parameter(torch.zeros(1, dim))
        self.z_proj = Linear(config.token_dim, dim)
        self.z_proj_ln = nn.LayerNorm(dim, eps=NORM_EPS)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, dim))
        self.encoder_blocks = nn.ModuleList(
            Block(dim, heads, eps) for _ in range(config.encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(dim, eps=eps)
        self.decoder_embed = Linear(dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, dim))
        self.decoder_blocks = nn.ModuleList(
            Block(dim, heads, eps) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(dim, eps=eps)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, config.num_tokens, dim))
        self.diffloss = DiffusionLoss(config)

    def forward(
        self,
        tokens: Tensor,
        visible: Tensor,
        visible_len: Tensor,
        labels: Tensor,
        positions: Tensor,
    ) -> Tensor:
        """Conditions `z` [B, P, D] float32 of the tokens at `positions`.

        `tokens` [B, L, C]; `visible` [B, V] int32 positions of known tokens, of which the first
        `visible_len` [B] count and the rest is padding; `labels` [B] int32, where `num_classes`
        means unconditional; `positions` [B, P] int32. V may be 0.
        """
        return self.decode(
            self.encode(tokens, visible, visible_len, labels), visible, visible_len, positions
        )

    def encode(
        self, tokens: Tensor, visible: Tensor, visible_len: Tensor, labels: Tensor
    ) -> Tensor:
        """Encoder states [B, buffer + V, D] of the class buffer and the visible tokens."""
        buffer = self.config.buffer_size
        known = self.z_proj(gather_rows(tokens, visible))
        position = self.encoder_pos_embed_learned[0]
        known = known + nn.functional.embedding(visible + buffer, position)
        classes = torch.cat([self.class_emb.weight, self.fake_latent])
        label = nn.functional.embedding(labels, classes)[:, None]
        x = self.z_proj_ln(torch.cat([label + position[None, :buffer], known], dim=1))
        bias = self._key_bias(visible, visible_len)
        for block in self.encoder_blocks:
            x = block(x, bias)
        return self.encoder_norm(x)

    def decode(
        self, encoded: Tensor, visible: Tensor, visible_len: Tensor, positions: Tensor
    ) -> Tensor:
        """Conditions [B, P, D] from encoder states; the last block runs at `positions` only."""
        buffer = self.config.buffer_size
        encoded = self.decoder_embed(encoded)
        mask_token = self.mask_token.expand(encoded.shape[0], -1, -1)
        source = torch.cat([encoded, mask_token.to(encoded.dtype)], dim=1)
        x = gather_rows(source, self._source_rows(visible, visible_len))
        x = torch.cat([encoded[:, :buffer], x], dim=1) + self.decoder_pos_embed_learned
        *blocks, last = self.decoder_blocks
        for block in blocks:
            x = block(x)
        assert isinstance(last, Block)
        x = last.forward_positions(x, positions + buffer)
        rows = nn.functional.embedding(positions, self.diffusion_pos_embed_learned[0])
        return self.decoder_norm(x) + rows

    def _key_bias(self, visible: Tensor, visible_len: Tensor) -> Tensor:
        """Logit bias [B, 1, 1, buffer + V] that hides padded entries of `visible`."""
        slot = torch.arange(visible.shape[1], device=visible.device, dtype=visible.dtype)
        padded = (slot[None] >= visible_len[:, None]).float() * MASKED_LOGIT
        kept = torch.zeros(visible.shape[0], self.config.buffer_size, device=visible.device)
        return torch.cat([kept, padded], dim=1)[:, None, None]

    def _source_rows(self, visible: Tensor, visible_len: Tensor) -> Tensor:
        """Row of [encoded, mask token] that feeds each decoder position: [B, L] int32.

        A position that is not visible takes the mask token, the last row. Written as a comparison
        and a sum instead of a scatter, which engines handle badly when padding repeats indices.
        """
        buffer, count = self.config.buffer_size, visible.shape[1]
        slot = torch.arange(count, device=visible.device, dtype=torch.int32)
        position = torch.arange(self.config.num_tokens, device=visible.device, dtype=torch.int32)
        valid = slot[None, :, None] < visible_len[:, None, None]
        match = ((visible[:, :, None] == position) & valid).to(torch.int32)
        # Distance back from the mask token's row: 0 where nothing matches.
        back = (match * (count - slot)[None, :, None]).sum(1, dtype=torch.int32)
        return buffer + count - back
