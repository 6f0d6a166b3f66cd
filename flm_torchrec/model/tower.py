"""The dense part: item vectors, three heads and their fusion, all in one space. It knows no tables and no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flm_torchrec.config.heads import FUSED, HEADS
from flm_torchrec.config.schema import ModelConfig
from flm_torchrec.model.fusion import FUSIONS
from flm_torchrec.model.heads import Head, mlp
from flm_torchrec.model.layout import Jagged, Layout
from flm_torchrec.model.transformer import CausalTransformer


@dataclass(frozen=True)
class Widths:
    """Sizes of the tower's inputs; every table has the width D, which is `ModelConfig.dim`."""

    item_features: int
    """Sparse item features; each is pooled to D."""
    item_dense: int
    user_features: int
    """Sparse user features beside the user's id."""
    user_dense: int
    history: int
    """Tables of the event itself: its kind, the time before it."""
    max_tokens: int


@dataclass
class EmbeddingOutputs:
    """Rows of the tables for the N items, B sequences and T tokens of a batch."""

    item_id: Tensor  # [N, D]
    item_features: Tensor  # [N, item_features * D]
    user: Tensor  # [B, (1 + user_features) * D]: the id first
    history: Tensor  # [T, history * D]


class DenseInputs(Protocol):
    """What the tower takes from a batch beside rows of tables; see `data.batch.Batch`."""

    item_dense: Tensor  # [N, item_dense]
    item_known: Tensor  # [N] 1 where the id was trained, else 0
    user_dense: Tensor  # [B, user_dense]
    user_known: Tensor  # [B]
    value: Tensor  # [T]
    lengths: Tensor  # [B] tokens, the prefix included
    tokens: Tensor  # [T] index of a token's item; N at a prefix
    time: Tensor  # [T] seconds


@dataclass
class Sequences:
    """What the heads see of B sequences, whose tokens lie in memory as a `Layout` says.

    An item's id and content are zero at a prefix and at padding.
    """

    item_id: Tensor  # […, D]
    item_content: Tensor  # […, D]
    event: Tensor  # […, history * D + 1]: rows of the tables of events, and the standardised value
    user_id: Tensor  # [B, D]
    profile: Tensor  # [B, D] content of the user


@dataclass
class Encoded:
    """Outputs of the tower for a batch."""

    items: Tensor  # [N, D]
    item_ids: Tensor  # [N, D]: from ids alone
    content_items: Tensor  # [N, D]: from features alone, as an item without a known id has
    representations: dict[str, Tensor]  # by name of REPRESENTATIONS, [T, D]


class Tower(nn.Module):
    """Rows of tables of a batch → item vectors [N, D] and a representation [T, D] by each head and by fusion.

    At each token, every head sees the user and the tokens so far, never a later one:

    * content: features of the user and of the items so far, no ids;
    * collaborative: the ids of the user and of the items so far, whatever their order (two-tower: Covington et
      al., RecSys 2016);
    * sequential: a causal Transformer over item id + item content + event (Kang & McAuley, SASRec, ICDM 2018).

    A score is the dot product of a representation with an item vector.
    """

    def __init__(self, widths: Widths, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.item_content = mlp(widths.item_features * dim + widths.item_dense, dim)
        self.user_content = mlp(widths.user_features * dim + widths.user_dense, dim)
        self.event = nn.Linear(widths.history * dim + 1, dim)
        self.start = nn.Parameter(torch.zeros(dim))
        self.transformer = CausalTransformer(config, widths.max_tokens)
        self.content_head = Head(2 * dim, dim, config.dropout)
        self.collaborative_head = Head(2 * dim, dim, config.dropout)
        self.fusion = FUSIONS[config.fusion](dim)

    def forward(self, embedded: EmbeddingOutputs, batch: DenseInputs) -> Encoded:
        """Rows of tables and a batch → `Encoded`. In training, random ids are hidden."""
        dim = self.config.dim
        item_id = embedded.item_id * self._shown(batch.item_known, self.config.id_dropout)
        content = self._content(torch.cat([embedded.item_features, batch.item_dense], 1))
        vectors = item_id + content
        user_id, user_features = embedded.user[:, :dim], embedded.user[:, dim:]
        seen = Sequences(
            user_id=user_id * self._shown(batch.user_known, self.config.user_id_dropout),
            profile=self.user_content(torch.cat([user_features, batch.user_dense], 1)),
            item_id=_gather(item_id, batch.tokens),
            item_content=_gather(content, batch.tokens),
            event=torch.cat([embedded.history, batch.value.unsqueeze(1)], 1),
        )
        representations = self.represent(seen, Jagged(batch.lengths, batch.time))
        return Encoded(self._unit(vectors), embedded.item_id, self._unit(content), representations)

    def represent(self, seen: Sequences, layout: Layout) -> dict[str, Tensor]:
        """Sequences → by name of REPRESENTATIONS, [R, D] at the R represented tokens of the layout."""
        events = seen.item_id + seen.item_content + self.event(seen.event)
        heads = {
            "content": self.content_head(torch.cat([layout.mean(seen.item_content), layout.each(seen.profile)], 1)),
            "collaborative": self.collaborative_head(
                torch.cat([layout.each(seen.user_id), layout.mean(seen.item_id)], 1)
            ),
            "sequential": self.transformer(layout.begin(layout.each(seen.profile) + self.start, events), layout),
        }
        heads = {name: self._unit(h) for name, h in heads.items()}
        return {**heads, FUSED: self._unit(self.fusion(torch.stack([heads[name] for name in HEADS], 1)))}

    def sliceable(self) -> list[nn.Module]:
        """The layers that ranks may hold in slices: all but the fusion, whose weights are set after training."""
        return [layer for layer in self.children() if layer is not self.fusion]

    def freeze(self, learning: Literal["frozen", "partial", "full"]) -> None:
        """Keep layers from learning.

        Args:
            learning: "full": every layer learns; "frozen": only the fusion; "partial": the fusion, the heads, and the
                last block and norm of the transformer.
        """
        if learning == "full":
            return
        kept: list[nn.Module] = [self.fusion]
        if learning == "partial":
            last = list(self.transformer.blocks)[-1:]
            kept += [self.content_head, self.collaborative_head, self.transformer.norm, *last]
        self.requires_grad_(False)
        for layer in kept:
            layer.requires_grad_(True)

    def _unit(self, x: Tensor) -> Tensor:
        """[n, D] → [n, D], of length 1 where scores are cosines."""
        return F.normalize(x, dim=1) if self.config.similarity == "cosine" else x

    def _content(self, features: Tensor) -> Tensor:
        """[N, F] → [N, D]; without features all items have the same content, which is computed once."""
        if features.shape[1]:
            return self.item_content(features)
        return self.item_content(features[:1]).expand(len(features), -1)

    def _shown(self, known: Tensor, dropout: float) -> Tensor:
        """[n, 1]: 0 where the id is unknown or, in training, hidden at random (DropoutNet, NeurIPS 2017)."""
        if self.training and dropout > 0:
            known = known * (torch.rand_like(known) >= dropout)
        return known.unsqueeze(1)


def _gather(rows: Tensor, tokens: Tensor) -> Tensor:
    """[N, D], [T] → [T, D]; zeros at a prefix token, whose index is N."""
    return F.pad(rows, (0, 0, 0, 1))[tokens]
