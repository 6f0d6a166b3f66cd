"""Causal pre-norm blocks over sequences, whatever the layout of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flm_torchrec.config.schema import ModelConfig
from flm_torchrec.model.dropout import Dropout
from flm_torchrec.model.elapsed import BUCKETS, Clock, by_elapsed
from flm_torchrec.model.last_token import LastAlone
from flm_torchrec.model.layout import Jagged, Layout
from flm_torchrec.model.linear import Linear
from flm_torchrec.model.pointwise_attention import can_attend, pointwise_attention
from flm_torchrec.model.token_passes import gather


class CausalTransformer(nn.Module):
    """Tokens of B sequences → each token in the context of those before it (Vaswani et al. 2017; pre-norm: Xiong et al.
    2020).

    Args:
        config: layers, attention heads, dropout, `block` (a name of BLOCKS) and `relative_bias`, which adds to each
            attention score a learned bias by distance in position and in time.
        max_tokens: longest sequence, prefix included.
        timed: events have times; else there is no bias, as that of positions alone changed nothing (docs/results.md).
    """

    def __init__(self, config: ModelConfig, max_tokens: int, timed: bool = True) -> None:
        super().__init__()
        heads, layers = config.attention_heads, range(config.layers)
        biased = layers if config.relative_bias and timed else range(0)
        self.position = nn.Parameter(torch.randn(max_tokens, config.dim) * 0.02)
        self.dropout = Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(BLOCKS[config.block](config.dim, heads, config.dropout) for _ in layers)
        self.biases = nn.ModuleList(_RelativeBias(heads, max_tokens) for _ in biased)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """[…, D] → [R, D]; see `layout.Layout`."""
        x = layout.group(self.dropout(x + gather(self.position, layout.position)))
        layers: list[Any] = list(zip(self.blocks, self.biases or [None] * len(self.blocks), strict=True))
        last = layers.pop() if layers and isinstance(layout, LastAlone) else None
        for block, bias in layers:
            x = block(x, layout, bias)
        if last is None:
            return layout.represented(self.norm(x))
        block, bias = last
        return self.norm(block.at_last(x, layout, bias))


class _RelativeBias(nn.Module):
    """[B, L] times → [B, heads, L, L]: bias by position (T5: Raffel et al. 2020) and time (HSTU, ICML 2024)."""

    def __init__(self, heads: int, max_tokens: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(heads, max_tokens))
        self.time = nn.Parameter(torch.zeros(heads, BUCKETS))

    def forward(self, clock: Clock) -> Tensor:
        position = torch.arange(clock.seconds.shape[1], device=clock.seconds.device)
        back = (position[:, None] - position[None, :]).clamp(min=0)  # [L, L]
        return (self.position[:, back].unsqueeze(1) + by_elapsed(self.time, clock.between)).transpose(0, 1)

    def at_last(self, layout: LastAlone) -> Tensor:
        """[…, heads]: for the last token of each sequence, at the others."""
        return (self.position[:, layout.age.clamp(min=0)] + by_elapsed(self.time, layout.since)).movedim(0, -1)


class _TransformerBlock(nn.Module):
    """Softmax attention, then a position-wise MLP."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(Linear(dim, 4 * dim), nn.GELU(), Linear(4 * dim, dim))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, layout: Layout, bias: _RelativeBias | None) -> Tensor:
        qkv = self.qkv(self.attention_norm(x))
        x = x + self.dropout(self.out(layout.mix(qkv, lambda part, clock: self._attend(part, clock, bias))))
        return x + self.dropout(self.mlp(self.norm(x)))

    def at_last(self, x: Tensor, layout: LastAlone, bias: _RelativeBias | None) -> Tensor:
        """[…, D] → [R, D]: as `forward`, for the represented tokens alone."""
        x = layout.in_order(x)
        normed, (of_q, of_k, of_v) = self.attention_norm(x), _layers(self.qkv, 3)
        scores = _scores(of_q(layout.last(normed)), of_k(normed), self.heads, layout, bias)
        x = layout.last(x) + self.dropout(self.out(layout.collect(of_v(normed), layout.shares(scores))))
        return x + self.dropout(self.mlp(self.norm(x)))

    def _attend(self, qkv: Tensor, clock: Clock, bias: _RelativeBias | None) -> Tensor:
        # Padding comes after a sequence's tokens, so the causal mask is enough to hide it from them.
        q, k, v = _split(qkv, self.heads)
        if bias is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = bias(clock).masked_fill(~_seen(clock), -torch.inf)
            # Attention over no token would give the bias no gradient, which a rank without events owes the others.
            mixed = F.scaled_dot_product_attention(q, k, v, scores.to(q.dtype)) if q.numel() else scores @ v
        return mixed.transpose(1, 2).flatten(2)


class _HSTUBlock(nn.Module):
    """Pointwise attention, gated: Y = X + f2(norm(SiLU(Q K^T + bias) V / n) * U) (Zhai et al., HSTU, ICML 2024)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.input_norm = nn.LayerNorm(dim)
        self.uvqk = Linear(dim, 4 * dim)
        self.mixed_norm = nn.LayerNorm(dim)
        self.out = Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, layout: Layout, bias: _RelativeBias | None) -> Tensor:
        uvqk = self.uvqk(self.input_norm(x))
        if isinstance(layout, Jagged) and can_attend(uvqk):
            biases = None if bias is None else (bias.position, bias.time)
            u, mixed = pointwise_attention(uvqk, self.heads, layout.spans, biases)
        else:
            u, vqk = F.silu(uvqk).split([x.shape[-1], 3 * x.shape[-1]], -1)
            mixed = layout.mix(vqk, lambda part, clock: self._attend(part, clock, bias))
        return x + self.dropout(self.out(self.mixed_norm(mixed) * u))

    def at_last(self, x: Tensor, layout: LastAlone, bias: _RelativeBias | None) -> Tensor:
        """[…, D] → [R, D]: as `forward`, for the represented tokens alone."""
        x = layout.in_order(x)
        normed, (of_u, of_v, of_q, of_k) = self.input_norm(x), _layers(self.uvqk, 4)
        last = layout.last(normed)
        scores = _scores(F.silu(of_q(last)), F.silu(of_k(normed)), self.heads, layout, bias)
        mixed = layout.collect(F.silu(of_v(normed)), F.silu(scores)) / (layout.count + 1)
        return layout.last(x) + self.dropout(self.out(self.mixed_norm(mixed) * F.silu(of_u(last))))

    def _attend(self, vqk: Tensor, clock: Clock, bias: _RelativeBias | None) -> Tensor:
        seen = _seen(clock).to(vqk.dtype)
        counts = seen / seen.sum(1, keepdim=True)
        added = None if bias is None else bias(clock)
        if torch.is_grad_enabled():
            return _Pointwise.apply(vqk, counts, self.heads, added)
        v, q, k = _split(vqk, self.heads)
        scores = q * q.shape[3] ** -0.5 @ k.transpose(2, 3)  # [b, heads, L, L]
        scores = scores if added is None else scores + added
        return (F.silu(scores) * counts @ v).transpose(1, 2).flatten(2)


class _Pointwise(torch.autograd.Function):
    """[b, L, 3 D] v, q and k of all heads, [L, L] what a key counts for a query, bias [b, heads, L, L] → [b, L, D].

    As autograd makes it of the formula, but head by head on views, so that no factor and no gradient is copied.
    """

    @staticmethod
    def forward(ctx, vqk: Tensor, counts: Tensor, heads: int, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.heads, ctx.biased, mixed, kept = heads, bias is not None, [], []
        for head, (v, q, k) in enumerate(_heads(vqk, heads)):
            scores = torch.bmm(q, k.transpose(1, 2)).mul_(q.shape[2] ** -0.5)  # [b, L, L]
            if bias is not None:
                scores += bias[:, head]
            weights = F.silu(scores).mul_(counts)
            mixed.append(torch.bmm(weights, v))
            kept += [scores, weights]
        ctx.save_for_backward(vqk, counts, *kept)
        return torch.cat(mixed, 2)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        vqk, counts, *kept = ctx.saved_tensors
        grads: list[list[Tensor]] = []
        of_bias: list[Tensor] = []
        parts = zip(_heads(vqk, ctx.heads), grad.chunk(ctx.heads, 2), kept[::2], kept[1::2], strict=True)
        for (v, q, k), of_mixed, scores, weights in parts:
            of_weights = torch.bmm(of_mixed, v.transpose(1, 2)).mul_(counts)
            of_scores = torch.ops.aten.silu_backward(of_weights, scores)
            of_products = torch.bmm(of_scores, k), torch.bmm(of_scores.transpose(1, 2), q)
            of_v = torch.bmm(weights.transpose(1, 2), of_mixed)
            grads.append([of_v, *(of_factor.mul_(q.shape[2] ** -0.5) for of_factor in of_products)])
            if ctx.biased:
                of_bias.append(of_scores)
        of_vqk = torch.cat([of_head for part in zip(*grads, strict=True) for of_head in part], 2)
        return of_vqk, None, None, torch.stack(of_bias).transpose(0, 1) if ctx.biased else None


BLOCKS = {"transformer": _TransformerBlock, "hstu": _HSTUBlock}


def _layers(joint: Linear, parts: int) -> list[Callable[[Tensor], Tensor]]:
    """The layers D → D that a layer D → parts * D joins."""
    each = zip(joint.weight.chunk(parts), joint.bias.chunk(parts), strict=True)
    return [partial(F.linear, weight=weight, bias=bias) for weight, bias in each]


def _scores(q: Tensor, k: Tensor, heads: int, layout: LastAlone, bias: _RelativeBias | None) -> Tensor:
    """[R, D] queries of the represented tokens, […, D] keys → […, heads]."""
    width = k.shape[-1] // heads
    scores = (layout.spread(q) * k).unflatten(-1, (heads, width)).sum(-1) * width**-0.5
    return scores if bias is None else scores + bias.at_last(layout)


def _heads(x: Tensor, heads: int) -> Iterator[tuple[Tensor, ...]]:
    """[b, L, 3 * D] → by head, three of [b, L, D / heads], views."""
    parts = x.chunk(3 * heads, 2)
    return zip(parts[:heads], parts[heads : 2 * heads], parts[2 * heads :], strict=True)


def _split(x: Tensor, heads: int) -> tuple[Tensor, ...]:
    """[b, L, 3 * D] → three of [b, heads, L, D / heads]."""
    return x.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _seen(clock: Clock) -> Tensor:
    """[L, L] bool: the key does not come after the query."""
    length = clock.seconds.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=clock.seconds.device).tril()
