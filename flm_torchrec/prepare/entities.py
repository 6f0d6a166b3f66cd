"""Users, or items: from the keys that events name to the table with ids and features, out of core.

Keys are counted, sorted and joined with what describes them by an engine's SQL, from Parquet files to Parquet files.
Python reads those in blocks. Nothing here takes memory for each user or item but mapped files, whose pages the system
takes back when it needs them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import polars as pl

from flm_torchrec.data.schema import Entity
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.blocks import blocks, write_blocks
from flm_torchrec.prepare.engine import Engine
from flm_torchrec.prepare.features import EncodedFeature
from flm_torchrec.prepare.key_order import order_sql
from flm_torchrec.prepare.sources.source_data import Described

NUMBERED = "numbered.parquet"
"""File of the view `users` or `items`, in the folder given to `number_keys`."""

Hash = Callable[[pl.Series], pl.Series]
"""Keys → keys that name nobody."""

Features = dict[str, tuple[str, pl.DataType]]
"""By name of a feature: its column in intermediate files, where no name can be in the way, and the type it had."""


def number_keys(engine: Engine, entity: Entity, folder: Path, rows_per_bucket: int, hashed: Hash | None = None) -> int:
    """Number the keys of one side of the view `taken`, in the order of the keys that are shown; returns how many.

    Makes the view `users` or `items`, with columns id, key (in the events), shown (in the output) and bucket.

    Args:
        folder: exists; for files.
        rows_per_bucket: rows of the events that the keys of a bucket have at most, unless one key has more.
        hashed: what makes the shown keys of the keys; None: they are the same.
    """
    counted = f"SELECT {entity}_key AS key, COUNT(*) AS events FROM taken GROUP BY {entity}_key"
    shown = "key"
    if hashed is not None:
        files = engine.save(counted, folder / "counted")
        parts = (part.with_columns(shown=hashed(part["key"])) for part in blocks(files, ("key", "events")))
        write_blocks(parts, folder / "hashed.parquet")
        engine.files("counted", [folder / "hashed.parquet"])
        counted, shown = "SELECT * FROM counted", "shown"
    files = engine.save(
        f"SELECT key, {shown} AS shown, events FROM ({counted}) AS c", folder / "sorted", order_sql(shown)
    )
    rows = write_blocks(_numbered(blocks(files, ("key", "shown", "events")), rows_per_bucket), folder / NUMBERED)
    engine.files(f"{entity}s", [folder / NUMBERED])
    return rows


def _numbered(parts: Iterable[pl.DataFrame], rows_per_bucket: int) -> Iterator[pl.DataFrame]:
    """The parts with id and bucket in place of events."""
    rows = events = 0
    for part in parts:
        begin = events + part["events"].cum_sum() - part["events"]
        yield part.select(
            pl.int_range(rows, rows + pl.len(), dtype=pl.Int64).alias("id"), "key", "shown", begin // rows_per_bucket
        ).rename({"events": "bucket"})
        rows, events = rows + len(part), events + int(part["events"].sum())


@dataclass(frozen=True)
class EntityRows:
    """Users or items that stay, in the order of their ids."""

    engine: Engine
    entity: Entity
    folder: Path
    """For files."""
    files: Sequence[Path]
    """Columns key, old (its number among the keys of the events; null: it is in none) and c0, c1, … for features."""
    features: Features

    def new_ids(self, keys: int) -> np.ndarray:
        """[keys] int64, in a mapped file: the id of each key of the events; -1 where it does not stay."""
        file = self.folder / "new_ids"
        with file.open("wb") as stream:  # else a full disk would end the process once a page is written
            os.posix_fallocate(stream.fileno(), 0, 8 * keys)
        new = np.memmap(file, np.int64, "r+")
        new[:] = -1
        first = 0
        for part in blocks(self.files, ("old",)):
            old = part["old"]
            ids = np.arange(first, first + len(old))
            new[old.drop_nulls().to_numpy()] = ids[old.is_not_null().to_numpy()]
            first += len(old)
        return new

    def column(self, name: str) -> StoredColumn:
        """One feature."""
        return StoredColumn(self, name)

    def parts(self, names: Iterable[str], *more: str) -> Iterator[pl.DataFrame]:
        """Columns of features under their names, and more columns of the files."""
        chosen = {name: self.features[name] for name in names}
        for part in blocks(self.files, (*more, *(column for column, _ in chosen.values()))):
            features = [
                pl.col(column).cast(dtype).alias(f"{_FEATURE}{name}") for name, (column, dtype) in chosen.items()
            ]
            yield part.select(*more, *features)


_FEATURE = "feature_"
"""Before the name of a feature, in a part: no other column of it begins so."""


@dataclass(frozen=True)
class StoredColumn:
    """A feature of all users or items, as `features.Column`."""

    rows: EntityRows
    name: str

    @property
    def dtype(self) -> pl.DataType:
        """See `Column`."""
        return self.rows.features[self.name][1]

    def __iter__(self) -> Iterator[pl.Series]:
        for part in self.rows.parts([self.name]):
            yield part.to_series().rename(self.name)

    def ascending(self, numbers: Callable[[pl.Series], pl.Series]) -> StoredNumbers:
        """See `Column`."""
        rows, (column, _) = self.rows, self.rows.features[self.name]
        file = rows.folder / f"{column}.parquet"
        write_blocks((numbers(part).rename("number").to_frame() for part in self), file)
        rows.engine.files("numbers", [file])
        return StoredNumbers(rows.engine.save("SELECT number FROM numbers", rows.folder / column, "number"))


@dataclass(frozen=True)
class StoredNumbers:
    """Numbers in the order of files; they can be read more than once."""

    files: Sequence[Path]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (part["number"].to_numpy() for part in blocks(self.files, ("number",)))


@dataclass(frozen=True)
class FrameTable:
    """A table in memory, as `Described`."""

    frame: pl.DataFrame
    notes: list[str] = field(default_factory=list)

    def parts(self, folder: Path) -> Iterator[pl.DataFrame]:
        """See `Described`."""
        yield self.frame

    def repeated(self, number: int, key: str) -> str:
        """See `Described`."""
        raise DataError(f"key '{key}' describes two rows; keep one row of it")


def store_described(
    engine: Engine, entity: Entity, folder: Path, described: Described, hashed: Hash | None = None
) -> Features:
    """Make the view `described_users` or `described_items`: columns key and c0, c1, … for features; returns which.

    Args:
        folder: exists; for files.
        hashed: as of `number_keys`.

    Raises:
        DataError: the table cannot be read, or a key occurs twice and must not.
    """
    parts = described.parts(folder)
    first = next(parts)
    features = {name: (f"c{n}", dtype) for n, (name, dtype) in enumerate(first.schema.items()) if name != "key"}

    def stored() -> Iterator[pl.DataFrame]:
        rows = 0
        for part in chain([first], parts):
            shown = part["key"] if hashed is None else hashed(part["key"])
            place = pl.int_range(rows, rows + len(part), dtype=pl.Int64, eager=True)
            columns = (pl.col(name).alias(column) for name, (column, _) in features.items())
            yield part.select(shown.alias("key"), part["key"].alias("given"), place.alias("place"), *columns)
            rows += len(part)

    view = f"described_{entity}s"
    write_blocks(stored(), folder / "described.parquet")
    engine.files(view, [folder / "described.parquet"])
    several = f"SELECT MIN(place) AS place FROM {view} GROUP BY key HAVING COUNT(*) > 1"
    number, place = engine.query(f"SELECT COUNT(*) AS n, MIN(place) AS place FROM ({several}) AS s").row(0)
    if number:
        given = engine.query(f"SELECT given FROM {view} WHERE place = {place}")["given"][0]
        least = {"first": "MIN", "last": "MAX"}[described.repeated(number, given)]
        kept = f"SELECT * FROM {view} WHERE place IN (SELECT {least}(place) FROM {view} GROUP BY key)"
        engine.files(view, engine.save(kept, folder / "described"))
    return features


def join_described(
    engine: Engine, entity: Entity, folder: Path, features: Features, *, keep_unseen: bool, withhold: bool = False
) -> EntityRows:
    """Join the keys that stay, the view `kept_users` or `kept_items`, with what describes them.

    Args:
        folder: exists; for files.
        features: what `store_described` gave; empty: nothing describes them.
        keep_unseen: keys that are described and in no event that stays are kept too.
        withhold: of those, only keys that were in no event at all: why others do not stay may be that few people have
            them.
    """
    seen = f"SELECT shown AS key, id AS old FROM {entity}s WHERE id IN (SELECT id FROM kept_{entity}s)"
    if not features and not keep_unseen:
        return EntityRows(engine, entity, folder, engine.save(seen, folder / "joined", "old"), {})
    join, order = ("FULL JOIN", order_sql("key")) if keep_unseen else ("LEFT JOIN", "old")
    columns = "".join(f", d.{column} AS {column}" for column, _ in features.values())
    gone = f"SELECT 1 FROM {entity}s AS e WHERE e.shown = d.key AND e.id NOT IN (SELECT id FROM kept_{entity}s)"
    described = f"described_{entity}s" + (f" AS d WHERE NOT EXISTS ({gone})" if withhold else "")
    select = (
        f"SELECT COALESCE(s.key, d.key) AS key, s.old AS old{columns} FROM ({seen}) AS s"
        f" {join} (SELECT * FROM {described}) AS d ON s.key = d.key"
    )
    return EntityRows(engine, entity, folder, engine.save(select, folder / "joined", order), features)


@dataclass(frozen=True)
class Written:
    """Counts of the users or items that were written."""

    rows: int
    never_seen: int
    """Without an event."""
    bare: int
    """Without a value of any feature."""


def write_entity(rows: EntityRows, features: Sequence[EncodedFeature], folder: Path) -> Written:
    """Write users.parquet or items.parquet into a folder: id, key, features."""
    counts = {"rows": 0, "never_seen": 0, "bare": 0}

    def coded() -> Iterator[pl.DataFrame]:
        for part in rows.parts([one.feature.name for one in features], "key", "old"):
            ids = pl.int_range(counts["rows"], counts["rows"] + len(part), dtype=pl.Int64, eager=True)
            columns = [ids.alias(f"{rows.entity}_id"), part["key"].rename(f"{rows.entity}_key")]
            bare = np.ones(len(part), bool)
            for one in features:
                given = part[f"{_FEATURE}{one.feature.name}"].rename(one.feature.name)
                *text, codes = one.encode(given)
                columns += [*text, codes.rename(one.feature.column)]
                bare &= ~_has_value(given)
            counts["rows"] += len(part)
            counts["never_seen"] += part["old"].null_count()
            counts["bare"] += int(bare.sum())
            yield pl.DataFrame(columns)

    write_blocks(coded(), folder / f"{rows.entity}s.parquet")
    return Written(**counts)


def _has_value(column: pl.Series) -> np.ndarray:
    """[rows] bool: neither null nor an empty list or text."""
    has = column.is_not_null()
    if isinstance(column.dtype, pl.List):
        has &= column.list.len().fill_null(0) > 0
    elif column.dtype == pl.String:
        has &= (column != "").fill_null(False)
    return has.to_numpy()
