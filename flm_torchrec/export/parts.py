"""Rows of an export on disk: a folder of part files each for items and users, in order of id.

`items.parquet/part-00000.parquet` holds the first `PART_ROWS` items, and so on. With storage "arrow" the file is
`items.arrow/part-00000.arrow`, Arrow IPC. Parts are the same at any number of ranks. Any reader of Parquet reads the
folder as one table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.data.keys import are_tombstones
from flm_torchrec.errors import RunError
from flm_torchrec.export.manifest import Manifest, Storage
from flm_torchrec.export.vectors import decode, stored_type
from flm_torchrec.files import sync
from flm_torchrec.safe_text import first_line, visible

Entity = Literal["items", "users"]
ENTITIES: tuple[Entity, ...] = get_args(Entity)
VIEWS = ("embedding", "content", "id")
"""Columns of an item's vectors."""
ATTRIBUTE = "attr_"
"""Prefix of a feature's name: the column of the feature's values."""

PART_ROWS = 32_768
"""Rows of a part file. A rank has one part in memory, 25 MB of items at D = 64."""
ROW_GROUP = 8_192


def part_name(entity: Entity, storage: Storage, part: int) -> str:
    """The file of a part, relative to the export."""
    return f"{entity}.{storage}/part-{part:05d}.{storage}"


def write_part(file: Path, table: pa.Table) -> None:
    """Write one part and flush it to the disk. Keys and ids have statistics; attributes and seen items a dictionary."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # The same rows must give the same bytes, also after they are read and written again. Pages follow chunks, and
    # Parquet calls the members of a list "element".
    table = table.combine_chunks().cast(pa.schema(map(_field, table.schema), table.schema.metadata))
    if file.suffix == ".arrow":
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=ROW_GROUP)
        sync(file)
        return
    repeated = [f"{field.name}.list.element" for field in table.schema if pa.types.is_list(field.type)]
    single = [field.name for field in table.schema if not pa.types.is_nested(field.type)]
    pq.write_table(table, file, row_group_size=ROW_GROUP, use_dictionary=repeated, write_statistics=single)
    sync(file)  # on the host that wrote the file: rank 0 cannot do this for other hosts


def _field(field: pa.Field) -> pa.Field:
    kind = field.type
    if pa.types.is_fixed_size_list(kind):
        return pa.field(field.name, pa.list_(pa.field("element", kind.value_type), kind.list_size))
    if pa.types.is_list(kind):
        return pa.field(field.name, pa.list_(pa.field("element", kind.value_type)))
    return pa.field(field.name, kind)


def read_part(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """One part, or the named columns of it.

    Raises:
        RunError: the file cannot be read, has no such column, or holds text that is not UTF-8.
    """
    try:
        if file.suffix == ".parquet":
            with pq.ParquetFile(file) as opened:
                _find(file, columns, opened.schema_arrow)
                table = opened.read(None if columns is None else list(columns))
        else:
            with pa.memory_map(str(file)) as mapped:
                table = pa.ipc.open_file(mapped).read_all()
            _find(file, columns, table.schema)
            table = table if columns is None else table.select(list(columns))
        table.validate(full=True)
        return table
    except (pa.ArrowException, OSError, KeyError, MemoryError) as error:
        raise RunError(f"{file}: cannot be read ({visible(first_line(error))}); export again") from error


def _find(file: Path, columns: Sequence[str] | None, schema: pa.Schema) -> None:
    for name in columns or ():
        if len(schema.get_all_field_indices(name)) != 1:
            raise RunError(f"{file}: has no column '{name}', or has it twice; export again")


class ExportRows:
    """The items or the users of an export, read part by part; a few columns also as one table.

    Everything read is checked against the manifest: types and widths of columns, ids, and that vectors are finite.

    Args:
        complete: False for a delta, which has only some of the parts, and in these only some of the rows.

    Raises:
        RunError: the parts are not those of the manifest. Each method raises this too.
    """

    def __init__(self, folder: Path, manifest: Manifest, entity: Entity, complete: bool = True) -> None:
        self.manifest = manifest
        self.entity = entity
        self.complete = complete
        self.dim = manifest.dim
        self.storage = manifest.storage
        self.count = manifest.items if entity == "items" else manifest.users
        inside = f"{entity}.{manifest.storage}/"
        listed = sorted(name for name in manifest.sha256 if name.startswith(inside))
        parts = -(-self.count // manifest.part_rows)
        if complete and len(listed) != parts:
            raise RunError(f"{folder}: {len(listed)} parts of {entity}, {parts} in the manifest; export again")
        # The names are listed only up to a limit: a false count in a manifest must not fill the memory.
        listable = complete or parts < 10**6
        possible = {part_name(entity, manifest.storage, part) for part in range(parts)} if listable else set()
        for name in listed:
            if name not in possible:
                raise RunError(f"{folder / name}: is no part of {self.count} {entity}; export again")
        self.files = [folder / name for name in listed]

    def part(self, file: Path, columns: Sequence[str] | None = None) -> pa.Table:
        """One of `files`, or the named columns of it."""
        table = read_part(file, columns)
        start = int(file.stem.removeprefix("part-")) * self.manifest.part_rows
        rows = min(self.manifest.part_rows, self.count - start)
        if len(table) != rows if self.complete else len(table) > rows:
            raise RunError(f"{file}: has {len(table)} rows, not {rows}; export again")
        for name in table.column_names:
            _check_column(file, table[name], name, self._type(name))
        if f"{self.entity[:-1]}_id" in table.column_names:
            self._check_ids(file, table[f"{self.entity[:-1]}_id"].to_numpy(), start, rows)
        if "seen" in table.column_names:
            seen = single_array(table["seen"]).flatten().to_numpy(zero_copy_only=False)
            if len(seen) and not 0 <= seen.min() <= seen.max() < self.manifest.items:
                raise RunError(f"{file}: column 'seen' names items that are not there; export again")
        return table

    def only(self, parts: Sequence[int]) -> ExportRows:
        """The rows of some of `files` alone."""
        some = copy(self)
        some.files = [self.files[part] for part in parts]
        return some

    def parts(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """All parts in order of id, or the named columns of them."""
        for file in self.files:
            yield self.part(file, columns)

    def known(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """As `parts`, without the rows of users who were forgotten: these are there only so that no id shifts."""
        if self.entity == "items":
            yield from self.parts(columns)
            return
        for part in self.parts(list(dict.fromkeys(("user_id", "user_key", *columns)))):
            gone = are_tombstones(part["user_key"], part["user_id"])
            yield part.filter(pc.invert(gone)).select(list(columns))

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows in memory, or the named columns of them."""
        return pa.concat_tables(self.parts(columns))

    def column_names(self) -> list[str]:
        """Names of the columns, by the first part."""
        return self.part(self.files[0]).column_names

    def vectors(self, column: str) -> Iterator[np.ndarray]:
        """A vector column, [rows of a part, D] float32 part by part, however it is stored."""
        for table in self.parts([column]):
            yield decode(table[column])

    def sample(self, columns: Sequence[str], size: int) -> pa.Table:
        """About `size` rows, spread evenly over at most 16 parts."""
        chosen = [self.files[i] for i in spread(len(self.files), 16)]
        tables = (self.part(file, columns) for file in chosen)
        share = -(-size // max(1, len(chosen)))
        return pa.concat_tables(t.take(spread(len(t), share)) for t in tables)

    def _type(self, name: str) -> pa.DataType | None:
        if name in (REPRESENTATIONS if self.entity == "users" else VIEWS):
            return stored_type(self.manifest.quantise, self.dim)
        text, lists = pa.string(), pa.list_(pa.field("element", pa.string()))
        if name.startswith(ATTRIBUTE):
            return lists
        types = {
            f"{self.entity[:-1]}_id": pa.int64(),
            f"{self.entity[:-1]}_key": text,
            "title": text,
            "known": pa.bool_(),
            "seen": pa.list_(pa.field("element", pa.int32())),
        }
        return types.get(name)

    def _check_ids(self, file: Path, ids: np.ndarray, start: int, rows: int) -> None:
        right = (np.diff(ids) > 0).all() and (len(ids) == 0 or (ids[0] >= start and ids[-1] < start + rows))
        if not right:
            raise RunError(f"{file}: ids are not those of rows {start} to {start + rows - 1}; export again")


def _check_column(file: Path, column: pa.ChunkedArray, name: str, kind: pa.DataType | None) -> None:
    """Raise RunError where a column is of another type, has nulls, or a vector has NaN or infinity."""
    stored = column.type
    if kind is not None and stored != kind:
        raise RunError(f"{file}: column '{visible(name)}' is {stored}, not {kind}; export again")
    if column.null_count and not name.startswith(ATTRIBUTE):
        raise RunError(f"{file}: column '{visible(name)}' has nulls; export again")
    if pa.types.is_fixed_size_list(stored) and not np.isfinite(decode(column)).all():
        raise RunError(f"{file}: column '{visible(name)}' has NaN or infinity; export again")


def single_array(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array: its only chunk, which is not copied, or its chunks combined."""
    if column.num_chunks == 1:
        return column.chunk(0)
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else combined.chunk(0)


def spread(rows: int, size: int) -> np.ndarray:
    """At most `size` of the numbers 0 … rows - 1, evenly spaced."""
    return np.unique(np.linspace(0, max(0, rows - 1), min(rows, size)).astype(np.int64))
