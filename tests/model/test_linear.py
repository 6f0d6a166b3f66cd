"""Layers whose products are of bf16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flm_torchrec.model import linear
from flm_torchrec.model.linear import Linear, narrow


def test_layers_narrow_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 has 9 bits. PyTorch multiplies bf16 on every processor."""
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
    assert all(1e-4 < error < 8e-3 for error in rounded[:3]) and rounded[3] < 1e-6
    layer.eval()
    assert torch.equal(layer(x), exact[0])
