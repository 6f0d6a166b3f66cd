"""What every source yields, before anything is cleaned or encoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import polars as pl

from flm_torchrec.data.schema import Entity, Kind

if TYPE_CHECKING:
    from flm_torchrec.prepare.clean import Dropped


IN_MEMORY = "in memory"
"""`Shard.identity` of what is in memory, and so cannot be found again after a kill."""


@dataclass(frozen=True)
class DeclaredFeature:
    """A feature column of the items, users or events of a source."""

    name: str
    entity: Entity
    kind: Kind
    encoder: str = ""
    """Digest of the text encoder that made its vectors."""


class Shard(Protocol):
    """A file of logs, read in pieces that fit into memory."""

    @property
    def name(self) -> str:
        """Name of the shard in errors and in the report."""

    @property
    def identity(self) -> str:
        """Differs if the contents differ: address, size, time of change."""

    def batches(self, dropped: Dropped) -> Iterator[pl.DataFrame]:
        """Frames as `SourceData.interactions` has them; rows that cannot be read are counted in `dropped`."""


class Described(Protocol):
    """A table of keys and features, a row an item or a user, that may be larger than memory."""

    @property
    def notes(self) -> list[str]:
        """What was not read as the user may expect, a line each: known once all parts were read."""

    def parts(self, folder: Path) -> Iterator[pl.DataFrame]:
        """Frames of one schema, at least one: a column key (str, none null), and one for each declared feature.

        Args:
            folder: for intermediate files.
        """

    def repeated(self, number: int, key: str) -> str:
        """That so many keys have several rows, one of them `key`: says which row of each counts, "first" or "last".

        Raises:
            DataError: none does.
        """


@dataclass(frozen=True)
class SourceData:
    """What a source gives: interactions, or the shards that will read them, and what describes users and items.

    `interactions` has columns file (str), row (int, from 1), user, item (str), timestamp (int64 s), event (str),
    value (float64) and perhaps segment (str); null where a value is missing or cannot be read. Logs that may be larger
    than memory are shards, whose batches have these columns.
    `items` and `users` have a column key (str), each once, and one for each declared feature.
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
    """Entries of report.json."""
    warnings: tuple[str, ...] = ()
    """What was not read as the user may expect, a line each."""
    oracle: dict[str, dict[str, float]] | None = None
    """Best possible scores, if the source knows them; they hold only if no row is dropped."""
    tables: Mapping[Entity, Described] = field(default_factory=dict)
    """What describes items or users where it may be larger than memory, in place of `items` and `users`."""
