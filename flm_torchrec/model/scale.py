"""Rows divided by their length, in half the passes that autograd would make of the same formula."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST = 1e-12
"""As of `F.normalize`: a shorter row is divided by this."""


def unit(x: Tensor) -> Tensor:
    """[n, D] → [n, D] of length 1, the bits of `F.normalize`; a row of zeros stays."""
    if not torch.is_grad_enabled():
        return F.normalize(x, dim=1)
    return _Divided.apply(x, _lengths(x).clamp_(min=LEAST))


def softened_unit(x: Tensor, softening: float, known: Tensor) -> Tensor:
    """[n, D] → [n, D]: x / sqrt(|x|^2 + softening); zero where `known` [n, 1] is 0, else it is 1."""
    return _Divided.apply(x, (_lengths(x) ** 2 + softening).sqrt_().div_(known))


def _lengths(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True)


class _Divided(torch.autograd.Function):
    """[n, D] x / [n, 1] length, where length^2 is |x|^2 plus a constant, or infinite.

    With y = x / length, the gradient of x is (g - y (y . g)) / length.
    """

    @staticmethod
    def forward(ctx, x: Tensor, length: Tensor) -> Tensor:  # type: ignore[override]
        y = x / length
        ctx.save_for_backward(y, length)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        y, length = ctx.saved_tensors
        along = torch.einsum("nd,nd->n", grad, y).unsqueeze(1)
        return torch.addcmul(grad, y, along, value=-1).div_(length), None
