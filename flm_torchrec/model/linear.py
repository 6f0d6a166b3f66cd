"""Layers whose products are of bf16 in training, on CPUs that have instructions for these."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flm_torchrec.machine_code import processor_instructions


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
        low_x, low_weight = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(low_x, low_weight)
        return (low_x @ low_weight.T).float().add_(bias)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        low_x, low_weight = ctx.saved_tensors
        low = grad.bfloat16()
        of_x = (low @ low_weight).float() if ctx.needs_input_grad[0] else None
        return of_x, (low.T @ low_x).float(), grad.sum(0)
