"""Building blocks of MAR with the authors' parameter names, written so that they trace cleanly.

Precision is a property of the weights: every product runs in the dtype of its weight matrix, while
the residual stream, LayerNorm and softmax stay in float32 whatever the weights are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-6  # of the layers whose epsilon the authors fixed


class Linear(nn.Linear):
    """Linear layer that computes in the dtype of its weight and returns float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., in] to [..., out] float32."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).float()


class Attention(nn.Module):
    """Multi-head self-attention with a fused `qkv` matrix; queries may be a subset of the rows."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, key_bias: Tensor | None) -> Tensor:
        """Attend from all rows of `x` [B, N, D]; `key_bias` [B, 1, 1, N] is added to the logits."""
        query, key, value = self._heads(self.qkv(x), 3)
        return self._attend(query, key, value, key_bias)

    def forward_queries(self, x: Tensor, queries: Tensor) -> Tensor:
        """Attend from `queries` [B, P, D] to all rows of `x` [B, N, D]; returns [B, P, D]."""
        dim = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        query = F.linear(queries.to(weight.dtype), weight[:dim], bias[:dim]).float()
        key_value = F.linear(x.to(weight.dtype), weight[dim:], bias[dim:]).float()
        (query,) = self._heads(query, 1)
        key, value = self._heads(key_value, 2)
        return self._attend(query, key, value, None)

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Split [B, N, parts * D] into `parts` tensors [B, heads, N, D / heads]."""
        batch, rows, width = x.shape
        x = x.reshape(batch, rows, parts, self.num_heads, width // parts // self.num_heads)
        return x.permute(2, 0, 3, 1, 4).unbind(0)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        dtype = self.proj.weight.dtype
        if query.is_cuda and dtype != torch.float32:
            mixed = fused_attention(query.to(dtype), key.to(dtype), value.to(dtype), bias)
            return self.proj(mixed.transpose(1, 2).flatten(2))
        scaled = (query * query.shape[-1] ** -0.5).to(dtype)
        logits = (scaled @ key.to(dtype).transpose(-2, -1)).float()
        weights = (logits if bias is None else logits + bias).softmax(-1)
        mixed = (weights.to(dtype) @ value.to(dtype)).transpose(1, 2)
        return self.proj(mixed.flatten(2))


def fused_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Attention [B, heads, P, d] in one kernel, in place of eight, without the logits in memory."""
    mask = None if bias is None else bias.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block (timm's `Block` names)."""

    def __init__(self, dim: int, num_heads: int, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, key_bias: Tensor | None = None) -> Tensor:
        """Map `x` [B, N, D] to [B, N, D]."""
        x = x + self.attn(self.norm1(x), key_bias)
        return x + self.mlp(self.norm2(x))

    def forward_positions(self, x: Tensor, positions: Tensor) -> Tensor:
        """Output [B, P, D] of the block at `positions` [B, P]; the other rows serve as keys."""
        normed = self.norm1(x)
        rows = gather_rows(x, positions)
        rows = rows + self.attn.forward_queries(normed, gather_rows(normed, positions))
        return rows + self.mlp(self.norm2(rows))


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, P] (int32, 0..N-1) of `x` [B, N, D] as [B, P, D].

    One row gather over the flattened batch: ONNX Gather with int32 indices, which is cheaper than
    the element-wise gather that `torch.gather` exports to.
    """
    batch, rows, dim = x.shape
    first = torch.arange(batch, device=x.device, dtype=index.dtype)[:, None] * rows
    return F.embedding(first + index, x.reshape(batch * rows, dim))
