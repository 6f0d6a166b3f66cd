"""Layers of the heads."""

from __future__ import annotations

import torch
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


class CollaborativeHead(nn.Module):
    """h = MLP([user; mean of the items' ids]) + W mean(sources of the items) sqrt(n), whatever the items' order.

    The MLP is a two-tower model (Covington et al., RecSys 2016). The other part is a linear autoencoder of rank D: the
    weight from item i to item j is target_j . W source_i, the factored form of SLIM (Ning & Karypis, ICDM 2011) and
    EASE-R (Steck, WWW 2019). The root of n is that of FISM (Kabbur et al., KDD 2013), between a sum and a mean.
    """

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.two_tower = Head(2 * dim, dim, dropout)
        self.dropout = Dropout(dropout)
        self.autoencoder = nn.Linear(dim, dim)

    def forward(self, user: Tensor, ids: Tensor, sources: Tensor, count: Tensor) -> Tensor:
        """[R, D] of the user, [R, D] means over n items of their ids and of their sources, [R, 1] n → [R, D]."""
        return self.two_tower(torch.cat([user, ids], 1)) + self.autoencoder(sources * count.sqrt())

    def left_out(self, user: Tensor, sources: Tensor, count: Tensor) -> Tensor:
        """As `forward` without the MLP, for means over all items of a sequence but one."""
        return user + self.autoencoder(sources * count.sqrt())


def mlp(inputs: int, dim: int) -> nn.Sequential:
    """[…, inputs] → […, dim], with one hidden layer of twice that width."""
    return nn.Sequential(nn.Linear(inputs, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
