"""Files of JSON lines, as shards: fields by their names, or by dotted paths into objects."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from flm_torchrec.data.keys import EXACT, rounded_id
from flm_torchrec.errors import DataError
from flm_torchrec.names import LISTED
from flm_torchrec.prepare import sql
from flm_torchrec.prepare.clean import Dropped
from flm_torchrec.prepare.options import TextForm
from flm_torchrec.prepare.sources import lines
from flm_torchrec.prepare.sources.columns import alternatives, find, no_column
from flm_torchrec.prepare.sources.shards import FileShard

SAMPLE = 1000
"""Objects at the start of a file from which the names of its fields are taken."""
DEPTH = 8
"""Levels of objects inside objects whose fields are named."""
ROUNDED = "rounded id: "
"""Begins what DuckDB tells of such an id: the column and, in a second line, the value."""
NUMBERS = "'BIGINT', 'UBIGINT', 'HUGEINT', 'DOUBLE'"


@dataclass(frozen=True)
class JsonShard(FileShard):
    """A line a row, a JSON object each; rows are numbered from 1."""

    form: TextForm
    numbers: tuple[str, ...] = ()
    """Columns that are read as numbers: numbers of JSON are first written as `form.numbers` says, like texts."""
    ids: tuple[str, ...] = ()
    """Columns of keys: a float that may stand for several whole numbers is refused."""
    lists: bool = False
    """Lists are kept, as JSON; if false, a list is no value."""

    def batches(self, dropped: Dropped) -> Iterator[pl.DataFrame]:
        """See `Shard`.

        Raises:
            DataError: no row has a field that is wanted, or an id is a float that may stand for several.
        """
        drop, fields = self._drop(dropped, 0), _Fields(self)
        with self.file.text() as stream, duckdb.connect() as connection:
            connection.execute("SET threads = 1")
            for block in lines.blocks(lines.pieces(stream, self.form.encoding), drop):
                block = lines.readable(block, drop, quoted=False, encoding=self.form.encoding)
                if len(block.numbers):
                    yield self._rows(*self._parsed(connection, block, fields, dropped))
        fields.check()

    def _parsed(
        self, connection: duckdb.DuckDBPyConnection, block: lines.Block, fields: _Fields, dropped: Dropped
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
        self._drop(dropped, 0)(block.numbers[bad], "malformed: not a JSON object")
        fields.look(block, dropped.note)
        chosen = ", ".join(f"{fields.expression(name)} AS c{n}" for n, name in enumerate(fields.wanted))
        try:
            table = _table(connection, f"SELECT {chosen} FROM objects WHERE json_type(o) = 'OBJECT' ORDER BY number")
        except duckdb.InvalidInputException as error:
            column, _, value = str(error).partition(ROUNDED)[2].partition("\n")
            if not value:
                raise
            raise rounded_id(self.file.url, column, value) from error
        table = table.rename_columns(list(fields.wanted))
        fields.note(table)
        return table, block.numbers[~bad]


class _Fields:
    """Which fields of a file's objects are read, which are present, and which have a value in some row."""

    def __init__(self, shard: JsonShard) -> None:
        self.shard = shard
        self.wanted = tuple(dict.fromkeys(shard.columns))
        self.names = {wanted: alternatives(wanted) for wanted in self.wanted}
        self.present: dict[str, None] = {}
        self.filled: set[str] = set()

    def look(self, block: lines.Block, note: Callable[[str], None]) -> None:
        """Look for names that differ in case alone, in the first objects of a file."""
        if self.present:
            return
        for line in range(min(len(block.numbers), SAMPLE)):
            try:
                _walk(json.loads(block.line(line)), "", self.present)
            except (ValueError, RecursionError):
                continue
        for wanted in self.wanted:
            alike = find(wanted, list(self.present), note)
            self.names[wanted] = tuple(dict.fromkeys((*self.names[wanted], *([alike] if alike else []))))

    def note(self, table: pa.Table) -> None:
        """Remember which fields have a value in some row."""
        self.filled |= {name for name in self.wanted if table[name].null_count < len(table)}

    def check(self) -> None:
        """Check that each field has a value in some row, if there are objects.

        Raises:
            DataError: one has none.
        """
        for wanted in self.wanted if self.present else ():
            names = self.names[wanted]
            if wanted in self.filled:
                continue
            inside = [field for field in self.present for name in names if field.startswith(f"{name}.")]
            if inside:
                raise DataError(
                    f"{self.shard.file.url}: '{wanted}' is an object in every row; name a field of it:"
                    f" {', '.join(inside[:LISTED])}"
                )
            if not any(name in self.present for name in names):
                raise no_column(self.shard.file.url, wanted, list(self.present))

    def expression(self, wanted: str) -> str:
        """SQL: the first alternative with a plain value; a null and an absent field are the same."""
        paths = dict.fromkeys(path for name in self.names[wanted] for path in (_path([name]), _path(name.split("."))))
        return f"COALESCE({', '.join(self._value(path, wanted) for path in paths)}, NULL)"

    def _value(self, path: str, wanted: str) -> str:
        # An object is no key, time or number.
        none = "'OBJECT', 'NULL'" if self.shard.lists else "'ARRAY', 'OBJECT', 'NULL'"
        value, point = f"o ->> {path}", self.shard.form.numbers.decimal
        if wanted not in self.shard.numbers:
            whole = f"regexp_replace({value}, '\\.0$', '')"  # a whole float has no point in any source
            if wanted in self.shard.ids:  # an integer of many digits is a DOUBLE too, but keeps them in its text
                inexact = f"regexp_matches({value}, '[.e]') AND abs(CAST({value} AS DOUBLE)) >= {EXACT}"
                told = f"error({sql.text(ROUNDED + wanted)} || chr(10) || ({value}))"
                whole = f"CASE WHEN {inexact} THEN {told} ELSE {whole} END"
            value = f"CASE json_type(o, {path}) WHEN 'DOUBLE' THEN {whole} ELSE {value} END"
        if wanted in self.shard.numbers and point != ".":
            written = f"replace({value}, '.', {sql.text(point)})"
            value = f"CASE WHEN json_type(o, {path}) IN ({NUMBERS}) THEN {written} ELSE {value} END"
        return f"CASE WHEN json_type(o, {path}) NOT IN ({none}) THEN {value} END"


def _walk(node: Any, before: str, present: dict[str, None]) -> None:
    """Add the names of an object's fields to `present`, with dots between levels."""
    if isinstance(node, dict) and before.count(".") < DEPTH:
        for name, value in node.items():
            present[f"{before}{name}"] = None
            _walk(value, f"{before}{name}.", present)


def _table(connection: duckdb.DuckDBPyConnection, select: str) -> pa.Table:
    return connection.sql(select).to_arrow_table()


def _path(keys: list[str]) -> str:
    """SQL: the path to a key of an object, or to a key of an object inside it, whatever characters the keys have."""
    escaped = (key.replace("\\", "\\\\").replace('"', '\\"') for key in keys)
    return sql.text("$" + "".join(f'."{key}"' for key in escaped))
