"""Files that describe items, read again and again while a run is followed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl
import polars.selectors as cs
import pyarrow.parquet as pq

from flm_torchrec.data.event_files import as_data_error
from flm_torchrec.data.keys import frame_of, is_rounded, json_text, keys, rounded_id
from flm_torchrec.errors import DataError
from flm_torchrec.training.follow.item_rows import ItemRows, is_bare
from flm_torchrec.training.follow.sources import json_of, rows_of

ITEM_ID = "item_id"


@dataclass(frozen=True)
class _Table:
    """What an item file holds."""

    columns: list[str]
    rows: list[dict[str, Any]]
    """By column, what JSON lines would have."""
    ids: dict[str, pl.Series]
    """Columns that may have the ids, the first choice first."""
    cut: bool = False
    """Whether the last line had no end, and was left out."""


def _read_json_lines(file: Path, ids: Sequence[str]) -> _Table:
    """Line by line, for a feature may be a text in one row and a list in the next."""
    content, cut = _whole_lines(file)
    rows = [json_of(line) for line in content.splitlines() if line.strip()]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{file}: row {number}: not a JSON object; mend the row")
    # A file of `flm export-events` is empty where there are no cold items.
    columns = list(dict.fromkeys(name for row in rows for name in row)) or [ITEM_ID]
    given = {name: [row.get(name) for row in rows] for name in ids if name in columns}
    for name, values in given.items():
        if rounded := next(filter(is_rounded, values), None):
            raise rounded_id(str(file), name, rounded)
    texts = {name: pl.Series(name, map(json_text, values), dtype=pl.String) for name, values in given.items()}
    return _Table(columns, rows, texts, cut)


def _read_parquet(file: Path, ids: Sequence[str]) -> _Table:
    with as_data_error(file), pq.ParquetFile(file) as source:
        return _of_frame(frame_of(source.read(), str(file)), ids)


def _read_csv(file: Path, ids: Sequence[str]) -> _Table:
    """All text: `007` is no number, and the key of another item than `7`."""
    content, cut = _whole_lines(file)
    return replace(_of_frame(pl.read_csv(content, infer_schema=False), ids), cut=cut)


def _whole_lines(file: Path) -> tuple[bytes, bool]:
    """A file up to its last line break, and whether there is more: a row that is being written may look complete."""
    content = file.read_bytes()
    end = content.rfind(b"\n") + 1
    return content[:end], end < len(content)


def _of_frame(frame: pl.DataFrame, ids: Sequence[str]) -> _Table:
    values = frame.with_columns(cs.float().fill_nan(None))
    return _Table(frame.columns, rows_of(values), {name: frame[name] for name in ids if name in frame.columns})


READERS = {".parquet": _read_parquet, ".jsonl": _read_json_lines, ".csv": _read_csv}


@dataclass
class ItemNews:
    """What an item file has that the run's data lack."""

    new: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Keys and encoded rows of items, in order of the file."""
    described: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Likewise, of items that came in without features, before their row here."""
    left_out: list[str] = field(default_factory=list)
    """A line for each value of `new` and `described` that has no code."""
    changed: list[str] = field(default_factory=list)
    """A line for each item of the data that has other features here."""
    cut: bool = False
    """Whether the last line of the file had no end, and was left out."""


@dataclass(frozen=True)
class ItemFile:
    """Rows of a file that describes items: Parquet, JSON lines or CSV, with a column of keys, and features by name."""

    path: Path
    key: str
    """Column of keys; where the file lacks it, `item_id` is, as `flm export-events` writes it."""

    def status(self) -> tuple[int, int]:
        """Size and time of the file.

        Raises:
            DataError: it is not there.
        """
        try:
            found = self.path.stat()
        except OSError as error:
            raise DataError(f"{self.path}: not readable ({error.strerror}); put the item file back") from error
        return found.st_size, found.st_mtime_ns

    def read(self, rows: ItemRows) -> ItemNews:
        """What the file has that the data lack.

        Raises:
            DataError: the file cannot be read, a row has no key or the key of another row, or a value does not fit its
                kind. The message names the row.
        """
        table = self._table()
        found = keys(next(iter(table.ids.values())), str(self.path)).to_list()
        known = rows.known([key for key in found if key is not None])
        news, seen = ItemNews(cut=table.cut), set[str]()
        for number, (key, given) in enumerate(zip(found, table.rows, strict=True), start=1):
            where = f"{self.path}: row {number}"
            if key is None or key in seen:
                raise DataError(f"{where}: {'no item' if key is None else f'item {key!r} has two rows'}; mend the row")
            seen.add(key)
            left_out: list[str] = []
            try:
                row = rows.row(given, left_out)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            if key not in known:
                news.new.append((key, row))
                news.left_out += left_out
            elif rows.awaits(known[key]):
                if not is_bare(row):
                    news.described.append((key, row))
                    news.left_out += left_out
            elif feature := rows.differs(given, row, known[key]):
                news.changed.append(f"row {number}: item '{key}' has another {feature}")
        return news

    def _table(self) -> _Table:
        if self.path.suffix not in READERS:
            raise DataError(f"{self.path}: give an item file that ends in {', '.join(READERS)}")
        try:
            table = READERS[self.path.suffix](self.path, (self.key, ITEM_ID))
        except (OSError, pl.exceptions.PolarsError) as error:
            raise DataError(f"{self.path}: not readable ({str(error).splitlines()[0]}); mend the file") from error
        if not table.ids:
            raise DataError(f"{self.path}: no column '{self.key}' (it has {', '.join(table.columns)}); see --columns")
        return table


class ItemFeed:
    """An item file, read again whenever it has changed, and until it can be read: it may be half written.

    Args:
        rows: encodes its rows.
    """

    def __init__(self, file: ItemFile, rows: ItemRows) -> None:
        self.file = file
        self.rows = rows
        self.status: tuple[int, int] | None = None
        """Of the file when it was read last."""
        self.messages: list[str] = []
        """Lines for the user; whoever shows them clears the list."""
        self.trouble = ""
        """What was wrong with the file at the last look."""

    def check(self) -> None:
        """Raise DataError where the file is not there, and as `ItemFile.read` does."""
        self.file.status()
        self.file.read(self.rows)

    def read(self) -> ItemNews | None:
        """What the file has that the data lack; None where it has not changed, or cannot be read now."""
        try:
            status = self.file.status()
            if status == self.status:
                return None
            news = self.file.read(self.rows)
        except DataError as error:
            self._tell(f"{error}; until it can be read, nothing is taken from it")
            return None
        self._tell(f"{self.file.path}: its last line has no end yet, and is left for later" if news.cut else "")
        self.status = status
        return news

    def _tell(self, trouble: str) -> None:
        if trouble and trouble != self.trouble:
            self.messages.append(trouble)
        self.trouble = trouble
