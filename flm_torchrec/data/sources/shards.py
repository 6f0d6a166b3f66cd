"""Files of logs, local or at any address that fsspec knows, as shards that are read batch by batch."""

from __future__ import annotations

import glob
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import duckdb
import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from flm_torchrec.data import lines, sql
from flm_torchrec.data.clean import Dropped
from flm_torchrec.errors import DataError
from flm_torchrec.messages import first_line, redact_address
from flm_torchrec.names import nearest

ENDINGS = {"parquet": (".parquet",), "csv": (".csv", ".csv.gz"), "jsonl": (".jsonl", ".jsonl.gz", ".ndjson")}
ROWS = 500_000
"""Of a Parquet file, decoded at once."""

Roles = Callable[[pl.DataFrame], pl.DataFrame]
"""Columns of a file → columns of `Raw.interactions` but for file and row."""


@dataclass(frozen=True)
class Place:
    """Where a file is."""

    url: str
    name: str
    identity: str

    def open(self) -> IO[bytes]:
        if "://" not in self.url:  # a path, whatever fsspec would make of its characters
            return LocalFileSystem().open(self.url, "rb", compression="infer")
        return fsspec.open(self.url, "rb", compression="infer").open()

    @contextmanager
    def text(self) -> Iterator[IO[bytes]]:
        """As `open`, for text, which may be packed.

        Raises:
            DataError: cut off, not packed as its name says, or out of reach.
        """
        try:
            with self.open() as stream:
                yield stream
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{self.url}: cannot be read to its end ({first_line(error)}); write it again") from error


def places(source: str, location: str) -> list[Place]:
    """A file, all files of a folder with an ending of the source, or all that a pattern matches, by name.

    Raises:
        DataError: none is there, one is empty, or the address cannot be reached.
    """
    try:
        if "://" in location:
            system, path = fsspec.core.url_to_fs(location)
        else:
            system, path = LocalFileSystem(), str(Path(location).absolute())
        found = _listed(system, path, ENDINGS[source])
        stated = [(name, system.info(name)) for name in found]
    except (OSError, ImportError, ValueError) as error:
        shown = redact_address(location)
        raise DataError(f"{shown}: cannot be reached ({first_line(error, location)}); check the address") from error
    if not found:
        kinds = " or ".join(f"*{ending}" for ending in ENDINGS[source])
        what, shown = f"no file {kinds}" if system.isdir(path) else "not found", redact_address(location)
        raise DataError(f"{shown}: {what}; --input must be a file {kinds}, a folder of them or a pattern")
    made = []
    for name, info in stated:
        url = system.unstrip_protocol(name) if "://" in location else name
        if info.get("size") == 0:
            raise DataError(f"{url}: is empty; give a file with data")
        changed = info.get("mtime") or info.get("LastModified") or info.get("updated") or info.get("ETag")
        made.append(Place(url, PurePosixPath(redact_address(name)).name, f"{url} {info.get('size')} {changed}"))
    return made


def _listed(system: Any, path: str, endings: tuple[str, ...]) -> list[str]:
    if system.isfile(path):
        return [path]
    if system.isdir(path):
        return sorted(name for name in system.ls(path, detail=False) if name.endswith(endings))
    return sorted(name for name in system.glob(_pattern(system, path)) if system.isfile(name))


def _pattern(system: Any, path: str) -> str:
    """The path as a pattern, in which a folder that is there under that very name stands for itself alone."""
    folder = PurePosixPath(path).parent
    while glob.escape(str(folder)) != str(folder) and not system.isdir(str(folder)):
        folder = folder.parent
    return glob.escape(str(folder)) + path.removeprefix(str(folder)) if str(folder) != "." else path


def _wanted(columns: tuple[str, ...], present: list[str], url: str) -> list[str]:
    for column in columns:
        if column not in present:
            raise DataError(f"{url}: no column '{column}'; {nearest(column, present)}")
    return list(dict.fromkeys(columns))


@dataclass(frozen=True)
class _File:
    place: Place
    columns: tuple[str, ...]
    """The only ones that are ever read."""
    roles: Roles

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def identity(self) -> str:
        return self.place.identity

    def _rows(self, table: pa.Table, rows: np.ndarray) -> pl.DataFrame:
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame)
        return self.roles(frame).with_columns(pl.lit(self.name).alias("file"), pl.Series("row", rows, dtype=pl.Int64))

    def _drop(self, dropped: Dropped, before: int) -> Callable[[np.ndarray, str], None]:
        def drop(numbers: np.ndarray, reason: str) -> None:
            dropped.add(reason, len(numbers), (f"{self.name}: row {n - before}" for n in numbers.tolist()))

        return drop


class ParquetShard(_File):
    """Rows are numbered from 1."""

    def batches(self, dropped: Dropped) -> Iterator[pl.DataFrame]:
        """See `Shard`.

        Raises:
            DataError: corrupt, or a column is missing or of a type that cannot be its role's.
        """
        row = 1
        try:
            with self.place.open() as stream, pq.ParquetFile(stream) as file:
                wanted = _wanted(self.columns, file.schema_arrow.names, self.place.url)
                if file.metadata.num_rows == 0:
                    raise DataError(f"{self.place.url}: has no rows; give a file with data")
                for batch in file.iter_batches(ROWS, columns=wanted):
                    yield self._rows(pa.Table.from_batches([batch]), np.arange(row, row + len(batch)))
                    row += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self.place.url}: not a readable Parquet file ({first_line(error)}); write it again"
            ) from error


@dataclass(frozen=True)
class CsvShard(_File):
    """A line a row, after the header; rows are numbered from 1, the header not counted."""

    separator: str

    def batches(self, dropped: Dropped) -> Iterator[pl.DataFrame]:
        """See `Shard`.

        Raises:
            DataError: no header, no rows, or a column is missing.
        """
        url, drop = self.place.url, self._drop(dropped, 1)
        names: list[str] | None = None
        some = False
        with self.place.text() as stream:
            for block in lines.blocks(stream, lambda n: drop(np.array([n]), "malformed: a line of over 64 MiB")):
                if names is None:
                    names = self._header(block.line(0))
                    wanted = _wanted(self.columns, names, url)
                    block = block.keep(np.arange(len(block.numbers)) > 0)
                some = some or len(block.numbers) > 0
                block = lines.readable(block, drop, quoted=True)
                if len(block.numbers):
                    yield self._rows(*self._parsed(block, names, wanted, drop))
        if not some:
            raise DataError(f"{url}: has no rows; give a file with data")

    def _header(self, line: bytes) -> list[str]:
        try:
            text = line.decode("utf-8-sig")
            options = pacsv.ParseOptions(delimiter=self.separator)
            names = pacsv.read_csv(io.BytesIO(text.encode() + b"\n"), parse_options=options).column_names
        except (pa.ArrowException, UnicodeDecodeError, ValueError, TypeError) as error:
            raise DataError(
                f"{self.place.url}: not a readable table ({first_line(error)}); give the right separator and encoding"
            ) from error
        twice = [name for name in self.columns if names.count(name) > 1]
        if twice:
            raise DataError(f"{self.place.url}: two columns are named '{twice[0]}'; rename one")
        return names

    def _parsed(
        self, block: lines.Block, names: list[str], wanted: list[str], drop: Callable[[np.ndarray, str], None]
    ) -> tuple[pa.Table, np.ndarray]:
        bad: list[int] = []

        def skip(row: pacsv.InvalidRow) -> str:
            bad.append(row.number - 1)
            return "skip"

        table = pacsv.read_csv(
            io.BytesIO(block.data),
            read_options=pacsv.ReadOptions(column_names=names, use_threads=False, block_size=len(block.data) + 1),
            parse_options=pacsv.ParseOptions(
                delimiter=self.separator, invalid_row_handler=skip, ignore_empty_lines=False
            ),
            convert_options=pacsv.ConvertOptions(
                include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()), strings_can_be_null=True,
                null_values=[""], quoted_strings_can_be_null=False,
            ),
        )  # fmt: skip
        drop(block.numbers[bad], f"malformed: not {len(names)} columns")
        numbers = np.delete(block.numbers, bad) - 1
        if len(numbers) != len(table):
            raise DataError(f"{self.place.url}: rows {numbers[0]} to {numbers[-1]} cannot be told apart; mend quotes")
        return table, numbers


class JsonShard(_File):
    """A line a row, a JSON object each; rows are numbered from 1."""

    def batches(self, dropped: Dropped) -> Iterator[pl.DataFrame]:
        """See `Shard`."""
        drop = self._drop(dropped, 0)
        with self.place.text() as stream, duckdb.connect() as connection:
            connection.execute("SET threads = 1")
            for block in lines.blocks(stream, lambda n: drop(np.array([n]), "malformed: a line of over 64 MiB")):
                block = lines.readable(block, drop, quoted=False)
                if len(block.numbers):
                    yield self._rows(*self._parsed(connection, block, drop))

    def _parsed(
        self, connection: duckdb.DuckDBPyConnection, block: lines.Block, drop: Callable[[np.ndarray, str], None]
    ) -> tuple[pa.Table, np.ndarray]:
        begin, _ = block.spans
        offsets = np.concatenate([begin, [len(block.data)]]).astype(np.int32)
        text = pa.StringArray.from_buffers(len(begin), pa.py_buffer(offsets), pa.py_buffer(block.data))
        connection.register("lines", pa.table({"line": text, "number": block.numbers}))
        connection.execute(
            "CREATE OR REPLACE TEMP TABLE objects AS SELECT number, CASE WHEN json_valid(line) THEN line::JSON END AS o"
            " FROM lines"
        )
        shape = _table(connection, "SELECT json_type(o) AS shape FROM objects ORDER BY number")
        bad = pc.fill_null(pc.not_equal(shape["shape"], "OBJECT"), True).to_numpy()
        drop(block.numbers[bad], "malformed: not a JSON object")
        # A list or an object is no key, time or number; null and what is absent are the same.
        chosen = ", ".join(
            f"CASE WHEN json_type(o, {path}) NOT IN ('ARRAY', 'OBJECT', 'NULL') THEN o ->> {path} END AS c{n}"
            for n, path in enumerate(map(_path, dict.fromkeys(self.columns)))
        )
        table = _table(connection, f"SELECT {chosen} FROM objects WHERE json_type(o) = 'OBJECT' ORDER BY number")
        return table.rename_columns(list(dict.fromkeys(self.columns))), block.numbers[~bad]


def _table(connection: duckdb.DuckDBPyConnection, select: str) -> pa.Table:
    return connection.sql(select).to_arrow_table()


def _path(key: str) -> str:
    """As SQL: where a key of an object is, whatever the key holds."""
    escaped = key.replace("\\", "\\\\").replace('"', '\\"')
    return sql.text(f'$."{escaped}"')
