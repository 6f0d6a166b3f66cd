"""Layers of the heads."""

from __future__ import annotations

from torch import Tensor, nn

from flm_torchrec.model.dropout import Dropout


class Head(nn.Module):
    """Inputs of a head at each token [T, inputs] → the feature space [T, D]."""

    def __init__(self, inputs: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Dropout(dropout), nn.Linear(inputs, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim), nn.LayerNorm(dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[T, inputs] → [T, D]."""
        return self.layers(x)


def mlp(inputs: int, dim: int) -> nn.Sequential:
    """[…, inputs] → […, dim], with one hidden layer of twice that width."""
    return nn.Sequential(nn.Linear(inputs, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
