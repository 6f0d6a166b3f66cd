"""Delta and Iceberg tables, as shards: the data files of one version, a shard each.

Their libraries read the log or the metadata, which say what files and rows the table has; Arrow reads the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads

from flm_torchrec.errors import DataError
from flm_torchrec.prepare.clean import Dropped
from flm_torchrec.prepare.sources.columns import find_all
from flm_torchrec.prepare.sources.input_files import METADATA, InputFile, metadata_files, short_names, system_of
from flm_torchrec.prepare.sources.shards import ROWS, FileShard, ToRoles, column_of, paths_of
from flm_torchrec.safe_text import first_line, redact_address

CATALOG = "catalog://"
"""Begins the name of an Iceberg table in a catalog: catalog://CATALOG/NAMESPACE.TABLE."""
WRITE_A_COPY = "check the address, or write a copy as Parquet and read that"
SHOWN = 5
"""Snapshots that an error lists."""


@dataclass(frozen=True)
class DataFile:
    """A data file of a table."""

    path: str
    read: Callable[[list[str]], Iterator[pa.RecordBatch]]
    """Names of columns → their rows that are not deleted, as the table's schema has them. Can be pickled."""


@dataclass(frozen=True)
class OpenTable:
    """One version of a table."""

    schema: pa.Schema
    files: list[DataFile]
    version: int | None
    """None: an Iceberg table to which nothing was ever written."""


@dataclass(frozen=True)
class LakehouseShard(FileShard):
    """A data file of a table; the rows that are not deleted are numbered from 1."""

    schema: pa.Schema
    data: DataFile
    location: str

    def batches(self, dropped: Dropped) -> Iterator[pl.DataFrame]:
        """See `Shard`.

        Raises:
            DataError: the file cannot be read, or a column is missing or of a type that cannot be its role's.
        """
        wanted = find_all(self.columns, paths_of(self.schema), self.file.url, dropped.note)
        columns = list(dict.fromkeys(column_of(self.schema.names, path) for path in wanted.values()))
        yield from self._numbered(self._read(columns), wanted)

    def _read(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        with _one_line(self.location, f"its file {self.name} cannot be read"):
            yield from self.data.read(columns)


def shards(
    source: str, location: str, version: int | None, columns: tuple[str, ...], to_roles: Callable[[InputFile], ToRoles]
) -> list[LakehouseShard]:
    """The data files of a table, by their paths.

    Args:
        source: delta or iceberg.
        location: folder or address of the table; of Iceberg also a metadata file, or a name in a catalog.
        version: of a Delta table, or id of an Iceberg snapshot; None: the newest.

    Raises:
        DataError: the library is missing, there is no such table or version, or the library does not read this kind.
    """
    shown = redact_address(location)
    table = _OPEN[source](location, shown, version)
    if not table.files:
        raise DataError(f"{shown}: has no rows; give a table with data")
    found = []
    files = sorted(table.files, key=lambda file: file.path)
    for data, name in zip(files, short_names([file.path for file in files]), strict=True):
        # The files of a table are never changed, but a later version may delete rows of them.
        file = InputFile(shown, name, f"{location} {table.version} {data.path}")
        found.append(LakehouseShard(file, columns, to_roles(file), table.schema, data, location))
    return found


def _delta(location: str, shown: str, version: int | None) -> OpenTable:
    try:
        from deltalake import DeltaTable
    except ImportError as error:
        raise DataError("--source delta: needs deltalake; pip install 'flm_torchrec[delta]'") from error
    with _one_line(location, "not a readable Delta table"):
        table = DeltaTable(location if "://" in location else Path(location).absolute())
        newest = table.version()
        if version is not None and version > newest:
            raise DataError(f"{shown}: has no version {version}; the newest is {newest}")
        if version is not None:
            table.load_as_version(version)
        if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
            # Of tables of reader version 2, the library would read the columns as empty.
            raise DataError(
                f"{shown}: renames its columns (columnMapping), which deltalake does not read; {WRITE_A_COPY}"
            )
        dataset = table.to_pyarrow_dataset()
    files = [
        DataFile(fragment.path, partial(_fragment_rows, fragment, dataset.schema))
        for fragment in dataset.get_fragments()
    ]
    return OpenTable(dataset.schema, files, table.version())


def _fragment_rows(fragment: pads.Fragment, schema: pa.Schema, columns: list[str]) -> Iterator[pa.RecordBatch]:
    return fragment.to_batches(schema=schema, columns=columns, batch_size=ROWS)


def _iceberg(location: str, shown: str, snapshot: int | None) -> OpenTable:
    try:
        from pyiceberg.catalog import load_catalog
        from pyiceberg.io.pyarrow import schema_to_pyarrow
        from pyiceberg.table import StaticTable
    except ImportError as error:
        raise DataError("--source iceberg: needs pyiceberg; pip install 'flm_torchrec[iceberg]'") from error
    with _one_line(location, "not a readable Iceberg table"):
        if location.startswith(CATALOG):
            catalog, _, name = location.removeprefix(CATALOG).partition("/")
            table = load_catalog(catalog).load_table(name)
        else:
            table = StaticTable.from_metadata(_metadata_file(location, shown))
        chosen = table.current_snapshot() if snapshot is None else table.snapshot_by_id(snapshot)
        if chosen is None and snapshot is not None:
            ids = [str(s.snapshot_id) for s in table.metadata.snapshots[-SHOWN:]]
            raise DataError(f"{shown}: has no snapshot {snapshot}; the newest are {', '.join(ids) or 'none'}")
        scan = table.scan(snapshot_id=snapshot)
        schema = scan.projection()
        read = partial(_task_rows, table.metadata, table.io, schema)
        files = [DataFile(task.file.file_path, partial(read, task)) for task in scan.plan_files()]
    return OpenTable(schema_to_pyarrow(schema, include_field_ids=False), files, chosen.snapshot_id if chosen else None)


def _task_rows(metadata: Any, io: Any, schema: Any, task: Any, columns: list[str]) -> Iterator[pa.RecordBatch]:
    from pyiceberg.expressions import AlwaysTrue
    from pyiceberg.io.pyarrow import ArrowScan

    return ArrowScan(metadata, io, schema.select(*columns), AlwaysTrue()).to_record_batches([task])


def _metadata_file(location: str, shown: str) -> str:
    """What pyiceberg takes for a table: its metadata file, or its folder if a hint there names the newest one.

    Raises:
        DataError: none is there, or two have the highest number, so that only the catalog knows which is the newest.
    """
    if location.endswith(METADATA):
        return location
    system, folder = system_of(location)
    if system.isfile(f"{folder}/metadata/version-hint.text"):
        return location
    numbered = {name: int(found[1]) for name in metadata_files(system, folder) if (found := re.match(r"v?(\d+)", name))}
    newest = [name for name, number in numbered.items() if number == max(numbered.values())]
    if not newest:
        raise DataError(f"{shown}: not an Iceberg table (no metadata/*{METADATA}); give the folder of one")
    if len(newest) > 1:
        raise DataError(f"{shown}: {' and '.join(sorted(newest)[:2])} may be the newest; give the file itself")
    return f"{location.rstrip('/')}/metadata/{newest[0]}"


_OPEN: dict[str, Callable[[str, str, int | None], OpenTable]] = {"delta": _delta, "iceberg": _iceberg}


@contextmanager
def _one_line(location: str, problem: str) -> Iterator[None]:
    """Turn what the libraries raise into one line; they have no base class for it."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        reason = first_line(error, location)
        raise DataError(f"{redact_address(location)}: {problem} ({reason}); {WRITE_A_COPY}") from error
