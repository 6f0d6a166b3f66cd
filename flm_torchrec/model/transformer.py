"""Causal pre-norm blocks over jagged sequences, padded only at the attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TIME_BUCKETS = 33
"""Time between two events, in log2 seconds."""


class CausalTransformer(nn.Module):
    """[T, D] tokens of B jagged sequences → [T, D] (Vaswani et al. 2017; pre-norm as Xiong et al. 2020).

    Args:
        block: name of BLOCKS.
        relative: add to each attention score a learned bias by distance in position and in time.
    """

    def __init__(
        self, dim: int, layers: int, heads: int, dropout: float, max_tokens: int, block: str, relative: bool
    ) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(max_tokens, dim) * 0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(BLOCKS[block](dim, heads, dropout) for _ in range(layers))
        self.biases = nn.ModuleList(_RelativeBias(heads, max_tokens) for _ in range(layers if relative else 0))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, row: Tensor, place: Tensor, lengths: Tensor, time: Tensor) -> Tensor:
        """Token t stands at `place[t]` of sequence `row[t]`, which has `lengths[row[t]]` tokens; `time[t]` seconds."""
        x = self.dropout(x + self.position[place])
        shape = (len(lengths), int(lengths.max()) if len(row) else 0)
        clock = time.new_zeros(shape).index_put((row, place), time) if self.biases else None
        for layer, block in enumerate(self.blocks):
            bias = self.biases[layer](clock) if clock is not None else None
            x = block(x, row, place, shape, bias)
        return self.norm(x)


class _RelativeBias(nn.Module):
    """[B, L] times → [B, heads, L, L]: bias by position (T5: Raffel et al. 2020) and time (HSTU, ICML 2024)."""

    def __init__(self, heads: int, max_tokens: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(heads, max_tokens))
        self.time = nn.Parameter(torch.zeros(heads, TIME_BUCKETS))

    def forward(self, clock: Tensor) -> Tensor:
        place = torch.arange(clock.shape[1], device=clock.device)
        back = (place[:, None] - place[None, :]).clamp(min=0)  # [L, L]
        since = (clock[:, :, None] - clock[:, None, :]).abs() + 1
        bucket = since.float().log2().long().clamp(max=TIME_BUCKETS - 1)  # [B, L, L]
        return self.position[:, back] + self.time[:, bucket].transpose(0, 1)


class _TransformerBlock(nn.Module):
    """Softmax attention, then a position-wise MLP."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, row: Tensor, place: Tensor, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
        x = x + self.dropout(self.out(self._attend(self.qkv(self.attention_norm(x)), row, place, shape, bias)))
        return x + self.dropout(self.mlp(self.norm(x)))

    def _attend(
        self, qkv: Tensor, row: Tensor, place: Tensor, shape: tuple[int, int], bias: Tensor | None
    ) -> Tensor:
        # Padding stands after a sequence's tokens, so the causal mask alone hides it from them.
        q, k, v = _padded(qkv, row, place, shape, 3, self.heads)
        if bias is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, bias.masked_fill(_later(shape[1], q.device), -torch.inf))
        return mixed.transpose(1, 2).flatten(2)[row, place]  # [T, D]


class _HSTUBlock(nn.Module):
    """Pointwise attention, gated: Y = X + f2(norm(SiLU(Q K^T + bias) V / n) * U) (Zhai et al., HSTU, ICML 2024)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.input_norm = nn.LayerNorm(dim)
        self.uvqk = nn.Linear(dim, 4 * dim)
        self.mixed_norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, row: Tensor, place: Tensor, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
        u, vqk = F.silu(self.uvqk(self.input_norm(x))).tensor_split([x.shape[1]], 1)
        v, q, k = _padded(vqk, row, place, shape, 3, self.heads)
        scores = q @ k.transpose(2, 3) * (x.shape[1] / self.heads) ** -0.5  # [B, heads, L, L]
        scores = scores if bias is None else scores + bias
        weights = F.silu(scores).masked_fill(_later(shape[1], x.device), 0.0)
        seen = torch.arange(1, shape[1] + 1, device=x.device)[:, None]
        mixed = (weights @ v / seen).transpose(1, 2).flatten(2)[row, place]
        return x + self.dropout(self.out(self.mixed_norm(mixed) * u))


BLOCKS = {"transformer": _TransformerBlock, "hstu": _HSTUBlock}


def _padded(x: Tensor, row: Tensor, place: Tensor, shape: tuple[int, int], parts: int, heads: int) -> Tensor:
    """[T, parts * D] → [parts, B, heads, L, D / heads]."""
    dense = x.new_zeros(*shape, x.shape[1]).index_put((row, place), x)
    return dense.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


def _later(length: int, device: torch.device) -> Tensor:
    """[L, L] bool: the key comes after the query."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
