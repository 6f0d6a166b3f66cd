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
@given(st.integers(0, 300), st.integers(1, 70), st.integers(1, 70), st.integers(1, 3), st.booleans())
@example(128, 64, 64, 2, True)
@example(0, 3, 5, 2, True)
def test_native_layers_are_as_near_as_those_of_pytorch(
    tokens: int, inputs: int, outputs: int, threads: int, learned: bool
) -> None:
    torch.manual_seed(tokens)
    layer, x = Linear(inputs, outputs), torch.randn(tokens, inputs, requires_grad=learned)
    towards, before = torch.randn(tokens, outputs), torch.get_num_threads()
    wanted = [layer.weight, layer.bias, *([x] if learned else [])]

    def found() -> list[Tensor]:
        out = layer(x)
        return [out.detach(), *torch.autograd.grad(out, wanted, towards)]

    exact = found()
    layer.narrow = True
    torch.set_num_threads(threads)
    try:
        rounded = found()
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours.shape == theirs.shape and not ours.isnan().any()
        assert float((ours - theirs).norm()) <= 0.012 * float(theirs.norm()) + 1e-6
