"""The programs of the packaged tower. After torch.export they run without this code.

TorchRec's quantised collections are not used: torch.export refuses their operators' counters (`fbgemm.AtomicCounter`
"haven't registered a fake class", torchrec 1.8). The rows still have FBGEMM's format; plain operators gather and scale
them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import fbgemm_gpu  # noqa: F401 (registers the operators)
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flm_torchrec.config.heads import HEADS, REPRESENTATIONS
from flm_torchrec.model.last_token import Padded
from flm_torchrec.model.tower import Sequences, Tower

Precision = Literal["int8", "fp32"]


class PackagedTable(nn.Module):
    """An embedding table: int8 rows with a scale and a bias each (FBGEMM's row-wise format), or float32 rows.

    Args:
        blocks: [n, D] float32 each, in order of row.
        rows: of all blocks.
    """

    codes: Tensor
    scale: Tensor
    values: Tensor

    def __init__(self, blocks: Iterable[Tensor], rows: int, dim: int, precision: Precision) -> None:
        super().__init__()
        self.dim = dim
        self.quantised = precision == "int8"
        if self.quantised:
            self.register_buffer("codes", torch.empty(rows, dim, dtype=torch.uint8))
            self.register_buffer("scale", torch.empty(rows, 2))  # scale, bias
        else:
            self.register_buffer("values", torch.empty(rows, dim))
        start = 0
        for block in blocks:
            here = slice(start, start + len(block))
            if self.quantised:
                packed = _quantised(block)
                self.codes[here], self.scale[here] = packed[:, :dim], packed[:, dim:].contiguous().view(torch.float32)
            else:
                self.values[here] = block
            start = here.stop

    def forward(self, ids: Tensor) -> Tensor:
        """[…] int64 ids → […, D] float32."""
        if not self.quantised:
            return self.values[ids]
        scale = self.scale[ids]
        return self.codes[ids].float() * scale[..., :1] + scale[..., 1:]


class SketchProgram(nn.Module):
    """Features of items → their sketches, as of `data.sketch.Sketches`.

    Args:
        table: what each code adds, with rows as of the table of the `ContentProgram` beside it.
        dense: [F, D] what each number adds.

    One row of zeros more is kept of the numbers: torch.export.save fails where several tensors are empty.
    """

    dense: Tensor

    def __init__(self, table: PackagedTable, dense: Tensor) -> None:
        super().__init__()
        self.table = table
        self.register_buffer("dense", F.pad(dense, (0, 0, 0, 1)))

    def forward(self, rows: Tensor, present: Tensor, dense: Tensor) -> Tensor:
        """[N, features, C] rows, [N, features, C, 1] bool and [N, F] → [N, D]."""
        of_features = F.normalize((self.table(rows) * present).sum(2), dim=2).sum(1)
        return F.normalize(of_features + F.normalize(F.pad(dense, (0, 1)) @ self.dense, dim=1), dim=1)


class ContentProgram(nn.Module):
    """Features of items or of users → content vectors.

    All sparse features share one table; the rows of feature f start at `offset[f]`.

    Args:
        layers: of pooled features, and of sketches where there are any.
        sketch: of items.
    """

    offset: Tensor

    def __init__(
        self, layers: nn.Module, table: PackagedTable, offset: list[int], sketch: SketchProgram | None = None
    ) -> None:
        super().__init__()
        self.layers = layers
        self.table = table
        self.sketch = sketch
        self.features = len(offset)
        self.register_buffer("offset", torch.tensor(offset, dtype=torch.int64))

    def forward(self, codes: Tensor, dense: Tensor) -> Tensor:
        """codes [N, features, C] int64, -1 where there is none; dense [N, F] → [N, D].

        A feature is the mean of its rows. Tables that sum have features of one code, where mean and sum are the same.
        """
        present = (codes >= 0).unsqueeze(3)  # [N, features, C, 1]
        rows = codes.clamp(min=0) + self.offset[None, :, None]
        pooled = (self.table(rows) * present).sum(2) / present.sum(2).clamp(min=1)
        joined = torch.cat([pooled.flatten(1), dense], 1)
        return self.layers(joined) if self.sketch is None else self.layers(joined, self.sketch(rows, present, dense))


class UserInputs(NamedTuple):
    """Inputs of the user program: B histories of up to L events each, oldest first, padded at the end."""

    items: Tensor
    """[B, L] rows of the catalogue; numbers from the catalogue's size on are rows of `added`."""
    event: Tensor
    """[B, L] rows of the table of events."""
    gap: Tensor
    """[B, L] rows of the table of gaps."""
    value: Tensor
    """[B, L] standardised values."""
    time: Tensor
    """[B, L] seconds since the first event."""
    lengths: Tensor
    """[B] numbers of events."""
    added: Tensor
    """[M, D] content vectors of items that the catalogue lacks."""
    user: Tensor
    """[B] rows of known users; -1 for others."""
    profile: Tensor
    """[B, D] content vectors of users, used where `given`; else the known user's vector is."""
    given: Tensor
    """[B] bool."""
    context: Tensor | None = None
    """[B, L, C] rows of the tables of the features of events, 0 where unknown; only where events have features."""


class UserProgram(nn.Module):
    """Histories → the representations after the last event, by each head and by fusion, with the model's own tower.

    Args:
        first: by feature of events, where its rows begin in the table "context".
    """

    size: Tensor
    first: Tensor

    def __init__(self, tower: Tower, tables: dict[str, PackagedTable], items: int, first: list[int]) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(tables)
        self.tower = tower
        self.register_buffer("size", torch.tensor(items))  # no constant: catalogues of other sizes have one program
        if first:
            self.register_buffer("first", torch.tensor(first, dtype=torch.int64))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The fields of `UserInputs` → [B, heads + 1, S] in the order of REPRESENTATIONS, and the heads' weights in the
        fusion [B, heads], zeros where the fusion is no weighted sum."""
        given = UserInputs(*inputs)
        count, longest = given.items.shape
        shown = (torch.arange(longest)[None, :] < given.lengths.unsqueeze(1)).unsqueeze(2)  # [B, L, 1]
        known = (given.items < self.size).unsqueeze(2)
        rows = torch.minimum(given.items, self.size - 1)
        other = given.added[(given.items - self.size).clamp(min=0)]
        user = given.user.clamp(min=0)
        event, gap = self.tables["event"](given.event), self.tables["gap"](given.gap)
        seen = Sequences(
            item_id=self.tables["item_id"](rows) * (known & shown),
            item_source=self.tables["item_source"](rows) * (known & shown),
            item_context=self.tables["item_context"](rows) * (known & shown),
            item_content=torch.where(known, self.tables["item_content"](rows), other) * shown,
            event=torch.cat([event, gap, given.value.unsqueeze(2)], 2),
            user_id=self.tables["user_id"](user) * (given.user >= 0).unsqueeze(1),
            profile=torch.where(given.given.unsqueeze(1), given.profile, self.tables["profile"](user)),
            context=self._context(given.context),
        )
        clock = torch.cat([given.time.new_zeros(count, 1), given.time], 1)
        represented = self.tower.represent(seen, Padded(given.lengths, clock))
        stacked = torch.stack([represented[name] for name in REPRESENTATIONS], 1)  # [B, heads + 1, S]
        return stacked, self.tower.fusion.weights(stacked[:, : len(HEADS)])

    def _context(self, rows: Tensor | None) -> Tensor | None:
        """[B, L, C] rows → [B, L, D], the sum over the features; an unknown value adds nothing."""
        if rows is None:
            return None
        known = (rows > 0).unsqueeze(3)  # [B, L, C, 1]
        return (self.tables["context"](rows + self.first) * known).sum(2)


def _quantised(block: Tensor) -> Tensor:
    return torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(block.contiguous())
