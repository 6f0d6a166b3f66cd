"""h = fusion(h_content, h_collaborative, h_sequential)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flm_torchrec.config.heads import HEADS
from flm_torchrec.mixture import Mixture
from flm_torchrec.model.heads import mlp

START = {"collaborative": 0.7, "sequential": 1.0}
"""First weights of a weighted sum; 0.2 for other heads."""


class Fusion(nn.Module):
    """[T, heads, D] in the order of HEADS → h [T, D]."""

    def mixture(self) -> Mixture | None:
        """The mixture of the heads that scores in place of h, if one does."""
        return None

    def weights(self, stacked: Tensor) -> Tensor:
        """[T, heads, D] → [T, heads]: weights of the heads in h; zeros where h is no weighted sum."""
        return stacked.new_zeros(stacked.shape[:2])


class GatedFusion(Fusion):
    """h = sum over heads k of g_k h_k, g = softmax(W [h_1; h_2; h_3]): mixture of experts, the heads its experts."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(len(HEADS) * dim, len(HEADS))

    def weights(self, stacked: Tensor) -> Tensor:
        """[T, heads, D] → [T, heads], summing to 1."""
        return torch.softmax(self.gate(stacked.flatten(1)), 1)

    def forward(self, stacked: Tensor) -> Tensor:
        """[T, heads, D] → [T, D]."""
        return (stacked * self.weights(stacked).unsqueeze(2)).sum(1)


class SumFusion(Fusion):
    """h = w_1 h_1 + w_2 h_2 + w_3 h_3, the weights the same for everyone.

    A score is linear in h, so this is a weighted sum of the heads' scores: an ensemble in one vector.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        # While it trains, validation selects by h, before weights are chosen.
        self.scale = nn.Parameter(torch.tensor([START.get(head, 0.2) for head in HEADS])[:, None])

    def set_weights(self, weights: Tensor) -> None:
        """Replace the weights by these, [heads]."""
        with torch.no_grad():
            self.scale.copy_(weights[:, None])

    def weights(self, stacked: Tensor) -> Tensor:
        """[T, heads, D] → [T, heads], all rows the same."""
        return self.scale.squeeze(1).expand(stacked.shape[0], -1)

    def forward(self, stacked: Tensor) -> Tensor:
        """[T, heads, D] → [T, D]."""
        return (stacked * self.scale).sum(1)


class LateFusion(SumFusion):
    """A weighted sum, and beside that vector a mixture of the heads where validation chooses one, see `Mixture`."""

    mixing: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("mixing", torch.zeros(2, len(HEADS)))  # scale and bias; all zero: no mixture

    def set_mixture(self, mixture: Mixture | None) -> None:
        """Score by this mixture, or by the weighted sum."""
        values = torch.zeros(2, len(HEADS)) if mixture is None else torch.tensor([mixture.scale, mixture.bias])
        self.mixing.copy_(values)

    def mixture(self) -> Mixture | None:
        """The mixture that scores, if one does."""
        scale, bias = self.mixing.tolist()
        return Mixture(tuple(scale), tuple(bias)) if any(scale) else None


class ConcatFusion(Fusion):
    """h = mean of the heads + MLP([h_1; h_2; h_3])."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = mlp(len(HEADS) * dim, dim)

    def forward(self, stacked: Tensor) -> Tensor:
        """[T, heads, D] → [T, D]."""
        return stacked.mean(1) + self.mlp(stacked.flatten(1))


FUSIONS: dict[str, type[Fusion]] = {
    "late": LateFusion,
    "sum": SumFusion,
    "gated": GatedFusion,
    "concat": ConcatFusion,
}
