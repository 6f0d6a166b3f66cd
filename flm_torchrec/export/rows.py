"""Rows of an export on disk: a folder of part files each for items and users, in order of id.

`items.parquet/part-00000.parquet` holds the first `PART_ROWS` items, and so on; with storage "arrow" it is
`items.arrow/part-00000.arrow`, Arrow IPC. Parts do not depend on how many ranks wrote them. Any reader of Parquet
takes the folder for one table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flm_torchrec.errors import RunError
from flm_torchrec.export.manifest import Manifest, Storage
from flm_torchrec.export.vectors import decode
from flm_torchrec.files import sync

Entity = Literal["items", "users"]
ENTITIES: tuple[Entity, ...] = get_args(Entity)

PART_ROWS = 32_768
"""Of one part file: a rank holds one part in memory, 25 MB of items at D = 64."""
ROW_GROUP = 8_192


def part_name(entity: Entity, storage: Storage, part: int) -> str:
    return f"{entity}.{storage}/part-{part:05d}.{storage}"


def write_part(file: Path, table: pa.Table) -> None:
    """Write one part: a dictionary for attributes and seen items, statistics for what is searched for."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # The same rows are to be the same bytes, when read and written again too: pages follow chunks, and Parquet calls
    # the members of a list "element".
    table = table.combine_chunks().cast(pa.schema(map(_field, table.schema), table.schema.metadata))
    if file.suffix == ".arrow":
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=ROW_GROUP)
        sync(file)
        return
    repeated = [f"{field.name}.list.element" for field in table.schema if pa.types.is_list(field.type)]
    single = [field.name for field in table.schema if not pa.types.is_nested(field.type)]
    pq.write_table(table, file, row_group_size=ROW_GROUP, use_dictionary=repeated, write_statistics=single)
    sync(file)  # by the host that wrote it: rank 0 cannot do it for others


def _field(field: pa.Field) -> pa.Field:
    kind = field.type
    if pa.types.is_fixed_size_list(kind):
        return pa.field(field.name, pa.list_(pa.field("element", kind.value_type), kind.list_size))
    if pa.types.is_list(kind):
        return pa.field(field.name, pa.list_(pa.field("element", kind.value_type)))
    return pa.field(field.name, kind)


def read_part(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """One part, or of it the columns named.

    Raises:
        RunError: the file cannot be read, or has no such column.
    """
    try:
        if file.suffix == ".parquet":
            return pq.ParquetFile(file).read(None if columns is None else list(columns))
        with pa.memory_map(str(file)) as mapped:
            table = pa.ipc.open_file(mapped).read_all()
        return table if columns is None else table.select(list(columns))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise RunError(f"{file}: cannot be read ({str(error).splitlines()[0]}); export again") from error


class Rows:
    """The items or the users of an export, read part by part, or whole where columns are few."""

    def __init__(self, folder: Path, manifest: Manifest, entity: Entity) -> None:
        self.storage = manifest.storage
        inside = f"{entity}.{manifest.storage}/"
        self.files = [folder / name for name in sorted(manifest.sha256) if name.startswith(inside)]

    def parts(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        for file in self.files:
            yield read_part(file, columns)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        return pa.concat_tables(self.parts(columns))

    def vectors(self, column: str) -> Iterator[np.ndarray]:
        """[rows of a part, D] float32, part by part, whatever they are stored as."""
        for table in self.parts([column]):
            yield decode(table[column])

    def sample(self, columns: Sequence[str], size: int) -> pa.Table:
        """About `size` rows, evenly from at most 16 parts."""
        chosen = [self.files[i] for i in spread(len(self.files), 16)]
        tables = (read_part(file, columns) for file in chosen)
        share = -(-size // max(1, len(chosen)))
        return pa.concat_tables(t.take(spread(len(t), share)) for t in tables)


def whole(column: pa.ChunkedArray) -> pa.Array:
    """The column in one piece."""
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else combined.chunk(0)


def spread(rows: int, size: int) -> np.ndarray:
    """At most `size` of 0 … rows-1, evenly apart."""
    return np.unique(np.linspace(0, max(0, rows - 1), min(rows, size)).astype(np.int64))
