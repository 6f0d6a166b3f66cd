"""What every source yields, before anything is cleaned or encoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import polars as pl

from flm_torchrec.data.schema import Entity, Kind

if TYPE_CHECKING:
    from flm_torchrec.prepare.clean import Dropped


@dataclass(frozen=True)
class DeclaredFeature:
    """A feature column of the items or users of a source."""

    name: str
    entity: Entity
    kind: Kind


class Shard(Protocol):
    """A file of logs, read in pieces that fit into memory."""

    @property
    def name(self) -> str:
        """By which errors and the report name it."""

    @property
    def identity(self) -> str:
        """Differs once the contents do: where it is, how large, when changed."""

    def batches(self, dropped: Dropped) -> Iterator[pl.DataFrame]:
        """Frames as `SourceData.interactions` has them; rows that cannot be read are counted in `dropped`."""


@dataclass(frozen=True)
class SourceData:
    """A source, read, or what reads it.

    `interactions` has columns file (str), row (int, from 1), user, item (str), timestamp (int64 s), event (str),
    value (float64) and perhaps segment (str); null where a row has none or it cannot be read. Or it is the shards
    of logs that may be larger than memory.
    `items` and `users` have a column key (str) and one a declared feature.
    """

    name: str
    source: str
    interactions: pl.DataFrame | tuple[Shard, ...]
    items: pl.DataFrame | None = None
    users: pl.DataFrame | None = None
    features: tuple[DeclaredFeature, ...] = ()
    title: str = ""
    timestamps: bool = True
    """False: only the order counts, and the timestamp becomes the position in the user's sequence."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Goes into report.json as it is."""
    warnings: tuple[str, ...] = ()
    """What was read otherwise than people may expect, a line each."""
    oracle: dict[str, dict[str, float]] | None = None
    """Best possible scores, where the source knows them; they hold only while no row is dropped."""
