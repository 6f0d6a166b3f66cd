"""Layers whose products are of bf16."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flm_torchrec.model import linear
from flm_torchrec.model.linear import Linear, narrow


@pytest.mark.parametrize("native", [True, False])
def test_layers_narrow_in_training_alone(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 has 9 bits. PyTorch multiplies bf16 on every processor."""
    if not native:
        monkeypatch.setattr(linear, "_library", lambda: "none")
    layer, x = Linear(40, 24), torch.randn(100, 40, requires_grad=True)
    towards = torch.randn(100, 24)

    def found() -> list[Tensor]:
        out = layer(x)
        return [out, *torch.autograd.grad(out, [x, layer.weight, layer.bias], towards)]

    exact = found()
    monkeypatch.setattr(linear, "processor_instructions", set)
    narrow(layer)
    assert all(torch.equal(a, b) for a, b in zip(found(), exact, strict=True))
    monkeypatch.setattr(linear, "processor_instructions", lambda: {"avx512_bf16"})
    narrow(nn.Sequential(layer))
    rounded = [float((a - b).norm() / b.norm()) for a, b in zip(found(), exact, strict=True)]
    assert all(1e-4 < error < 8e-3 for error in rounded[:3]) and rounded[3] < 2e-6
    layer.eval()
    assert torch.equal(layer(x), exact[0])


@pytest.mark.skipif(isinstance(linear._library(), str), reason="no native layers here")
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 300), st.integers(0, 70), st.integers(1, 70), st.integers(1, 3), st.booleans())
@example(128, 64, 64, 2, True)
@example(0, 3, 5, 2, True)
@example(9, 0, 5, 2, True)
def test_native_layers_round_each_factor_to_bf16(
    tokens: int, inputs: int, outputs: int, threads: int, learned: bool
) -> None:
    torch.manual_seed(tokens)
    x, weight, bias = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    towards, before = torch.randn(tokens, outputs), torch.get_num_threads()
    leaves = [x.requires_grad_(learned), weight.requires_grad_(), bias.requires_grad_()]
    torch.set_num_threads(threads)
    try:
        out = linear._NativeNarrow.apply(*leaves)
        found = [out, *torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], towards)]
    finally:
        torch.set_num_threads(before)
    low_x, low_weight, low = (t.detach().bfloat16().double() for t in (x, weight, towards))
    expected = [low_x @ low_weight.T + bias.double(), *([low @ low_weight] if learned else []), low.T @ low_x]
    for ours, exact in zip(found, [*expected, towards.double().sum(0)], strict=True):
        torch.testing.assert_close(ours.detach().double(), exact.detach(), rtol=1e-4, atol=1e-4)
