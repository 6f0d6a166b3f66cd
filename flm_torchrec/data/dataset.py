"""A prepared data set in memory: interactions by user, features by row (see docs/layout.md)."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import DTypeLike

from flm_torchrec.data.columns import CodedText, EventBlock, new_column
from flm_torchrec.data.disk_columns import Units
from flm_torchrec.data.event_files import as_data_error, check_columns
from flm_torchrec.data.history import NO_CONTEXT, Events
from flm_torchrec.data.load_events import load_events, open_events
from flm_torchrec.data.row_groups import RowGroups
from flm_torchrec.data.schema import Feature, Schema
from flm_torchrec.documents import read_json
from flm_torchrec.errors import DataError
from flm_torchrec.files import sha256
from flm_torchrec.folders import SCHEMA

DOMAIN = "domain"
"""Column of items.parquet of joint data; also the attribute of their items in an export."""
BLOCK_ROWS = 2**20
"""Events of a block, unless one user has more: bounds what is made of events beside their columns."""


def spans(start: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[B] starts and lengths → [sum of lengths] indices: start[0], start[0] + 1, …, then those of start[1], …"""
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(start - before, lengths)


def fingerprint_of(path: Path) -> str:
    """A digest of all that decides what rows mean: schema, keys, features, values behind codes, interactions.

    Every byte is read: two keys that are swapped leave all sizes as they were. A copy in another folder has the same
    digest. `report.json` does not count, nor does any file that is not part of the layout.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    named = [Path(SCHEMA), Path("items.parquet"), Path("users.parquet")]
    found = [*(path / "interactions").glob("*.parquet"), *(path / "vocab").glob("*.parquet")]
    digest = hashlib.sha256()
    for name in sorted([*named, *(file.relative_to(path) for file in found)]):
        try:
            digest.update(f"{name.as_posix()} {sha256(path / name)}\n".encode())
        except OSError as error:
            raise DataError(f"{path / name}: not readable ({error.strerror}); prepare the data again") from error
    return digest.hexdigest()


@dataclass(frozen=True)
class Ragged:
    """Rows of differing length: row *i* is `values[offsets[i]:offsets[i + 1]]`."""

    offsets: np.ndarray  # [rows + 1] int64
    values: np.ndarray  # [offsets[-1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[rows] int64: the number of values of each row."""
        return np.diff(self.offsets)

    def row(self, index: int) -> np.ndarray:
        """The values of one row."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def take(self, rows: np.ndarray) -> Ragged:
        """The rows named, in that order, without a Python loop over them."""
        start = self.offsets[:-1][rows]
        lengths = self.offsets[1:][rows] - start  # `self.lengths` would cost time for every row, of each batch
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return Ragged(offsets, self.values[spans(start, lengths)])

    def only(self, kept: np.ndarray) -> Ragged:
        """The same rows with only some of their values, by [offsets[-1]] bool."""
        before = np.zeros(len(kept) + 1, np.int32 if len(kept) < 2**31 else np.int64)  # there may be many values
        np.cumsum(kept, out=before[1:])
        return Ragged(before[self.offsets].astype(np.int64), self.values[kept])

    def __add__(self, later: Ragged) -> Ragged:
        """These rows, then the later ones."""
        offsets = np.concatenate([self.offsets, later.offsets[1:] + self.offsets[-1]])
        return Ragged(offsets, np.concatenate([self.values, later.values]))


@dataclass(frozen=True)
class EntityFeatures:
    """All features of the users or of the items."""

    sparse: dict[str, Ragged]
    """By feature name: int64 codes, one ragged row per entity (length 0 where unknown)."""
    dense: np.ndarray
    """[rows, F] float32: numeric and dense features side by side in the schema's order, 0 where unknown."""

    def __add__(self, later: EntityFeatures) -> EntityFeatures:
        """These entities, then the later ones, which have the same features."""
        sparse = {name: rows + later.sparse[name] for name, rows in self.sparse.items()}
        return EntityFeatures(sparse, np.concatenate([self.dense, later.dense]))

    def take(self, rows: np.ndarray) -> EntityFeatures:
        """The entities named, in that order."""
        return EntityFeatures({name: ragged.take(rows) for name, ragged in self.sparse.items()}, self.dense[rows])


@dataclass(frozen=True)
class PreparedData:
    """What `flm prepare` wrote: 17 bytes an interaction in these arrays, 4 more with `segment`, 4 with `weight`.

    Large columns are mapped from disk, see `columns.new_column`. With `units` the columns stay on disk altogether: take
    what is needed of each of `blocks`, or of an index; see `disk_columns.DiskColumn`.
    """

    path: Path
    schema: Schema
    offsets: np.ndarray  # [users + 1] int64, into the arrays of interactions
    item: np.ndarray  # [interactions] int32, int64 if there are more than 2^31 items
    timestamp: np.ndarray  # [interactions] int64, seconds, ascending in a user
    event: np.ndarray  # [interactions] unsigned, as narrow as the number of kinds allows
    value: np.ndarray  # [interactions] float32
    segment: CodedText | None  # [interactions]
    items: EntityFeatures
    users: EntityFeatures
    weight: np.ndarray | None = field(default=None, kw_only=True)
    """[interactions] float32: what each counts as a target; None: all count 1."""
    context: np.ndarray = field(default_factory=lambda: NO_CONTEXT, kw_only=True)
    """[interactions, C] int32: codes of the features of events, in the schema's order; -1 where unknown."""
    targets: np.ndarray | None = field(default=None, kw_only=True)
    """[kinds of events] bool: those to predict, by `data.target_events`; None: all."""
    units: Units | None = field(default=None, kw_only=True)
    """Where the columns are read from; None: all interactions are in memory."""

    @property
    def events(self) -> Events:
        """The columns of all interactions, not copied."""
        return Events(self.item, self.timestamp, self.event, self.value, context=self.context)

    def event_users(self) -> np.ndarray:
        """[interactions] int64: the user of each event. Where there may be many events, take `blocks`."""
        return np.repeat(np.arange(self.schema.users), np.diff(self.offsets))

    def blocks(self) -> Iterator[EventBlock]:
        """All events, about BLOCK_ROWS at a time, or as they are read; a user's are in one block."""
        if self.units is not None:
            yield from map(self.units.block, range(len(self.units)))
            return
        rows = int(self.offsets[-1])
        wanted = np.searchsorted(self.offsets, np.arange(BLOCK_ROWS, rows, BLOCK_ROWS))
        ends = np.unique(np.append(wanted, len(self.offsets) - 1))
        for first, last in zip([0, *ends[:-1]], ends, strict=True):
            yield EventBlock(int(first), self.offsets[first : last + 1])

    def column(
        self, dtype: DTypeLike, make: Callable[[EventBlock], np.ndarray], width: tuple[int, ...] = ()
    ) -> np.ndarray:
        """[interactions, *width] made of each block's events: now, or of data on disk when it is asked for."""
        if self.units is not None:
            return self.units.column(dtype, make, width)  # type: ignore[return-value]
        made = new_column(len(self.item) * math.prod(width), dtype).reshape(len(self.item), *width)
        for block in self.blocks():
            made[block.rows] = make(block)
        return made

    @property
    def no_events(self) -> np.ndarray:
        """[interactions] bool: an empty choice of events, in no memory."""
        return np.broadcast_to(np.False_, len(self.item))

    def of_targets(self, mask: np.ndarray) -> np.ndarray:
        """[interactions] bool → those of them that are of a kind to predict."""
        targets = self.targets
        if targets is None:
            return mask
        return self.column(bool, lambda block: mask[block.rows] & targets[self.event[block.rows]])

    def count(self, mask: np.ndarray) -> int:
        """[interactions] bool → how many."""
        return sum(int(np.count_nonzero(mask[block.rows])) for block in self.blocks())

    def user_counts(self, mask: np.ndarray) -> np.ndarray:
        """[interactions] bool → [users] int64: such events of each user."""
        counts = np.zeros(self.schema.users, np.int64)
        for block in self.blocks():
            there = np.concatenate([[0], np.cumsum(mask[block.rows])])
            starts = block.offsets - block.offsets[0]
            counts[block.first : block.first + len(starts) - 1] = np.diff(there[starts])
        return counts

    def users_of(self, mask: np.ndarray) -> np.ndarray:
        """[interactions] bool → [users] bool: users with such an event."""
        return self.user_counts(mask) > 0

    def item_counts(self, mask: np.ndarray) -> np.ndarray:
        """[interactions] bool → [items] int64: such events of each item."""
        counts = np.zeros(self.schema.items, np.int64)
        for block in self.blocks():
            np.add.at(counts, self.item[block.rows][mask[block.rows]], 1)
        return counts

    @cached_property
    def fingerprint(self) -> str:
        """See `fingerprint_of`."""
        return fingerprint_of(self.path)

    def save_vocabulary(self, folder: Path) -> None:
        """Write what the rows of the tables mean: the schema, keys of users and items, values behind codes."""
        folder.mkdir(exist_ok=True)
        shutil.copy(self.path / SCHEMA, folder)
        for entity in ("user", "item"):
            file = f"{entity}s.parquet"
            pq.write_table(_read(self.path / file, [f"{entity}_id", f"{entity}_key"]), folder / file)
        if (self.path / "vocab").is_dir():
            shutil.copytree(self.path / "vocab", folder / "vocab")

    @cached_property
    def user_keys(self) -> list[str]:
        """The key of each user, in order of id."""
        return _keys(self.path / "users.parquet", "user_key")

    def users_named(self, keys: Sequence[str]) -> np.ndarray:
        """[n] int64: the id of each key, -1 where no user has it; the keys of all users are read, as few bytes."""
        file = self.path / "users.parquet"
        stored, wanted = _read(file, ["user_key"])["user_key"], pa.array(keys, pa.string())
        found = pc.index_in(stored.cast(pa.string()), value_set=wanted.unique())
        ids = np.flatnonzero(pc.is_valid(found).to_numpy())
        place = pc.index_in(wanted, value_set=stored.take(pa.array(ids)).combine_chunks().cast(pa.string()))
        return np.append(ids, -1)[place.fill_null(len(ids)).to_numpy()]

    @cached_property
    def item_keys(self) -> list[str]:
        """The key of each item, in order of id."""
        return _keys(self.path / "items.parquet", "item_key")

    @cached_property
    def item_domain(self) -> np.ndarray | None:
        """[items] int16: of a joint data set, the number of each item's domain in `schema.domains`; else None.

        Raises:
            DataError: an item has no domain, or one that the schema does not name.
        """
        return domain_of_items(self.path / "items.parquet", self.schema) if self.schema.domains else None

    @cached_property
    def titles(self) -> list[str]:
        """What people see of each item: the schema's title column, or the item's key where there is no title."""
        if not self.schema.title:
            return self.item_keys
        shown = _keys(self.path / "items.parquet", self.schema.title)
        return [title or key for title, key in zip(shown, self.item_keys, strict=True)]


def load_prepared(
    path: str | Path,
    features: str | Sequence[str] = "all",
    users: np.ndarray | None = None,
    on_disk: bool = False,
) -> PreparedData:
    """Load and check the folder that `flm prepare` wrote.

    Args:
        features: names of the features to keep, or "all" or "none". The schema then has no other features.
        users: [n] ids. Events of other users are not loaded, as if they had none. None: all events are loaded.
        on_disk: leave the events on disk; those that are needed are read when they are.

    Raises:
        DataError: a file is missing or corrupt, lacks a column, or has an id outside the vocabulary.
    """
    path = Path(path)
    schema = Schema.load(path / SCHEMA)
    if features != "all":
        schema = schema.keeping(() if features == "none" else features, path)
    groups, units = RowGroups(path), None
    if on_disk:
        events, units = open_events(groups, schema)
    else:
        events = load_events(groups, schema, users)
    return PreparedData(
        path=path,
        schema=schema,
        **vars(events),
        units=units,
        items=load_entity(path / "items.parquet", schema, "item", schema.items),
        users=load_entity(path / "users.parquet", schema, "user", schema.users),
    )


def domain_of_items(file: Path, schema: Schema) -> np.ndarray:
    """[items] int16: the number in `schema.domains` of what the column `domain` says of each item of a joint data set.

    Raises:
        DataError: the file is missing or corrupt, or an item has no domain that the schema names.
    """
    codes = pc.index_in(_read(file, [DOMAIN])[DOMAIN], value_set=pa.array(schema.domains)).combine_chunks()
    if codes.null_count:
        row = int(np.flatnonzero(codes.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{file}: row {row} has no domain of schema.yaml ({', '.join(schema.domains)}); join anew")
    return codes.to_numpy().astype(np.int16)


def _read(file: Path, columns: list[str]) -> pa.Table:
    if not file.is_file():
        raise DataError(f"{file}: not found; prepare the data again")
    with as_data_error(file):
        check_columns(file, columns, pq.read_schema(file).names)
        return pq.read_table(file, columns=columns)


def _keys(file: Path, column: str) -> list[str]:
    return _read(file, [column])[column].to_pylist()


def load_entity(file: Path, schema: Schema, entity: str, rows: int) -> EntityFeatures:
    """The features of a file of users or items, which must have so many rows.

    Raises:
        DataError: the file is missing or corrupt, lacks a column, or has another number of rows.
    """
    features = [f for f in schema.features if f.entity == entity]
    table = _read(file, [f"{entity}_id"] + [f.column for f in features])
    if len(table) != rows:
        raise DataError(f"{file}: {len(table)} rows, but schema.yaml says {rows}; prepare the data again")
    sparse = {f.name: _codes(table[f.column].combine_chunks(), f, file) for f in features if f.sparse}
    dense = [_numbers(table[f.column].combine_chunks(), f, file) for f in features if not f.sparse]
    matrix = np.concatenate(dense, axis=1) if dense else np.zeros((rows, 0), np.float32)
    return EntityFeatures(sparse, matrix)


def _codes(column: pa.Array, feature: Feature, file: Path) -> Ragged:
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        values = column.flatten().to_numpy(zero_copy_only=False)
    elif pa.types.is_integer(column.type):
        lengths = column.is_valid().to_numpy(zero_copy_only=False)
        values = column.drop_null().to_numpy(zero_copy_only=False)
    else:
        raise DataError(f"{file}: column '{feature.column}' is {column.type}, not int32 or a list of int32")
    if len(values) and (values.min() < 0 or values.max() >= feature.cardinality):
        raise DataError(f"{file}: column '{feature.column}' has a code outside 0 … {feature.cardinality - 1}")
    offsets = np.concatenate([[0], np.cumsum(lengths.astype(np.int64))])
    return Ragged(offsets, values.astype(np.int64))


def _numbers(column: pa.Array, feature: Feature, file: Path) -> np.ndarray:
    if pa.types.is_fixed_size_list(column.type):
        width, flat = column.type.list_size, column.fill_null([0.0] * column.type.list_size).flatten()
    elif pa.types.is_floating(column.type):
        width, flat = 1, column.fill_null(0.0)
    else:
        raise DataError(f"{file}: column '{feature.column}' is {column.type}, not float32 or a list of it")
    if width != feature.width:
        raise DataError(f"{file}: column '{feature.column}' is {width} wide, the schema says {feature.width}")
    numbers = flat.to_numpy(zero_copy_only=False).reshape(-1, width).astype(np.float32)
    if not np.isfinite(numbers).all():
        raise DataError(f"{file}: column '{feature.column}' has NaN or infinity; clean it and prepare again")
    return numbers


def fingerprints_before(folder: Path) -> list[str]:
    """The fingerprints that prepared data had before users were forgotten."""
    if not (folder / "report.json").exists():
        return []
    return list(read_report(folder).get("forgotten", {}).get("fingerprints_before", ()))


def read_report(folder: Path) -> dict[str, Any]:
    """The contents of `report.json` of prepared data.

    Raises:
        DataError: the file is missing, is not readable or is no report.
    """
    file = folder / "report.json"
    try:
        report = read_json(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not readable ({error}); prepare the data again") from error
    if not isinstance(report, dict) or not isinstance(report.get("forgotten", {}), dict):
        raise DataError(f"{file}: not a report of 'flm prepare'; prepare the data again")
    return report
