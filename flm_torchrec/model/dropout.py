"""Dropout whose random numbers cost less on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flm_torchrec.model.token_passes import drop, is_native


class Dropout(nn.Module):
    """As `nn.Dropout` (Srivastava et al., JMLR 2014), but faster on a CPU.

    PyTorch draws a number for each element. Here four elements share the 64 bits of one number of SplitMix64 (Steele,
    Lea & Flood, OOPSLA 2014), so the share dropped is `p` to the nearest 1/65536. Native code makes the numbers again
    for the gradients. Without native code the same elements are dropped.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Any shape → the same shape; in evaluation the same values."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        seed, dropped = int(torch.empty((), dtype=torch.int64).random_(-(2**63), None)), round(self.p * 2**16)
        if is_native(x):
            found: Tensor = _Dropped.apply(x, seed, dropped, 1 / (1 - self.p))
            return found
        # In place, as numbers: a bool would be made five times as slowly, and widened twice as slowly.
        kept = _draws(seed, x.numel()).view(x.shape).ge_(dropped - 2**15)
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, seed: int, dropped: int, scale: float) -> Tensor:  # type: ignore[override]
        ctx.drawn = seed, dropped, scale
        return drop(x, seed, dropped, scale)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return drop(grad, *ctx.drawn), None, None, None


def _draws(seed: int, count: int) -> Tensor:
    """[count] int16: the numbers of `flm_dropout` less 2**15."""
    mixed = torch.arange(1, -(-count // 4) + 1) * -0x61C8864680B583EB + seed
    mixed = (mixed ^ _right(mixed, 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ _right(mixed, 27)) * -0x6B2FB644ECCEEE15
    return (mixed ^ _right(mixed, 31)).view(torch.int16)[:count] ^ -(2**15)


def _right(x: Tensor, bits: int) -> Tensor:
    """Shifted as numbers without a sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
