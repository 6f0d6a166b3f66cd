"""Keys, titles and attributes of prepared items and users, by ranges of ids. One row group is in memory at a time."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.errors import DataError
from flm_torchrec.export.parts import ATTRIBUTE, single_array


class Keys:
    """Keys of users, or keys, titles and attributes of items, for ascending ranges of ids.

    Raises:
        DataError: a file is missing or unreadable.
    """

    def __init__(self, data: PreparedData, entity: str) -> None:
        self.key = f"{entity}_key"
        self.title = data.schema.title if entity == "item" else ""
        features = [f for f in data.schema.of("item", sparse=True) if f.kind != "text"] if entity == "item" else []
        self.columns = {f.column: ATTRIBUTE + f.name for f in features}
        self.values = {f.column: _vocabulary(data, f.name) for f in features}
        path = data.path / f"{entity}s.parquet"
        try:
            self.file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable Parquet file ({error})") from error
        groups = range(self.file.num_row_groups)
        self.ends = np.cumsum([self.file.metadata.row_group(g).num_rows for g in groups])
        self.row_group: tuple[int, pa.Table] | None = None  # its number, and its rows

    def rows(self, start: int, stop: int) -> dict[str, pa.Array]:
        """Columns [stop - start] of the entities `start:stop`, by name."""
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
        pieces = [self._piece(int(group), start, stop) for group in range(first, last + 1)]
        table = pa.concat_tables(pieces).combine_chunks()
        columns = {self.key: single_array(table[self.key]).cast(pa.string())}
        if self.key == "item_key":
            columns["title"] = columns[self.key]
            if self.title:
                shown = single_array(table[self.title]).cast(pa.string())
                named = pc.and_kleene(pc.is_valid(shown), pc.not_equal(shown, ""))
                columns["title"] = pc.if_else(pc.fill_null(named, False), shown, columns[self.key])
        for column, name in self.columns.items():
            columns[name] = decoded(single_array(table[column]), self.values[column])
        return columns

    def _piece(self, group: int, start: int, stop: int) -> pa.Table:
        if self.row_group is None or self.row_group[0] != group:
            wanted = {self.key, *([self.title] if self.title else []), *self.columns}
            self.row_group = group, self.file.read_row_group(group, columns=sorted(wanted))
        table = self.row_group[1]
        begin = int(self.ends[group]) - len(table)
        return table.slice(max(0, start - begin), stop - max(start, begin))


def _vocabulary(data: PreparedData, feature: str) -> pa.Array:
    """The values of an item's feature, in order of their codes."""
    file = data.path / "vocab" / f"item_{feature}.parquet"
    try:
        return single_array(pq.read_table(file, columns=["code", "value"]).sort_by("code")["value"]).cast(pa.string())
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read ({error}); prepare the data again") from error


def decoded(codes: pa.Array, values: pa.Array) -> pa.ListArray:
    """Codes, one or a list in each row, null where unknown → a list of values in each row, empty where unknown."""
    if pa.types.is_list(codes.type) or pa.types.is_large_list(codes.type):
        lengths, flat = codes.value_lengths().fill_null(0), codes.flatten()
    else:
        lengths, flat = codes.is_valid(), codes.drop_null()
    ends = np.cumsum(lengths.to_numpy(zero_copy_only=False), dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(np.concatenate([np.zeros(1, np.int32), ends])), values.take(flat))
