"""Rows divided by their length, in half the passes that autograd would make of the same formula."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST = 1e-12
"""As of `F.normalize`."""


def unit(x: Tensor, least: float = LEAST) -> Tensor:
    """[n, D] → [n, D] of length 1, the bits of `F.normalize`; a row shorter than `least` is divided by that."""
    if not torch.is_grad_enabled():
        return F.normalize(x, dim=1, eps=least)
    lengths = _lengths(x)
    return _Divided.apply(x, lengths.clamp(min=least), lengths >= least)


def softened_unit(x: Tensor, softening: float, known: Tensor) -> Tensor:
    """[n, D] → [n, D]: x / sqrt(|x|^2 + softening); zero where `known` [n, 1] is 0, else it is 1."""
    return _Divided.apply(x, (_lengths(x) ** 2 + softening).sqrt_().div_(known), known > 0)


def _lengths(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True)


class _Divided(torch.autograd.Function):
    """[n, D] x / [n, 1] length, where length^2 is |x|^2 plus a constant if the row `varies`, else the length is fixed.

    With y = x / length, the gradient of x is (g - y (y . g)) / length, or g / length.
    """

    @staticmethod
    def forward(ctx, x: Tensor, length: Tensor, varies: Tensor) -> Tensor:  # type: ignore[override]
        y = x / length
        ctx.save_for_backward(y, length, varies)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        y, length, varies = ctx.saved_tensors
        along = torch.einsum("nd,nd->n", grad, y).unsqueeze(1) * varies
        return torch.addcmul(grad, y, along, value=-1).div_(length), None, None
