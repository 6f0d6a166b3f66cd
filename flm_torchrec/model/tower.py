"""The dense part: item vectors, three heads and their fusion, all in one space. It knows no tables and no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from flm_torchrec.config.heads import FUSED, HEADS
from flm_torchrec.config.schema import ModelConfig
from flm_torchrec.model.fusion import FUSIONS
from flm_torchrec.model.heads import CollaborativeHead, ContentHead, ItemContent, mlp
from flm_torchrec.model.last_token import Ends
from flm_torchrec.model.layout import Jagged, Layout
from flm_torchrec.model.linear import Linear
from flm_torchrec.model.scale import softened_unit, unit
from flm_torchrec.model.space import place, placed, width
from flm_torchrec.model.token_passes import gather
from flm_torchrec.model.transformer import CausalTransformer

SOFTENING = 0.01
"""Squared length that is added before an item's collaborative row is divided by its length, which is about 1."""


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
    timed: bool = True
    """Events have times."""


@dataclass
class EmbeddingOutputs:
    """Rows of the tables for the N items, B sequences and T tokens of a batch."""

    item_id: Tensor  # [N, D]
    item_source: Tensor  # [N, D]: what the item says of a user who has it
    item_target: Tensor  # [N, D]: what the collaborative head scores
    item_context: Tensor  # [N, D]: what the item says of the events after it
    item_features: Tensor  # [N, item_features * D]
    user: Tensor  # [B, (1 + user_features) * D]: the id first
    history: Tensor  # [T, history * D]
    context: Tensor | None = None  # [T, D]: of the features of a token's event


class DenseInputs(Protocol):
    """What the tower takes from a batch beside rows of tables; see `data.batch.Batch`."""

    item_dense: Tensor  # [N, item_dense]
    item_sketch: Tensor  # [N, D]
    item_known: Tensor  # [N] 1 where the id was trained, else 0
    user_dense: Tensor  # [B, user_dense]
    user_known: Tensor  # [B]
    value: Tensor  # [T]
    lengths: Tensor  # [B] tokens, the prefix included
    tokens: Tensor  # [T] index of a token's item; N at a prefix
    targets: Tensor  # [T] index of the item that follows; empty where nothing is learned
    time: Tensor  # [T] seconds


@dataclass
class Sequences:
    """What the heads see of B sequences, whose tokens lie in memory as a `Layout` says.

    All that is of an item is zero at padding, and not used at a prefix.
    """

    item_id: Tensor  # […, D]
    item_source: Tensor  # […, D]
    item_context: Tensor  # […, D]
    item_content: Tensor  # […, D]
    event: Tensor  # […, history * D + 1]: rows of the tables of events, and the standardised value
    user_id: Tensor  # [B, D]
    profile: Tensor  # [B, D] content of the user
    context: Tensor | None = None  # […, D]: of the features of events; zero where they are unknown


@dataclass
class Encoded:
    """Outputs of the tower for a batch."""

    items: Tensor  # [N, S]
    ids: Tensor  # [N, D]: rows of the table of ids
    contents: Tensor  # [N, D]: of features alone; in training not scaled, as a step needs few of them
    queries: dict[str, Tensor]
    """By name of REPRESENTATIONS, at each token [T, D], the half of the space that a head uses, of the fusion [T, S];
    where there is nothing to predict, [R, D] and [R, S] at the last token of each of the R sequences that have tokens.
    In training the fusion has no row where no loss learns from it."""
    left_out: Tensor | None = None  # [T, D] in training: the collaborative head of all items but the target

    @property
    def representations(self) -> dict[str, Tensor]:
        """By name of REPRESENTATIONS, [T, S] or [R, S]: `queries` in the whole space."""
        return placed(self.queries)

    @property
    def id_items(self) -> Tensor:
        """[N, S]: from ids alone."""
        return torch.cat([self.ids, self.items.chunk(2, 1)[1]], 1)

    @property
    def content_items(self) -> Tensor:
        """[N, S]: from features alone, as an item without a known id has."""
        return place("content", self.contents)


class Tower(nn.Module):
    """Rows of tables of a batch → item vectors [N, S] and a representation [T, S] by each head and by fusion, S = 2 D.

    At each token, every head sees the user and the tokens so far, never a later one:

    * content: features of the user and of the items so far, no ids;
    * collaborative: the ids of the user and of the items so far, whatever their order, see `CollaborativeHead`;
    * sequential: a causal Transformer over item id + item content + event (Kang & McAuley, SASRec, ICDM 2018). An item
      of the history has a row of its own besides (`item_context`), so that what follows an item need not be what is
      like it (FPMC: Rendle et al., WWW 2010).

    A score is the dot product of a representation with an item vector, see `space`.

    Args:
        widths, config: of its inputs, and of itself.
        learns_fused: a loss learns from the fusion. Else training makes it of no token at all, [0, S].
    """

    def __init__(self, widths: Widths, config: ModelConfig, learns_fused: bool = True) -> None:
        super().__init__()
        dim = config.dim
        self.config, self.learns_fused = config, learns_fused
        self.item_content = ItemContent(widths.item_features * dim + widths.item_dense, dim)
        self.user_content = mlp(widths.user_features * dim + widths.user_dense, dim)
        self.event = Linear(widths.history * dim + 1, dim)
        self.start = nn.Parameter(torch.zeros(dim))
        self.transformer = CausalTransformer(config, widths.max_tokens, widths.timed)
        self.content_head = ContentHead(dim, config.dropout, widths.timed)
        self.collaborative_head = CollaborativeHead(dim, config.embedding_dropout)
        self.fusion = FUSIONS[config.fusion](width(dim))

    def forward(self, embedded: EmbeddingOutputs, batch: DenseInputs) -> Encoded:
        """Rows of tables and a batch → `Encoded`. In training, random ids are hidden."""
        dim = self.config.dim
        known = batch.item_known.unsqueeze(1)
        shown = self._shown(batch.item_known, self.config.id_dropout)
        content = self._content(torch.cat([embedded.item_features, batch.item_dense], 1), batch.item_sketch)
        ids, sources = embedded.item_id * shown, embedded.item_source * known
        vectors = content + ids
        at = batch.tokens.clamp(max=len(known) - 1)  # any item at a prefix, where layouts of tokens use none
        user_id, user_features = embedded.user[:, :dim], embedded.user[:, dim:]
        seen = Sequences(
            user_id=user_id * self._shown(batch.user_known, self.config.user_id_dropout),
            profile=self.user_content(torch.cat([user_features, batch.user_dense], 1)),
            item_id=gather(ids, at),
            item_source=gather(sources, at),
            item_context=gather(embedded.item_context * known, at),
            item_content=gather(content, at),
            event=torch.cat([embedded.history, batch.value.unsqueeze(1)], 1),
            context=embedded.context,
        )
        learns = self.training or len(batch.targets) > 0
        layout = Jagged(batch.lengths, batch.time) if learns else Ends(batch.lengths, batch.time)
        return Encoded(
            items=torch.cat([self._unit(vectors), self._scored(embedded.item_target, known)], 1),
            ids=embedded.item_id,
            contents=content if self.training else self._unit(content),
            queries=self.queries(seen, layout),
            left_out=self._left_out(seen.user_id, gather(sources, batch.targets), layout) if self.training else None,
        )

    def represent(self, seen: Sequences, layout: Layout) -> dict[str, Tensor]:
        """Sequences → by name of REPRESENTATIONS, [R, S] at the R represented tokens of the layout."""
        return placed(self.queries(seen, layout))

    def queries(self, seen: Sequences, layout: Layout) -> dict[str, Tensor]:
        """As of `Encoded.queries`."""
        events = seen.item_id + seen.item_context + seen.item_content + self.event(seen.event)
        if seen.context is not None:
            events = events + seen.context
        sources = layout.mean(self.collaborative_head.dropout(seen.item_source))
        heads = {
            "content": self.content_head(seen.item_content, seen.profile, layout),
            "collaborative": self.collaborative_head(
                layout.each(seen.user_id), layout.mean(seen.item_id), sources, layout.count
            ),
            "sequential": self.transformer(layout.begin(layout.each(seen.profile) + self.start, events), layout),
        }
        heads = {name: self._unit(h) for name, h in heads.items()}
        parts = [heads[name] for name in HEADS]
        if self.training and not self.learns_fused:
            parts = [h.detach()[:0] for h in parts]  # its parameters owe other ranks a gradient of zero all the same
        parts = [place(name, h) for name, h in zip(HEADS, parts, strict=True)]
        return {**heads, FUSED: self._unit(self.fusion(torch.stack(parts, 1)))}

    def _left_out(self, user: Tensor, targets: Tensor, layout: Jagged) -> Tensor:
        """[B, D] ids of users, [T, D] sources of targets → [T, D]: the collaborative head without each target."""
        sources, count = layout.others(self.collaborative_head.dropout(targets))
        return self._unit(self.collaborative_head.left_out(layout.each(user), sources, count))

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
        return unit(x) if self.config.similarity == "cosine" else x

    def _scored(self, target: Tensor, known: Tensor) -> Tensor:
        """[N, D] → [N, D], of length almost 1 where scores are cosines; zero for a row of zeros or where not known.

        An item that came after training has a row of zeros. The gradient of a unit vector has no bound there, and would
        fill the row's optimizer state for good.
        """
        if self.config.similarity != "cosine":
            return target * known
        return softened_unit(target, SOFTENING, known)

    def _content(self, features: Tensor, sketch: Tensor) -> Tensor:
        """[N, F], [N, D] → [N, D]; without features all items have the same content, which is computed once."""
        if features.shape[1]:
            return self.item_content(features, sketch)
        return self.item_content(features[:1], sketch[:1]).expand(len(features), -1)

    def _shown(self, known: Tensor, dropout: float) -> Tensor:
        """[n, 1]: 0 where the id is unknown or, in training, hidden at random (DropoutNet, NeurIPS 2017)."""
        if self.training and dropout > 0:
            known = known * (torch.rand_like(known) >= dropout)
        return known.unsqueeze(1)
