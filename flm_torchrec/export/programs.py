"""The programs of the packaged tower, before torch.export makes them free of this code.

TorchRec's quantised collections are not used: torch.export refuses their operators' counters (`fbgemm.AtomicCounter`
"haven't registered a fake class", torchrec 1.8). The rows are those of FBGEMM's format all the same, and gathered and
scaled by plain operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import fbgemm_gpu  # noqa: F401 (registers the operators)
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Precision = Literal["int8", "fp32"]


class Rows(nn.Module):
    """A table: int8 rows with a scale and a bias each (FBGEMM's row-wise format), or float32 rows."""

    codes: Tensor
    scale: Tensor
    values: Tensor

    def __init__(self, blocks: Iterator[Tensor], dim: int, precision: Precision) -> None:
        super().__init__()
        self.dim = dim
        self.quantised = precision == "int8"
        stored = [_quantised(block) if self.quantised else block for block in blocks]
        empty = torch.zeros(0, dim + 8, dtype=torch.uint8) if self.quantised else torch.zeros(0, dim)
        joined = torch.cat([empty, *stored])
        if self.quantised:
            self.register_buffer("codes", joined[:, :dim].contiguous())
            self.register_buffer("scale", joined[:, dim:].contiguous().view(torch.float32))  # [rows, 2]: scale, bias
        else:
            self.register_buffer("values", joined)

    def forward(self, ids: Tensor) -> Tensor:
        """[…] ids → […, D]."""
        if not self.quantised:
            return self.values[ids]
        scale = self.scale[ids]
        return self.codes[ids].float() * scale[..., :1] + scale[..., 1:]


class ContentProgram(nn.Module):
    """Features of items or of users → content vectors.

    The tables of all sparse features lie in one, that of feature f from `offset[f]` on.
    """

    offset: Tensor

    def __init__(self, mlp: nn.Module, table: Rows, offset: list[int]) -> None:
        super().__init__()
        self.mlp = mlp
        self.table = table
        self.features = len(offset)
        self.register_buffer("offset", torch.tensor(offset, dtype=torch.int64))

    def forward(self, codes: Tensor, dense: Tensor) -> Tensor:
        """codes [N, features, C] int64, -1 where there is none; dense [N, F] → [N, D].

        A feature is the mean of its rows. Summed tables have features of one code alone: the same.
        """
        if self.features == 0:
            return self.mlp(dense)
        held = (codes >= 0).unsqueeze(3)  # [N, features, C, 1]
        rows = self.table(codes.clamp(min=0) + self.offset[None, :, None]) * held
        pooled = rows.sum(2) / held.sum(2).clamp(min=1)
        return self.mlp(torch.cat([pooled.flatten(1), dense], 1))


class UserProgram(nn.Module):
    """Histories → what each head and the fusion make of them after the last event.

    The model's own layers over padded sequences: padding stands at the end, where causal layers do not see it.
    """

    def __init__(self, dense: Any, tables: dict[str, Rows], items: int) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(tables)
        self.event, self.start, self.transformer = dense.event, dense.start, dense.transformer
        self.content_head, self.collaborative_head = dense.content_head, dense.collaborative_head
        self.fusion, self.cosine = dense.fusion, dense.cosine
        self.items = items

    def forward(
        self,
        items: Tensor,
        event: Tensor,
        gap: Tensor,
        value: Tensor,
        time: Tensor,
        lengths: Tensor,
        added: Tensor,
        user: Tensor,
        profile: Tensor,
        given: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """items, event, gap, value, time [B, L] of `lengths` [B] events each, oldest first.

        Args:
            items: rows of the catalogue; of `added` [M, D], content vectors of other items, from its end on.
            event, gap: rows of their tables. value: standardised. time: seconds since the first.
            user: [B] rows of known users, or -1.
            profile: [B, D] content vectors of users, used where `given` [B] bool; else that of the known user.

        Returns:
            [B, heads + 1, D], fused last, and the heads' weights in it [B, heads]; zeros where it is no weighted sum.
        """
        lengths = lengths.unsqueeze(1)
        count, longest = items.shape
        shown = (torch.arange(longest)[None, :] < lengths).unsqueeze(2)  # [B, L, 1]
        known = (items < self.items).unsqueeze(2)
        rows = items.clamp(max=self.items - 1)
        item_id = self.tables["item_id"](rows) * (known & shown)
        other = added[(items - self.items).clamp(min=0)]
        content = torch.where(known, self.tables["item_content"](rows), other) * shown
        user_row = user.clamp(min=0)
        user_id = self.tables["user_id"](user_row) * (user >= 0).unsqueeze(1)
        profile = torch.where(given.unsqueeze(1), profile, self.tables["profile"](user_row))

        number = lengths.clamp(min=1)
        heads = [
            self.content_head(torch.cat([content.sum(1) / number, profile], 1)),
            self.collaborative_head(torch.cat([user_id, item_id.sum(1) / number], 1)),
        ]
        history = torch.cat([self.tables["event"](event), self.tables["gap"](gap), value.unsqueeze(2)], 2)
        x = torch.cat([(profile + self.start).unsqueeze(1), item_id + content + self.event(history)], 1)
        clock = torch.cat([time.new_zeros(count, 1), time], 1)
        heads.append(self.transformer.padded(x, clock)[torch.arange(count), lengths.squeeze(1)])
        if self.cosine:
            heads = [F.normalize(h, dim=1) for h in heads]
        stacked = torch.stack(heads, 1)  # [B, heads, D]
        fused = self.fusion(stacked)
        fused = F.normalize(fused, dim=1) if self.cosine else fused
        return torch.cat([stacked, fused.unsqueeze(1)], 1), self._weights(stacked)

    def _weights(self, stacked: Tensor) -> Tensor:
        if hasattr(self.fusion, "weights"):
            return self.fusion.weights(stacked)
        if hasattr(self.fusion, "scale"):
            return self.fusion.scale.squeeze(1).expand(stacked.shape[0], -1)
        return stacked.new_zeros(stacked.shape[:2])


def _quantised(block: Tensor) -> Tensor:
    return torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(block.contiguous())
