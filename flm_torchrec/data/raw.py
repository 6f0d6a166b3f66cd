"""What every source yields, before anything is cleaned or encoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import polars as pl

from flm_torchrec.data.schema import Entity, Kind


@dataclass(frozen=True)
class Declared:
    """A feature column of the items or users of a source."""

    name: str
    entity: Entity
    kind: Kind


@dataclass(frozen=True)
class Raw:
    """A source, read.

    `interactions` has columns file (str), row (int, from 1), user, item (str), timestamp (int64 s), event (str),
    value (float64) and perhaps segment (str); null where a row has none or it cannot be read.
    `items` and `users` have a column key (str) and one a declared feature.
    """

    name: str
    source: str
    interactions: pl.DataFrame
    items: pl.DataFrame | None = None
    users: pl.DataFrame | None = None
    features: tuple[Declared, ...] = ()
    title: str = ""
    timestamps: bool = True
    notes: dict[str, Any] = field(default_factory=dict)
    """Goes into report.json as it is."""
    oracle: dict[str, dict[str, float]] | None = None
    """Best possible scores, where the source knows them; they hold only while no row is dropped."""
