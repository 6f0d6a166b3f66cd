"""Layers, whose products in training may be of bf16 on CPUs that have instructions for these."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from flm_torchrec.machine_code import processor_instructions
from flm_torchrec.native_code import Unavailable, argument, built, why_none
from flm_torchrec.products import matmul, multiplies

SOURCE = Path(__file__).with_suffix(".cpp")
ROUND = 64
"""Rows of a product are a multiple of this."""


class Linear(nn.Linear):
    """As `nn.Linear`. Once `narrow`, training rounds the factors of its products to bf16.

    PyTorch rounds the products too, the native code of `linear.cpp` does not. Weights, biases and gradients stay
    float32; so do all products in evaluation, and on a GPU. On CPUs `products.py` makes those of float32.
    """

    narrow = False
    plain = False
    """Whether PyTorch makes its products, which its counter of FLOP sees then."""

    def forward(self, x: Tensor) -> Tensor:
        """[T, inputs] → [T, outputs]."""
        if self.plain:
            return super().forward(x)
        if self.narrow and self.training and x.device.type == "cpu":
            product = _Narrow if isinstance(_library(), str) else _NativeNarrow
            found: Tensor = product.apply(x, self.weight, self.bias)
            return found
        if not torch.compiler.is_exporting() and multiplies(x, self.weight.T):
            found = _Wide.apply(x, self.weight, self.bias)
            return found
        return super().forward(x)


def narrow(layers: nn.Module) -> None:
    """Let training make the products of all `Linear` layers of bf16, if this processor has instructions for that."""
    if "avx512_bf16" in processor_instructions():
        for layer in layers.modules():
            if isinstance(layer, Linear):
                layer.narrow = True


class _Layer(ctypes.Structure):
    """`Layer` of linear.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "grad", "y")),
        *((name, ctypes.c_void_p) for name in ("x_grad", "weight_grad", "bias_grad")),
        *((name, ctypes.c_int64) for name in ("tokens", "inputs", "outputs", "threads")),
    )


class _NativeNarrow(torch.autograd.Function):
    """As `_Narrow`, but the products are not rounded."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        y = x.new_empty(len(x), len(weight))
        _call(x, weight, bias=bias.contiguous(), y=y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        of_weight, of_bias = torch.empty_like(weight), weight.new_empty(len(weight))
        _call(x, weight, grad=grad.contiguous(), x_grad=of_x, weight_grad=of_weight, bias_grad=of_bias)
        return of_x, of_weight, of_bias


def _call(x: Tensor, weight: Tensor, **given: Tensor | None) -> None:
    shape = {"tokens": len(x), "inputs": x.shape[1], "outputs": len(weight), "threads": torch.get_num_threads()}
    library = _library()
    assert not isinstance(library, str)
    if library.flm_linear(argument(_Layer, {"x": x, "weight": weight, **given}, **shape)):
        raise MemoryError(f"no memory for a layer of {len(x)} tokens")


@cache
def _library() -> ctypes.CDLL | str:
    """The native code; or why there is none, in a few words."""
    return why_none(_load)


def _load() -> ctypes.CDLL:
    instructions = processor_instructions()
    if not {"avx512_bf16", "avx512bw", "avx512vl"} <= instructions or "amx_bf16" in instructions:
        raise Unavailable("its products are for avx512_bf16 without AMX; PyTorch has those for AMX")
    return built(SOURCE)


class _Wide(torch.autograd.Function):
    """As `_Narrow`, but the factors are not rounded."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return matmul(x, weight.T, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        of_x = matmul(grad, weight) if ctx.needs_input_grad[0] else None
        of_weight = matmul(grad.T, x) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, grad.sum(0)


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
