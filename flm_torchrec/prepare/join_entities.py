"""Users and items of several prepared data sets → one table each, out of core.

Keys of users are sorted and joined by SQL, from Parquet files to Parquet files, as `flm prepare` does it; Python reads
those in blocks. In memory are 8 bytes for each user of a domain, mapped from a file where there are many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from flm_torchrec.data.columns import new_column
from flm_torchrec.data.dataset import DOMAIN
from flm_torchrec.data.keys import TOMBSTONE
from flm_torchrec.data.schema import Entity, Feature
from flm_torchrec.prepare.blocks import blocks, write_blocks
from flm_torchrec.prepare.engine import Engine
from flm_torchrec.prepare.features import divisor
from flm_torchrec.prepare.join_features import Domain, JointFeature
from flm_torchrec.prepare.key_order import order_sql

FORGOTTEN = "\0"
"""Before the key of a forgotten user while domains are joined; no key begins so."""
RAW = "raw.parquet"
"""Users or items as the domains have them, with numbers as they were before they were standardised."""


@dataclass(frozen=True)
class JointUsers:
    """Who the users of the joint data are."""

    count: int
    shared: int
    """Users whom two domains or more have."""
    ids: list[np.ndarray]
    """By domain, [own users] int64: the id of each in the joint data."""


def join_users(engine: Engine, domains: Sequence[Domain], features: Sequence[JointFeature], folder: Path) -> JointUsers:
    """Write the users of all domains, in the order of their keys, to `folder / RAW`.

    Of two values of a feature the first domain's counts.

    Args:
        features: those of users.
        folder: exists; for files.

    Raises:
        DataError: a file of a domain is missing or broken.
    """
    columns: dict[str, tuple[str, pl.DataType]] = {}
    for number, domain in enumerate(domains):
        write_blocks(_own_users(domain, features, columns), folder / f"own-{number}.parquet")
        engine.files(f"own_{number}", [folder / f"own-{number}.parquet"])
    every = " UNION ALL ".join(f"SELECT key FROM own_{number}" for number in range(len(domains)))
    counted = f"SELECT key, COUNT(*) AS domains FROM ({every}) AS e GROUP BY key"
    keys = engine.save(counted, folder / "keys", order_sql("key"))
    shared = sum(int((part["domains"] > 1).sum()) for part in blocks(keys, ("domains",)))
    count = write_blocks(_numbered(blocks(keys, ("key",))), folder / "joint.parquet")
    engine.files("joint", [folder / "joint.parquet"])
    ids = [_ids(engine, number, domain, folder / f"ids-{number}") for number, domain in enumerate(domains)]
    values = [
        f"COALESCE({', '.join(f'o{number}.{column}' for number in range(len(domains)))}) AS {column}"
        for column, _ in columns.values()
    ]
    joins = "".join(f" LEFT JOIN own_{n} AS o{n} ON j.key = o{n}.key" for n in range(len(domains)))
    select = f"SELECT {', '.join(['j.id AS id', 'j.key AS key', *values])} FROM joint AS j{joins}"
    files = engine.save(select, folder / "joined", "id")
    write_blocks(_users(files, columns, features), folder / RAW)
    return JointUsers(count, shared, ids)


def _own_users(
    domain: Domain, features: Sequence[JointFeature], columns: dict[str, tuple[str, pl.DataType]]
) -> Iterator[pl.DataFrame]:
    """A domain's users in order: `key`, `old` for their ids there, and the features.

    One who was forgotten names nobody, and is a user of this domain alone.

    Args:
        columns: gets, by column of a feature, its name in the parts and its type.
    """
    readers = [joint.reader(domain) for joint in features]
    gone = pl.col("user_key") == pl.lit(TOMBSTONE) + pl.col("user_id").cast(pl.String)
    key = pl.when(gone).then(pl.lit(f"{FORGOTTEN}{domain.name}/") + pl.col("user_key")).otherwise("user_key")
    for part in domain.parts("user"):
        given = [_known(column) for read in readers for column in read(part)]
        for column in given:
            columns.setdefault(column.name, (f"c{len(columns)}", column.dtype))
        own = part.select(key.alias("key"), pl.col("user_id").cast(pl.Int64).alias("old"))
        yield own.hstack([column.rename(columns[column.name][0]) for column in given])


def _numbered(keys: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    rows = 0
    for part in keys:
        yield part.select(pl.int_range(rows, rows + pl.len(), dtype=pl.Int64).alias("id"), "key")
        rows += len(part)


def _known(column: pl.Series) -> pl.Series:
    """An empty list is no value."""
    return column.set(column.list.len() == 0, None) if isinstance(column.dtype, pl.List) else column


def _ids(engine: Engine, number: int, domain: Domain, folder: Path) -> np.ndarray:
    """[own users] int64: the id of each in the joint data."""
    ids, done = new_column(domain.schema.users, np.int64), 0
    select = f"SELECT o.old AS old, j.id AS id FROM own_{number} AS o JOIN joint AS j ON o.key = j.key"
    for part in blocks(engine.save(select, folder, "old"), ("id",)):
        ids[done : done + len(part)] = part["id"].to_numpy()
        done += len(part)
    return ids


def _users(
    files: Sequence[Path], columns: dict[str, tuple[str, pl.DataType]], features: Sequence[JointFeature]
) -> Iterator[pl.DataFrame]:
    named = [pl.col(short).cast(dtype).alias(name) for name, (short, dtype) in columns.items()]
    forgotten = pl.col("key").str.starts_with(FORGOTTEN)
    nobody = pl.lit(TOMBSTONE) + pl.col("id").cast(pl.String)
    key = pl.when(forgotten).then(nobody).otherwise("key").alias("user_key")
    for part in blocks(files, ("id", "key", *(short for short, _ in columns.values()))):
        yield _complete(part.select(pl.col("id").alias("user_id"), key, *named), features)


def join_items(domains: Sequence[Domain], features: Sequence[JointFeature], title: str, folder: Path) -> int:
    """Write the items of each domain, one after the other, to `folder / RAW`; returns how many.

    A key has the name of its domain before it.

    Args:
        features: those of items.
        title: column for what people see; empty: none.

    Raises:
        DataError: a file of a domain is missing or broken.
    """
    return write_blocks(_items(domains, features, title), folder / RAW)


def _items(domains: Sequence[Domain], features: Sequence[JointFeature], title: str) -> Iterator[pl.DataFrame]:
    rows = 0
    for domain in domains:
        readers = [joint.reader(domain) for joint in features]
        for part in domain.parts("item"):
            columns = [
                pl.int_range(rows, rows + len(part), dtype=pl.Int64, eager=True).alias("item_id"),
                pl.Series("item_key", domain.name + "/" + part["item_key"]),
                pl.Series(DOMAIN, [domain.name] * len(part)),
                *(column for read in readers for column in read(part)),
            ]
            if title and title not in (column.name for column in columns):
                columns.append(_title(domain, part).rename(title))
            yield _complete(pl.DataFrame(columns), features)
            rows += len(part)


def _title(domain: Domain, rows: pl.DataFrame) -> pl.Series:
    if not domain.schema.title:
        return pl.Series([None] * len(rows), dtype=pl.String)
    return rows[domain.schema.title].cast(pl.String)


def _complete(rows: pl.DataFrame, features: Sequence[JointFeature]) -> pl.DataFrame:
    """With an empty list where a list is not known, and an empty text where a text is not."""
    for joint in features:
        column = joint.feature.column
        if isinstance(rows[column].dtype, pl.List):
            rows = rows.with_columns(pl.col(column).fill_null([]))
        if joint.feature.kind == "text":
            rows = rows.with_columns(pl.col(joint.feature.name).fill_null(""))
    return rows


def write_standardised(
    entity: Entity, features: Sequence[JointFeature], work: Path, folder: Path
) -> dict[tuple[Entity, str], Feature]:
    """`work / RAW` → users.parquet or items.parquet in a folder, with numbers standardised over all rows.

    Returns the features, by entity and name, with mean and deviation.
    """

    file, made = work / RAW, dict[tuple[Entity, str], Feature]()
    for feature in (joint.feature for joint in features):
        if feature.kind == "numeric":
            mean, deviation = _moments(file, feature.column)
            feature = replace(feature, mean=mean, deviation=deviation)
        made[entity, feature.name] = feature
    scaled = [
        ((pl.col(f.column) - f.mean) / f.deviation).cast(pl.Float32) for f in made.values() if f.kind == "numeric"
    ]
    parts = blocks([file], list(pl.read_parquet_schema(file)))
    write_blocks((part.with_columns(scaled) for part in parts), folder / f"{entity}s.parquet")
    return made


def _moments(file: Path, column: str) -> tuple[float, float]:
    """Mean and `divisor` of a column of numbers, nulls left out; 0 and 1 where there are none."""

    def total(of: Callable[[pl.Series], float]) -> float:
        return sum(of(part[column]) for part in blocks([file], (column,)))

    count = total(lambda part: len(part) - part.null_count())
    mean = total(lambda part: float(part.sum())) / max(1, count)
    squares = total(lambda part: float(((part - mean) ** 2).sum()))
    return mean, divisor(mean, math.sqrt(squares / max(1, count - 1)))
