"""Layers of the heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flm_torchrec.model.dropout import Dropout
from flm_torchrec.model.elapsed import BUCKETS
from flm_torchrec.model.layout import Layout
from flm_torchrec.model.linear import Linear
from flm_torchrec.model.scale import unit

GAIN = 4.0
"""First length of a sketch in an item's vector, where the row of its id has length 1."""
RECENCY = 0.7
"""First value of what an item counts in the content head, of what the item after it counts."""
START = 0.1
"""First length of what the content head's layers add, to a vector of length 1."""
FASTER = 10.0
"""AdamW changes a number by about its learning rate in a step. A number that shapes a whole head has to move further
than a weight of a layer does, so it is held divided by this."""

OF_A_DOMAIN = (
    "item_content.log_gain",
    "item_content.mlp.2.weight",
    "content_head.scale",
    "content_head.recency",
    "content_head.elapsed",
)
"""Parameters of the tower: how the content head weighs its comparison of features, and how much layers add to it. What
one domain learnt of these is worse for another than the first values are (docs/domains.md)."""


class Head(nn.Module):
    """Inputs of a head at each token [T, inputs] → the feature space [T, D]."""

    def __init__(self, inputs: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Dropout(dropout), Linear(inputs, 2 * dim), nn.GELU(), Linear(2 * dim, dim), nn.LayerNorm(dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[T, inputs] → [T, D]."""
        return self.layers(x)


class ItemContent(nn.Module):
    """Features and sketches of items → contents [N, D]: gain x sketch + MLP(features), the MLP at first a constant.

    A sketch keeps how alike the features of two items are (`data.sketch`). The layers have to learn that, and do not
    where events are few; so they begin with nothing to add.
    """

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.mlp = mlp(inputs, dim)
        last = self.mlp[-1]
        assert isinstance(last, Linear)
        nn.init.zeros_(last.weight)
        self.log_gain = nn.Parameter(torch.tensor([GAIN]).log() / FASTER)

    def forward(self, features: Tensor, sketch: Tensor) -> Tensor:
        """[N, inputs], [N, D] → [N, D]."""
        return (FASTER * self.log_gain).exp() * sketch + self.mlp(features)


class ContentHead(nn.Module):
    """h = direction of the recent items' contents + MLP([mean of the items' contents; profile of the user]).

    An item counts by how many items ago it was and, in data with times, by how long ago.

    The MLP has almost nothing to add at first, so that an untrained head compares the features of items with those of
    the history, as the baseline content-kNN does.
    """

    def __init__(self, dim: int, dropout: float, timed: bool) -> None:
        super().__init__()
        self.learned = Head(2 * dim, dim, dropout)
        norm = self.learned.layers[-1]
        assert isinstance(norm, nn.LayerNorm)
        nn.init.constant_(norm.weight, (2 * dim) ** -0.5)
        nn.init.normal_(norm.bias, std=(2 * dim) ** -0.5)  # a user without history has a direction too
        self.scale = nn.Parameter(torch.tensor([START]) / FASTER)
        self.recency = nn.Parameter(torch.tensor([RECENCY]).logit() / FASTER)
        self.elapsed = nn.Parameter(torch.zeros(1, BUCKETS)) if timed else None

    def forward(self, contents: Tensor, profile: Tensor, layout: Layout) -> Tensor:
        """[items of …, D], zero where there is no item, and [B, D] → [R, D]."""
        old = None if self.elapsed is None else (FASTER * self.elapsed).exp()
        recent = layout.recent(contents, torch.sigmoid(FASTER * self.recency), old)
        learned = self.learned(torch.cat([layout.mean(contents), layout.each(profile)], 1))
        return unit(recent, START) + FASTER * self.scale * learned


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
        self.autoencoder = Linear(dim, dim)

    def forward(self, user: Tensor, ids: Tensor, sources: Tensor, count: Tensor) -> Tensor:
        """[R, D] of the user, [R, D] means over n items of their ids and of their sources, [R, 1] n → [R, D]."""
        return self.two_tower(torch.cat([user, ids], 1)) + self.autoencoder(sources * count.sqrt())

    def left_out(self, user: Tensor, sources: Tensor, count: Tensor) -> Tensor:
        """As `forward` without the MLP, for means over all items of a sequence but one."""
        return user + self.autoencoder(sources * count.sqrt())


def mlp(inputs: int, dim: int) -> nn.Sequential:
    """[…, inputs] → […, dim], with one hidden layer of twice that width."""
    return nn.Sequential(Linear(inputs, 2 * dim), nn.GELU(), Linear(2 * dim, dim))
