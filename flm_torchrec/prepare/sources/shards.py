"""Files of logs, local or at any address that fsspec knows, as shards that are read batch by batch."""

from __future__ import annotations

import glob
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from flm_torchrec.data.keys import frame_of
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.clean import Dropped
from flm_torchrec.prepare.sources import lines
from flm_torchrec.prepare.sources.columns import found
from flm_torchrec.prepare.sources.form import Form
from flm_torchrec.safe_text import first_line, redact_address

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


def places(source: str, location: str, option: str = "--input") -> list[Place]:
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
        raise DataError(f"{shown}: {what}; {option} must be a file {kinds}, a folder of them or a pattern")
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


@dataclass(frozen=True)
class FileShard:
    """What shards of every format have in common."""

    place: Place
    columns: tuple[str, ...]
    """The only ones that are ever read, as people name them."""
    roles: Roles

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def identity(self) -> str:
        return self.place.identity

    def _rows(self, table: pa.Table, rows: np.ndarray) -> pl.DataFrame:
        frame = self.roles(frame_of(table))
        return frame.with_columns(pl.lit(self.name).alias("file"), pl.Series("row", rows, dtype=pl.Int64))

    def _drop(self, dropped: Dropped, before: int) -> Callable[[np.ndarray, str], None]:
        def drop(numbers: np.ndarray, reason: str) -> None:
            dropped.add(reason, len(numbers), (f"{self.name}: row {n - before}" for n in numbers.tolist()))

        return drop


class ParquetShard(FileShard):
    """Rows are numbered from 1."""

    def batches(self, dropped: Dropped) -> Iterator[pl.DataFrame]:
        """See `Shard`.

        Raises:
            DataError: corrupt, or a column is missing or of a type that cannot be its role's.
        """
        row = 1
        try:
            with self.place.open() as stream, pq.ParquetFile(stream) as file:
                wanted = found(self.columns, _paths(file.schema_arrow), self.place.url, dropped.note)
                if file.metadata.num_rows == 0:
                    raise DataError(f"{self.place.url}: has no rows; give a file with data")
                for batch in file.iter_batches(ROWS, columns=list(dict.fromkeys(wanted.values()))):
                    table = pa.table({name: _at(batch, path) for name, path in wanted.items()})
                    yield self._rows(table, np.arange(row, row + len(batch)))
                    row += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self.place.url}: not a readable Parquet file ({first_line(error)}); write it again"
            ) from error


def _paths(fields: Iterable[pa.Field], before: str = "") -> list[str]:
    """Names of columns, and of fields inside them with dots between."""
    names = []
    for field in fields:
        names.append(before + field.name)
        if pa.types.is_struct(field.type):
            names += _paths(field.type, f"{before}{field.name}.")
    return names


def _at(batch: pa.RecordBatch, path: str) -> pa.Array:
    """The column of a path; null where a field that it leads through is."""
    if path in batch.schema.names:
        return batch[path]
    name = max((n for n in batch.schema.names if path.startswith(f"{n}.")), key=len)
    column = batch[name]
    for part in path.removeprefix(f"{name}.").split("."):
        column = pc.struct_field(column, part)
    return column


@dataclass(frozen=True)
class CsvShard(FileShard):
    """A line a row, after the header; rows are numbered from 1, the header not counted."""

    form: Form

    def batches(self, dropped: Dropped) -> Iterator[pl.DataFrame]:
        """See `Shard`.

        Raises:
            DataError: no header, no rows, or a column is missing.
        """
        url, drop, form = self.place.url, self._drop(dropped, 1), self.form
        names: list[str] | None = None
        some = False
        with self.place.text() as stream:
            for block in lines.blocks(lines.pieces(stream, form.encoding), drop, form.multiline):
                if names is None:
                    names = self._header(block.line(0))
                    wanted = found(self.columns, names, url, dropped.note)
                    block = block.keep(np.arange(len(block.numbers)) > 0)
                some = some or len(block.numbers) > 0
                block = lines.readable(block, drop, quoted=True, encoding=form.encoding)
                if len(block.numbers):
                    table, rows = self._parsed(block, names, list(dict.fromkeys(wanted.values())), drop)
                    yield self._rows(pa.table({name: table[column] for name, column in wanted.items()}), rows)
        if not some:
            raise DataError(f"{url}: has no rows; give a file with data")

    def _header(self, line: bytes) -> list[str]:
        try:
            line.decode()
            options = pacsv.ParseOptions(delimiter=self.form.separator, newlines_in_values=self.form.multiline)
            return pacsv.read_csv(io.BytesIO(line + b"\n"), parse_options=options).column_names
        except (pa.ArrowException, UnicodeDecodeError, ValueError, TypeError) as error:
            raise DataError(
                f"{self.place.url}: not a readable table ({first_line(error)}); give the right --separator and"
                " --encoding"
            ) from error

    def _parsed(
        self, block: lines.Block, names: list[str], wanted: list[str], drop: Callable[[np.ndarray, str], None]
    ) -> tuple[pa.Table, np.ndarray]:
        table, bad = self._table(block.data, names, wanted)
        if len(table) + len(bad) != len(block.numbers):  # a quote inside a field: what Arrow takes for text is no quote
            whole = np.array([self._is_row(block.line(n), names, wanted) for n in range(len(block.numbers))])
            drop(block.numbers[~whole], "malformed: a quote inside a field")
            block = block.keep(whole)
            table, bad = self._table(block.data, names, wanted)
        drop(block.numbers[bad], f"malformed: not {len(names)} columns")
        return table, np.delete(block.numbers, bad) - 1

    def _is_row(self, line: bytes, names: list[str], wanted: list[str]) -> bool:
        table, bad = self._table(line + b"\n", names, wanted)
        return len(table) + len(bad) == 1

    def _table(self, data: bytes, names: list[str], wanted: list[str]) -> tuple[pa.Table, list[int]]:
        """The lines of as many columns as there are names, and the places of the others."""
        bad: list[int] = []

        def skip(row: pacsv.InvalidRow) -> str:
            bad.append(row.number - 1)
            return "skip"

        table = pacsv.read_csv(
            io.BytesIO(data),
            read_options=pacsv.ReadOptions(column_names=names, use_threads=False, block_size=len(data) + 1),
            parse_options=pacsv.ParseOptions(
                delimiter=self.form.separator, invalid_row_handler=skip, ignore_empty_lines=False,
                newlines_in_values=self.form.multiline,
            ),
            convert_options=pacsv.ConvertOptions(
                include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()), strings_can_be_null=True,
                null_values=[""], quoted_strings_can_be_null=False,
            ),
        )  # fmt: skip
        return table, bad
