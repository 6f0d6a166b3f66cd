"""Layers whose products are of bf16 in training, on CPUs that have instructions for these."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flm_torchrec.machine_code import processor_instructions

ROUND = 64
"""Rows of a product are a multiple of this."""


class Linear(nn.Linear):
    """As `nn.Linear`. Once `narrow`, training rounds the factors of its products to bf16, and the products too.

    Weights, biases and gradients stay float32; so do all products in evaluation, and on a GPU.
    """

    narrow = False

    def forward(self, x: Tensor) -> Tensor:
        """[T, inputs] → [T, outputs]."""
        if self.narrow and self.training and x.device.type == "cpu":
            found: Tensor = _Narrow.apply(x, self.weight, self.bias)
            return found
        return super().forward(x)


def narrow(layers: nn.Module) -> None:
    """Let training make the products of all `Linear` layers of bf16, if this processor has instructions for that."""
    if "avx512_bf16" in processor_instructions():
        for layer in layers.modules():
            if isinstance(layer, Linear):
                layer.narrow = True


class _Narrow(torch.autograd.Function):
    """[T, I] x, [O, I] weight, [O] bias → [T, O] x @ weight.T + bias."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        low_x, low_weight = _low(x), weight.bfloat16()
        ctx.save_for_backward(low_x, low_weight)
        return (low_x @ low_weight.T)[: len(x)].float().add_(bias)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        low_x, low_weight = ctx.saved_tensors
        low = _low(grad)
        of_x = (low @ low_weight)[: len(grad)].float() if ctx.needs_input_grad[0] else None
        return of_x, (low.T @ low_x).float(), grad.sum(0)


def _low(x: Tensor) -> Tensor:
    """[T, n] → [rows, n] of bf16, zeros behind the T rows.

    The library compiles code for each shape of a product, and T differs at every step. So T is rounded up, by at most a
    sixteenth and ROUND.
    """
    step = max(ROUND, 1 << len(x).bit_length() >> 5)
    low = x.new_empty(-(-len(x) // step) * step, x.shape[1], dtype=torch.bfloat16)
    low[: len(x)] = x
    low[len(x) :] = 0
    return low
