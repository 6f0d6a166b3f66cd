"""Causal pre-norm blocks over jagged sequences, padded only at the attention, among sequences of about one length."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TIME_BUCKETS = 33
"""Time between two events, in log2 seconds."""
SHORT = 8
"""Sequences up to this length are padded to one; longer ones among those up to twice it, four times it, and so on."""

Attend = Callable[[Tensor, Tensor], Tensor]
"""[b, L, parts * D] projections and [b, L] times of padded sequences → [b, L, D]."""


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
        order = torch.argsort(lengths, stable=True)
        nth = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=x.device))
        tokens = torch.argsort(nth[row], stable=True)
        layout = Bucketed(nth[row][tokens], place[tokens], lengths[order], time[tokens])
        back = torch.empty_like(tokens).index_copy(0, tokens, torch.arange(len(tokens), device=x.device))
        return self._through(x.index_select(0, tokens), layout).index_select(0, back)

    def padded(self, x: Tensor, time: Tensor) -> Tensor:
        """[B, L, D] and [B, L]: sequences that are padded already, at the end; no length is looked at."""
        return self._through(self.dropout(x + self.position[: x.shape[1]]), Padded(time))

    def _through(self, x: Tensor, layout: Bucketed | Padded) -> Tensor:
        for layer, block in enumerate(self.blocks):
            x = block(x, layout, self.biases[layer] if self.biases else None)
        return self.norm(x)


@dataclass
class Padded:
    """Sequences of one length, [B, L] seconds."""

    time: Tensor

    def mix(self, x: Tensor, attend: Attend) -> Tensor:
        """[B, L, parts * D] → [B, L, D]."""
        return attend(x, self.time)


class Bucketed:
    """T tokens of B sequences that are sorted by length: those of one bucket stand side by side.

    Attention costs a bucket's longest length squared for each sequence, and most sequences are much shorter than
    the longest of a batch.

    Args:
        row, place: [T] sequence of a token, and where in it the token stands.
        lengths: [B] ascending.
        time: [T] seconds.
    """

    def __init__(self, row: Tensor, place: Tensor, lengths: Tensor, time: Tensor) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.tokens: list[int] = []
        sizes, first, limit = lengths.tolist(), 0, SHORT
        while first < len(sizes):
            last = bisect_right(sizes, limit)
            if last > first:
                self.shapes.append((last - first, sizes[last - 1]))
                self.tokens.append(sum(sizes[first:last]))
            first, limit = last, 2 * limit
        begin = 0
        self.slots: list[Tensor] = []  # of each bucket, [its tokens] place in its padded rows
        for (count, longest), rows, places in zip(
            self.shapes, row.split(self.tokens), place.split(self.tokens), strict=True
        ):
            self.slots.append((rows - begin) * longest + places)
            begin += count
        self.times = [self._pad(part.unsqueeze(1), n).squeeze(2) for n, part in enumerate(time.split(self.tokens))]

    def mix(self, x: Tensor, attend: Attend) -> Tensor:
        """[T, parts * D] → [T, D], each sequence by itself."""
        mixed = [attend(self._pad(part, n), self.times[n]) for n, part in enumerate(x.split(self.tokens))]
        return torch.cat([m.flatten(0, 1).index_select(0, slots) for m, slots in zip(mixed, self.slots, strict=True)])

    def _pad(self, part: Tensor, bucket: int) -> Tensor:
        count, longest = self.shapes[bucket]
        empty = part.new_zeros(count * longest, part.shape[1])
        return empty.index_copy(0, self.slots[bucket], part).unflatten(0, (count, longest))


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

    def forward(self, x: Tensor, layout: Bucketed | Padded, bias: _RelativeBias | None) -> Tensor:
        qkv = self.qkv(self.attention_norm(x))
        x = x + self.dropout(self.out(layout.mix(qkv, lambda part, time: self._attend(part, time, bias))))
        return x + self.dropout(self.mlp(self.norm(x)))

    def _attend(self, qkv: Tensor, time: Tensor, bias: _RelativeBias | None) -> Tensor:
        # Padding stands after a sequence's tokens, so the causal mask alone hides it from them.
        q, k, v = _split(qkv, self.heads)
        if bias is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = bias(time).masked_fill(~_seen(time), -torch.inf)
            mixed = F.scaled_dot_product_attention(q, k, v, scores.to(q.dtype))
        return mixed.transpose(1, 2).flatten(2)


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

    def forward(self, x: Tensor, layout: Bucketed | Padded, bias: _RelativeBias | None) -> Tensor:
        u, vqk = F.silu(self.uvqk(self.input_norm(x))).tensor_split([x.shape[-1]], -1)
        mixed = layout.mix(vqk, lambda part, time: self._attend(part, time, bias))
        return x + self.dropout(self.out(self.mixed_norm(mixed) * u))

    def _attend(self, vqk: Tensor, time: Tensor, bias: _RelativeBias | None) -> Tensor:
        v, q, k = _split(vqk, self.heads)
        scores = q * q.shape[3] ** -0.5 @ k.transpose(2, 3)  # [b, heads, L, L]
        scores = scores if bias is None else scores + bias(time)
        seen = _seen(time).to(scores.dtype)
        mixed = F.silu(scores) * (seen / seen.sum(1, keepdim=True)) @ v
        return mixed.transpose(1, 2).flatten(2)


BLOCKS = {"transformer": _TransformerBlock, "hstu": _HSTUBlock}


def _split(x: Tensor, heads: int) -> tuple[Tensor, ...]:
    """[b, L, 3 * D] → three of [b, heads, L, D / heads]."""
    return x.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _seen(time: Tensor) -> Tensor:
    """[L, L] bool: the key does not come after the query."""
    return torch.ones(time.shape[1], time.shape[1], dtype=torch.bool, device=time.device).tril()
