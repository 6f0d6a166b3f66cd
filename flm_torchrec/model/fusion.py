"""h = fusion(h_content, h_collaborative, h_sequential)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flm_torchrec.config.heads import HEADS
from flm_torchrec.model.heads import mlp


class Fusion(nn.Module):
    """[T, heads, D] in the order of HEADS → h [T, D]."""

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
        self.scale = nn.Parameter(torch.full((len(HEADS), 1), 1 / len(HEADS)))

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


class ConcatFusion(Fusion):
    """h = mean of the heads + MLP([h_1; h_2; h_3])."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = mlp(len(HEADS) * dim, dim)

    def forward(self, stacked: Tensor) -> Tensor:
        """[T, heads, D] → [T, D]."""
        return stacked.mean(1) + self.mlp(stacked.flatten(1))


FUSIONS: dict[str, type[Fusion]] = {"gated": GatedFusion, "sum": SumFusion, "concat": ConcatFusion}
