"""The dense part: item vectors, three heads and their fusion, all in one space. Knows no tables and no files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flm_torchrec.model.transformer import CausalTransformer

HEADS = ("content", "collaborative", "sequential")
REPRESENTATIONS = (*HEADS, "fused")


@dataclass(frozen=True)
class Widths:
    """Sizes of what the tower takes; D is the width of every table."""

    dim: int
    item_features: int
    """Sparse item features; pooled to D each."""
    item_dense: int
    user_features: int
    """Sparse user features beside the user's id."""
    user_dense: int
    history: int
    """Tables that say something of an event itself: its kind, the time before it."""
    max_tokens: int


@dataclass
class Looked:
    """What the tables gave for a batch."""

    item_id: Tensor  # [N, D]
    item_features: Tensor  # [N, item_features * D]
    user: Tensor  # [B, (1 + user_features) * D]: the id first
    history: Tensor  # [T, history * D]


@dataclass
class Encoded:
    """What the tower makes of a batch."""

    items: Tensor  # [N, D]
    item_ids: Tensor  # [N, D]: from ids alone
    content_items: Tensor  # [N, D]: from features alone, as an item without a known id has
    representations: dict[str, Tensor]  # by name of REPRESENTATIONS, [T, D]


class Tower(nn.Module):
    """Looked-up rows of a batch → item vectors [N, D] and a representation [T, D] by each head and by fusion.

    At each token, every head sees the user and the tokens so far, never a later one:

    * content: features of the user and of the items so far, no ids;
    * collaborative: the ids of the user and of the items so far, whatever their order (two-tower: Covington et
      al., RecSys 2016);
    * sequential: a causal Transformer over item id + item content + event (Kang & McAuley, SASRec, ICDM 2018).

    A score is the dot product of a representation with an item vector.
    """

    def __init__(
        self,
        widths: Widths,
        layers: int,
        attention_heads: int,
        dropout: float,
        item_id_dropout: float,
        user_id_dropout: float,
        fusion: str,
        block: str,
        relative_bias: bool,
        cosine: bool,
    ) -> None:
        super().__init__()
        dim = widths.dim
        self.dim = dim
        self.item_id_dropout = item_id_dropout
        self.user_id_dropout = user_id_dropout
        self.cosine = cosine
        self.item_content = _mlp(widths.item_features * dim + widths.item_dense, dim)
        self.user_content = _mlp(widths.user_features * dim + widths.user_dense, dim)
        self.event = nn.Linear(widths.history * dim + 1, dim)
        self.start = nn.Parameter(torch.zeros(dim))
        self.transformer = CausalTransformer(
            dim, layers, attention_heads, dropout, widths.max_tokens, block, relative_bias
        )
        self.content_head = _Head(2 * dim, dim, dropout)
        self.collaborative_head = _Head(2 * dim, dim, dropout)
        self.fusion = FUSIONS[fusion](dim)

    def forward(
        self,
        looked: Looked,
        item_dense: Tensor,
        item_known: Tensor,
        user_dense: Tensor,
        user_known: Tensor,
        value: Tensor,
        lengths: Tensor,
        tokens: Tensor,
        time: Tensor,
    ) -> Encoded:
        """See `Encoded`; `item_known` [N] and `user_known` [B] are 1 where an id was trained, else 0."""
        item_id = looked.item_id * self._shown(item_known, self.item_id_dropout)
        content = self._content(torch.cat([looked.item_features, item_dense], 1))
        vectors = item_id + content

        user_id, user_features = looked.user[:, : self.dim], looked.user[:, self.dim :]
        user_id = user_id * self._shown(user_known, self.user_id_dropout)
        profile = self.user_content(torch.cat([user_features, user_dense], 1))  # [B, D]

        row = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)  # [T]
        place = torch.arange(len(row), device=row.device) - (torch.cumsum(lengths, 0) - lengths)[row]
        shown_id, shown_content = _gather(item_id, tokens), _gather(content, tokens)
        mean_id = _so_far(shown_id, row, place, lengths)
        mean_content = _so_far(shown_content, row, place, lengths)
        heads = {
            "content": self.content_head(torch.cat([mean_content, profile[row]], 1)),
            "collaborative": self.collaborative_head(torch.cat([user_id[row], mean_id], 1)),
            "sequential": self._sequential(
                shown_id + shown_content, profile, looked.history, value, row, place, lengths, time
            ),
        }
        if self.cosine:
            vectors, content = F.normalize(vectors, dim=1), F.normalize(content, dim=1)
            heads = {name: F.normalize(h, dim=1) for name, h in heads.items()}
        return Encoded(vectors, looked.item_id, content, {**heads, "fused": self.fuse(heads)})

    def fuse(self, heads: dict[str, Tensor]) -> Tensor:
        """[rows, D] by name of HEADS → h [rows, D]."""
        h = self.fusion(torch.stack([heads[name] for name in HEADS], 1))
        return F.normalize(h, dim=1) if self.cosine else h

    def _sequential(
        self,
        shown: Tensor,
        profile: Tensor,
        history: Tensor,
        value: Tensor,
        row: Tensor,
        place: Tensor,
        lengths: Tensor,
        time: Tensor,
    ) -> Tensor:
        prefix = (place == 0).unsqueeze(1)
        x = shown + self.event(torch.cat([history, value.unsqueeze(1)], 1))
        x = torch.where(prefix, profile[row] + self.start, x)  # [T, D]
        return self.transformer(x, row, place, lengths, time)

    def _content(self, features: Tensor) -> Tensor:
        """[N, F] → [N, D]; where there are no features all items have the same, which is computed once."""
        if features.shape[1]:
            return self.item_content(features)
        return self.item_content(features[:1]).expand(len(features), -1)

    def _shown(self, known: Tensor, dropout: float) -> Tensor:
        """[rows, 1]: 0 where the id is unknown or, in training, hidden by chance (DropoutNet, NeurIPS 2017)."""
        if self.training and dropout > 0:
            known = known * (torch.rand_like(known) >= dropout)
        return known.unsqueeze(1)


class _Head(nn.Module):
    """What a head knows at a token [T, inputs] → the feature space [T, D]."""

    def __init__(self, inputs: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(inputs, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim), nn.LayerNorm(dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class GatedFusion(nn.Module):
    """h = sum over heads k of g_k h_k, g = softmax(W [h_1; h_2; h_3]): mixture of experts, the heads its experts."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(len(HEADS) * dim, len(HEADS))

    def weights(self, stacked: Tensor) -> Tensor:
        """[T, heads, D] → [T, heads], summing to 1."""
        return torch.softmax(self.gate(stacked.flatten(1)), 1)

    def forward(self, stacked: Tensor) -> Tensor:
        return (stacked * self.weights(stacked).unsqueeze(2)).sum(1)


class SumFusion(nn.Module):
    """h = w_1 h_1 + w_2 h_2 + w_3 h_3, the weights the same for everyone.

    Scores are linear in h, so this adds the heads' scores up: an ensemble in one vector.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((len(HEADS), 1), 1 / len(HEADS)))

    def set_weights(self, weights: Tensor) -> None:
        """Take these [heads] in place of what was learned."""
        with torch.no_grad():
            self.scale.copy_(weights[:, None])

    def forward(self, stacked: Tensor) -> Tensor:
        return (stacked * self.scale).sum(1)


class ConcatFusion(nn.Module):
    """h = mean of the heads + MLP([h_1; h_2; h_3])."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = _mlp(len(HEADS) * dim, dim)

    def forward(self, stacked: Tensor) -> Tensor:
        return stacked.mean(1) + self.mlp(stacked.flatten(1))


FUSIONS = {"gated": GatedFusion, "sum": SumFusion, "concat": ConcatFusion}


def _mlp(inputs: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


def _gather(rows: Tensor, tokens: Tensor) -> Tensor:
    """[N, D], [T] → [T, D]; zeros at a prefix token, whose index is N."""
    held = tokens < len(rows)
    return rows[tokens.where(held, 0)] * held.unsqueeze(1)


def _so_far(x: Tensor, row: Tensor, place: Tensor, lengths: Tensor) -> Tensor:
    """[T, D] → [T, D], mean over the sequence's items up to each token; zeros at a prefix."""
    total = torch.cumsum(x, 0)
    before = F.pad(total, (0, 0, 1, 0))[torch.cumsum(lengths, 0) - lengths][row]  # sum of all earlier sequences
    return (total - before) / place.clamp(min=1).unsqueeze(1)
