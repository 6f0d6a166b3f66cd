"""Causal pre-norm Transformer over jagged sequences, padded only at the attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CausalTransformer(nn.Module):
    """[T, D] tokens of B jagged sequences → [T, D] (Vaswani et al. 2017; pre-norm as Xiong et al. 2020)."""

    def __init__(self, dim: int, layers: int, heads: int, dropout: float, max_tokens: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(max_tokens, dim) * 0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, row: Tensor, place: Tensor, lengths: Tensor) -> Tensor:
        """Token t stands at `place[t]` of sequence `row[t]`, which has `lengths[row[t]]` tokens."""
        x = self.dropout(x + self.position[place])
        padded = (len(lengths), int(lengths.max()) if len(row) else 0)
        for block in self.blocks:
            x = block(x, row, place, padded)
        return self.norm(x)


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, row: Tensor, place: Tensor, padded: tuple[int, int]) -> Tensor:
        x = x + self.dropout(self.out(self._attend(self.qkv(self.attention_norm(x)), row, place, padded)))
        return x + self.dropout(self.mlp(self.norm(x)))

    def _attend(self, qkv: Tensor, row: Tensor, place: Tensor, padded: tuple[int, int]) -> Tensor:
        # Padding stands after a sequence's tokens, so the causal mask alone hides it from them.
        dense = qkv.new_zeros(*padded, qkv.shape[1]).index_put((row, place), qkv)  # [B, L, 3D]
        q, k, v = dense.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, L, D / heads]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).flatten(2)[row, place]  # [T, D]
